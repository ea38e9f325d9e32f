"""Sums that are alike, computed together: from the vectors of their BatchNorms to their scales and biases, and back.

The output of BatchNorm k is multiplied by a number and, in some sums, by a factor a channel: ``m_k = sign_k * factor``.
Each weight has a BatchNorm of its own. The input may have several, and a number of its own:

    scale of weight k = m_k * scale_k    scale of the input = own + sum_k m_k * scale_k    bias = sum_k m_k * shift_k

Sums that are alike are computed as one with the channels of all. Their BatchNorms are ordered for that: the first ones
of all sums, then the second ones, and so on.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce
from itertools import groupby
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .branch_form import Composition


class Run(NamedTuple):
    """Sums that follow each other and have the same composition.

    Attributes:
        composition: What each consists of.
        widths: C_out of each. C is their total.
        plain: The scales of the terms are those of the BatchNorms.
    """

    composition: Composition
    widths: tuple[int, ...]
    plain: bool

    def combined(self, scale: Tensor, shift: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the scales of the terms and the biases, ``(terms, C)`` and (C,). Differentiable.

        Args:
            scale, shift: Those of the BatchNorms, ``(norms, C)``.
            factor: (C,), or None.
        """
        if self.plain:
            return scale, shift.sum(0)
        by = self._multipliers(factor, scale)
        scale, shift = scale * by, shift * by
        weights, own = self.composition.weights, self.composition.own
        if self.composition.terms == weights:
            return scale, shift.sum(0)
        of_input = scale[weights:].sum(0, keepdim=True)
        return torch.cat([scale[:weights], of_input if own is None else of_input + own]), shift.sum(0)

    def gradients(
        self, of_terms: Tensor, of_bias: Tensor, scale: Tensor | None, shift: Tensor | None, factor: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of scale, shift and factor. Differentiable.

        Args:
            of_terms, of_bias: Those of what `combined` returns.
            scale, shift, factor: The arguments of `combined`. Only a factor needs them.
        """
        norms, weights = len(self.composition.signs), self.composition.weights
        of_shift = of_bias.expand(norms, -1)
        if self.plain:
            return of_terms, of_shift, None
        of_scale = torch.cat([of_terms[:weights], of_terms[weights:].expand(norms - weights, -1)])
        by, of_factor = self._multipliers(factor, of_terms), None
        if factor is not None and scale is not None and shift is not None:
            products = torch.addcmul(of_scale * scale, of_shift, shift)
            of_factor = reduce(add, map(torch.mul, products.unbind(), self.composition.signs))
        return of_scale * by, of_shift * by, of_factor

    def _multipliers(self, factor: Tensor | None, like: Tensor) -> Tensor:
        """Return all m_k, ``(norms, C)``."""
        factor = like.new_ones(like.shape[-1]) if factor is None else factor
        equal = [(sign, len(list(own))) for sign, own in groupby(self.composition.signs)]
        return torch.cat([(factor * sign).expand(count, -1) for sign, count in equal])


class Runs:
    """All sums of a call. The vectors of all BatchNorms follow each other in flat ones.

    Args:
        compositions: What each sum consists of.
        channels: C_out of each BatchNorm, one sum after another.

    Attributes:
        order: The numbers of the BatchNorms in the order of the flat vectors.
        sizes: C_out of each BatchNorm in that order.
        owners: The number of the sum that each BatchNorm is in, in that order.
        with_factor: The numbers of the sums that have a factor.
    """

    def __init__(self, compositions: Sequence[Composition], channels: Sequence[int]) -> None:
        numbers = iter(range(len(channels)))
        alike: list[tuple[Composition, list[list[int]]]] = []  # no groupby: Dynamo cannot trace one with a key (2.14)
        for composition in compositions:
            if not alike or alike[-1][0] != composition:
                alike.append((composition, []))
            alike[-1][1].append([next(numbers) for _ in composition.signs])
        self.order: list[int] = []
        self.runs: list[Run] = []
        for composition, norms in alike:
            self.order += [number for of_all in zip(*norms, strict=True) for number in of_all]
            plain = composition == Composition(composition.weights, (1.0,) * composition.terms)
            self.runs.append(Run(composition, tuple(channels[first] for first, *_ in norms), plain))
        self.sizes = [channels[number] for number in self.order]
        sums = [index for index, composition in enumerate(compositions) for _ in composition.signs]
        self.owners = [sums[number] for number in self.order]
        self.with_factor = [index for index, composition in enumerate(compositions) if composition.has_factor]
        self._norms = [(len(run.composition.signs), sum(run.widths)) for run in self.runs]
        self._factors = [(int(run.composition.has_factor), sum(run.widths)) for run in self.runs]

    def combined(self, scale: Tensor, shift: Tensor, factors: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Return what `Run.combined` does, for each run."""
        parts = _parts(scale, self._norms), _parts(shift, self._norms), self._own(factors)
        return list(map(Run.combined, self.runs, *parts))

    def gradients(
        self,
        of_terms: Sequence[Tensor],
        of_biases: Sequence[Tensor],
        scale: Tensor | None,
        shift: Tensor | None,
        factors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of scale, shift and factors, given those of what `combined` returns."""
        parts = _parts(scale, self._norms), _parts(shift, self._norms), self._own(factors)
        of_scales, of_shifts, of_factors = zip(*map(Run.gradients, self.runs, of_terms, of_biases, *parts), strict=True)
        found = [each for each in of_factors if each is not None]
        return _flat(of_scales), _flat(of_shifts), _flat(found) if found else None

    def _own(self, factors: Tensor | None) -> list[Tensor | None]:
        parts = zip(self.runs, _parts(factors, self._factors), strict=True)
        return [part.view(-1) if run.composition.has_factor else None for run, part in parts]


def runs_of(compositions: tuple[Composition, ...], channels: tuple[int, ...]) -> Runs:
    """Return the runs of sums that are alike. channels: The number of channels of each BatchNorm."""
    # Dynamo warns about caches, and sizes in a trace may be symbols or tensors, which are no keys.
    if torch.compiler.is_compiling() or any(type(width) is not int for width in channels):
        return Runs(compositions, channels)
    return _cached(compositions, channels)


@lru_cache(maxsize=256)
def _cached(compositions: tuple[Composition, ...], channels: tuple[int, ...]) -> Runs:
    return Runs(compositions, channels)


def _parts(vectors: Tensor | None, shapes: Sequence[tuple[int, int]]) -> Sequence[Any]:
    if vectors is None:
        return [None] * len(shapes)
    parts = vectors.split_with_sizes([a * b for a, b in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
