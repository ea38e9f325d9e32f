"""Combine the BatchNorms and factors of a sum of branches into a scale for each term, and a bias."""

import operator
from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .branch_vectors import Expression, Vectors, kind_of
from .reference import power_of_two


class Terms(NamedTuple):
    """A sum as ``sum_k scale_k * conv(x, weight_k) + identity * x + shift``.

    Attributes:
        weights: The position of each weight.
        scales: The scale of each weight, (C_out,).
        identity: The scale of the input, (C_out,), or None if the input is no term.
        shift: (C_out,), or None for zeros.
    """

    weights: tuple[int, ...]
    scales: tuple[Tensor, ...]
    identity: Tensor | None
    shift: Tensor | None

    def times(self, factor: Tensor | float) -> "Terms":
        identity = None if self.identity is None else self.identity * factor
        shift = None if self.shift is None else self.shift * factor
        return Terms(self.weights, tuple(scale * factor for scale in self.scales), identity, shift)


def combine(vectors: Vectors, dtype: torch.dtype | None, prescale: bool = True) -> tuple[Any, ...]:
    """Return the scales of a sum's terms and the merged bias: ``(terms, b')``, or ``(terms / q, b' / q, q)`` for fp16.

    q is (C_out,), fp16, without a gradient: the smallest powers of two with ``sum_k |s_k| / q <= 1/2`` and
    ``|b' / q| <= 1024``. The convolution of every branch is in fp16's range by itself, so the merged one, divided by q,
    is at most half of it. See `reference.prescale`.
    """
    terms = _terms(vectors.expression, vectors)
    dtype = dtype or vectors.tensors[terms.weights[0]].dtype
    shift = torch.zeros_like(terms.scales[0]) if terms.shift is None else terms.shift
    if dtype != torch.float16 or not prescale:
        return terms, shift.to(dtype)
    with torch.no_grad():
        scales = terms.scales if terms.identity is None else (*terms.scales, terms.identity)
        power = power_of_two(torch.maximum(2 * torch.stack(scales).abs().sum(0), shift.abs() / 1024))
    inverse = power.to(shift.dtype).reciprocal()  # exact
    return terms.times(inverse), (shift * inverse).to(dtype), power


def _terms(expression: Expression, vectors: Vectors) -> Terms:
    """Return the sum that an expression describes."""
    kind, *rest = expression
    if kind == "conv":
        weight, bias = rest
        return Terms((weight,), (vectors.ones,), None, None if bias is None else vectors.read(bias))
    if kind == "input":
        return Terms((), (), vectors.ones, None)
    if kind == "norm":
        return _normalized([expression], vectors) if kind_of(expression) else _normalized_sum(expression, vectors)
    if kind == "factor":
        inner, factor = rest
        by = vectors.read(factor).reshape(-1) if isinstance(factor, int) else factor[0]
        return _terms(inner, vectors).times(by)
    if kind != "sum":
        raise ValueError(f"fold_branches: {kind!r} is no kind of expression")
    alike, others = _split(expression) if vectors.stacks else ((), tuple(rest))
    every = [_normalized(norms, vectors) for norms in alike]
    for sign, inner in others:
        terms = _terms(inner, vectors)
        every.append(terms if sign == 1 else terms.times(-1.0))
    return Terms(
        tuple(weight for each in every for weight in each.weights),
        tuple(scale for each in every for scale in each.scales),
        _total([each.identity for each in every]),
        _total([each.shift for each in every]),
    )


def _normalized(norms: Sequence[Expression], vectors: Vectors) -> Terms:
    """Return the sum of BatchNorms of one kind that follow a convolution or the input."""
    *_, scale, shift = vectors.norms(norms)
    scales = [scale] if len(norms) == 1 else scale.unbind()
    inner = [norm[1] for norm in norms]
    return Terms(
        tuple(each[1] for each in inner if each[0] == "conv"),
        tuple(scale for each, scale in zip(inner, scales, strict=True) if each[0] == "conv"),
        _total([scale for each, scale in zip(inner, scales, strict=True) if each[0] == "input"]),
        shift if len(norms) == 1 else shift.sum(0),
    )


def _normalized_sum(norm: Expression, vectors: Vectors) -> Terms:
    """Return a BatchNorm of anything else."""
    terms = _terms(norm[1], vectors)
    *_, scale, shift = vectors.norms([norm])
    terms = terms.times(scale)
    return terms._replace(shift=_total([terms.shift, shift]))


def _total(vectors: Sequence[Tensor | None]) -> Tensor | None:
    present = [vector for vector in vectors if vector is not None]
    return reduce(operator.add, present) if present else None


@lru_cache(maxsize=1024)
def _split(total: Expression) -> tuple[tuple[list[Expression], ...], tuple[tuple[int, Expression], ...]]:
    """Return the BatchNorms that a sum adds, those of one kind together, and its other terms with their signs."""
    alike: dict[tuple[Any, ...], list[Expression]] = {}
    others: list[tuple[int, Expression]] = []
    for sign, inner in total[1:]:
        kind = kind_of(inner) if sign == 1 else None
        if kind is None:
            others.append((sign, inner))
        else:
            alike.setdefault(kind, []).append(inner)
    return tuple(alike.values()), tuple(others)
