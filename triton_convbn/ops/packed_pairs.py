"""A group of pairs as lists, which is how an operator takes it.

A schema can hold lists of tensors but no lists of records, and a list with absent tensors is not differentiable. So a
group is written as packed: the weights; the vectors of all pairs that are present, one after the other; and for each
pair a mask of which of the three optional vectors it has, its eps, and so on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.inputs import FoldInputs
from ..kernels.spec import Needs
from . import reference

OPTIONAL = ("bias", "bn_weight", "bn_bias")
LAYOUTS = (torch.preserve_format, torch.channels_last, torch.channels_last_3d)


class PackedPairs(NamedTuple):
    """A group of pairs as the operators take it.

    weights: one a pair. vectors: of each pair, those present of (bias, bn_weight, bn_bias), then mean and var.
    present: bit i of it says whether OPTIONAL[i] is there. dtypes: index into `reference.FLOATING`, -1: the weight's own.
    layouts: index into LAYOUTS, of the folded weight. prescale: see `FoldInputs`.
    """

    weights: list[Any]
    vectors: list[Any]
    present: list[int]
    eps: list[float]
    transposed: list[bool]
    groups: list[int]
    dtypes: list[int]
    layouts: list[int]
    prescale: list[bool]

    @classmethod
    def pack(cls, group: Sequence[FoldInputs]) -> "PackedPairs":
        """The packed of pairs, of tensors as of graph nodes."""
        packed = cls([], [], [], [], [], [], [], [], [])
        for pair in group:
            optional = [pair.bias, pair.bn_weight, pair.bn_bias]
            packed.weights.append(pair.weight)
            packed.vectors.extend(v for v in (*optional, pair.running_mean, pair.running_var) if v is not None)
            packed.present.append(sum((v is not None) << i for i, v in enumerate(optional)))
            packed.eps.append(pair.eps)
            packed.transposed.append(pair.transposed)
            packed.groups.append(pair.groups)
            packed.dtypes.append(-1 if pair.out_dtype is None else reference.FLOATING.index(pair.out_dtype))
            packed.layouts.append(LAYOUTS.index(pair.memory_format or torch.preserve_format))
            packed.prescale.append(pair.prescale)
        return packed

    def unpack(self) -> list[FoldInputs]:
        vectors = iter(self.vectors)
        found = []
        for i, weight in enumerate(self.weights):
            optional = [next(vectors) if self.present[i] >> bit & 1 else None for bit in range(len(OPTIONAL))]
            dtype = None if self.dtypes[i] < 0 else reference.FLOATING[self.dtypes[i]]
            mean, var = next(vectors), next(vectors)
            static = self.eps[i], self.transposed[i], self.groups[i], dtype, LAYOUTS[self.layouts[i]], self.prescale[i]
            found.append(FoldInputs(weight, *optional, mean, var, *static))
        return found

    def by_pair(self, outputs: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
        """Of each pair W', b' and q, None without prescale, from all that `fold` returns. Or from their numbers."""
        end = 2 * len(self.weights)
        return list(zip(outputs[0:end:2], outputs[1:end:2], self.each_power(outputs[end:]), strict=True))

    def each_power(self, powers: Sequence[Any]) -> list[Any]:
        """Of each pair its q, None without prescale, from those that there are."""
        rest = iter(powers)
        return [next(rest) if prescale else None for prescale in self.prescale]

    def gradients(self, pairs: Sequence[Sequence[Tensor | None]]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients given pair by pair, for (weight, bias, bn_weight, bn_bias), in the order of weights and vectors."""
        vectors: list[Tensor | None] = []
        for i, gradients in enumerate(pairs):
            vectors += [gradients[1 + bit] for bit in range(len(OPTIONAL)) if self.present[i] >> bit & 1]
            vectors += [None, None]  # the statistics
        return [gradients[0] for gradients in pairs], vectors

    def needs(self, weights: Sequence[bool], vectors: Sequence[bool]) -> list[Needs]:
        """Which gradients are wanted of each pair, from the flags of weights and vectors."""
        flags = iter(vectors)
        found = []
        for i, weight in enumerate(weights):
            wanted = [bool(next(flags)) if self.present[i] >> bit & 1 else False for bit in range(len(OPTIONAL))]
            if next(flags) | next(flags):
                raise NotImplementedError(
                    "triton_convbn::fold has no gradient for the statistics: use reference.fold_reference"
                )
            found.append(Needs(bool(weight), *wanted))
        return found


def needs_of(wanted: Sequence[int]) -> list[Needs]:
    """Return which gradients each pair wants, from its mask."""
    return [Needs(*(bool(mask >> bit & 1) for bit in range(len(Needs._fields)))) for mask in wanted]


def grad_pairs(grads: Sequence[Any], given: Sequence[int]) -> list[tuple[Any, Any]]:
    """Return (dW', db') of each pair, None where a bit of `given` says that there is none."""
    rest = iter(grads)
    return [(next(rest) if mask & 1 else None, next(rest) if mask & 2 else None) for mask in given]
