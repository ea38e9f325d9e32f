"""The arguments of the operators: a group of pairs, packed into lists.

An operator's schema allows lists of tensors but no lists of records, and lists of optional tensors are not
differentiable. So a group is packed into columns: the weights, the vectors that are not None, and for each pair a mask
of its optional vectors, its eps, and so on. A row of it is a `FoldInputs`.
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
    """The columns of a group of pairs.

    Attributes:
        weights: One for each pair.
        vectors: For each pair those of (bias, bn_weight, bn_bias) that are not None, then running_mean and running_var.
        present: For each pair a mask. Bit i is set if OPTIONAL[i] is not None.
        dtypes: Indices into `reference.FLOATING`; -1 is the dtype of the weight.
        layouts: Indices into LAYOUTS.
        eps, transposed, groups, prescale: See `FoldInputs`.
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
        """Pack pairs of tensors, of graph nodes, or of anything else."""
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
        """Return the rows, one for each pair."""
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
        """Sort the outputs of `fold`, or their positions, into (W', b', q) for each pair. None without prescale."""
        end = 2 * len(self.weights)
        return list(zip(outputs[0:end:2], outputs[1:end:2], self.each_power(outputs[end:]), strict=True))

    def each_power(self, powers: Sequence[Any]) -> list[Any]:
        """Return q for each pair, None without prescale, from the q of the pairs with prescale."""
        rest = iter(powers)
        return [next(rest) if prescale else None for prescale in self.prescale]

    def gradients(self, pairs: Sequence[Sequence[Tensor | None]]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Pack the gradients of (weight, bias, bn_weight, bn_bias) of each pair like weights and vectors."""
        vectors: list[Tensor | None] = []
        for i, gradients in enumerate(pairs):
            vectors += [gradients[1 + bit] for bit in range(len(OPTIONAL)) if self.present[i] >> bit & 1]
            vectors += [None, None]  # the statistics
        return [gradients[0] for gradients in pairs], vectors

    def needs(self, weights: Sequence[bool], vectors: Sequence[bool]) -> list[Needs]:
        """Return the needed gradients of each pair, from flags for weights and vectors."""
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
    """Return the needed gradients of each pair, from its mask."""
    return [Needs(*(bool(mask >> bit & 1) for bit in range(len(Needs._fields)))) for mask in wanted]


def grad_pairs(grads: Sequence[Any], given: Sequence[int]) -> list[tuple[Any, Any]]:
    """Return (dW', db') of each pair. `given` has a mask for each pair: bit 0 for dW', bit 1 for db', None if unset."""
    rest = iter(grads)
    return [(next(rest) if mask & 1 else None, next(rest) if mask & 2 else None) for mask in given]
