"""Fold a sum of branches that read one input into the weight and bias of a single convolution.

A branch is a convolution, the input itself, or one of these behind BatchNorms in eval mode and factors per channel. All
of it is linear in the weights, so the sum is one convolution ("RepVGG", arXiv 2101.03697, section 3.3):

    sum_k s_k * conv(x, W_k, b_k) + s_0 * x  =  conv(x, sum_k embed(s_k * W_k) + diag(s_0), b')

`embed` places a smaller kernel in the middle of the largest. `diag` is the kernel of the identity: at the centre, 1
where the input channel is the output channel.

A sum is described by an expression of nested tuples. Its numbers are positions in a list of tensors:

    ("conv", weight, bias)                  a convolution; bias may be None
    ("input",)                              the input itself
    ("norm", inner, bn_weight, bn_bias, running_mean, running_var, eps)
    ("factor", inner, factor)               times a tensor of one element or one per channel, or a number ``(2.0,)``
    ("sum", (sign, inner), ...)             the sign is 1 or -1

It is computed in two steps. `combine` computes the vectors s_k, s_0 and b', which are small. Then every weight is
read once and the sum is written once: by a generated kernel, or by `merge_reference.merged`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .merge_library import merge_op
from .merge_plan import PackedSums
from .merge_reference import merged
from .reference import FLOATING, arithmetic, power_of_two

Expression = tuple[Any, ...]


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


def fold_branches(
    tensors: Sequence[Tensor],
    expression: Expression,
    kernel: tuple[int, ...],
    groups: int = 1,
    dtype: torch.dtype | None = None,
    prescale: bool = True,
    kernel_merges: bool = False,
) -> tuple[Tensor, ...]:
    """Return the weight and bias of the convolution that a sum of branches is. Differentiable.

    Args:
        tensors: What the expression refers to: weights ``(C_out, C_in / groups, *kernel_k)``, vectors ``(C_out,)``,
            and factors.
        expression: See the module's docstring.
        kernel: The sizes of the merged kernel, those of the largest branch.
        groups: Groups of every convolution.
        dtype: The dtype of W' and b'. None: that of the first weight.
        prescale: Keep fp16 in range. False if the caller reads W' and b'.
        kernel_merges: Merge the weights by the operator `triton_convbn::merge`, which launches a generated kernel.

    Returns:
        ``(W', b')`` of shapes ``(C_out, C_in / groups, *kernel)`` and ``(C_out,)``, or ``(W' / q, b' / q, q)`` if they
        are fp16, see `combine`. The arithmetic is in fp32, or in fp64 if a tensor is fp64, and is rounded once.

    Source: arXiv 2101.03697, section 3.3.
    """
    if has_torch_function(tensors):
        arguments = tensors, expression, kernel, groups, dtype, prescale, kernel_merges
        return handle_torch_function(fold_branches, tensors, *arguments)
    terms, bias, *power = combine(tensors, expression, dtype, prescale)
    if kernel_merges:
        (weight,) = merge_op(*packed(terms, tensors, bias.dtype))
    else:
        weights = [tensors[position] for position in terms.weights]
        weight = merged(weights, terms.scales, terms.identity, kernel, groups).to(bias.dtype)
    return (weight, bias, *power)


def packed(terms: Terms, tensors: Sequence[Tensor], dtype: torch.dtype) -> PackedSums:
    """Return a sum as the arguments of `triton_convbn::merge`, with the dtype of the merged weight."""
    rows = terms.scales if terms.identity is None else (*terms.scales, terms.identity)
    weights = [tensors[position] for position in terms.weights]
    return PackedSums(weights, [torch.stack(rows)], [len(weights)], [FLOATING.index(dtype)])


def combine(
    tensors: Sequence[Tensor], expression: Expression, dtype: torch.dtype | None, prescale: bool = True
) -> tuple[Any, ...]:
    """Return the scales of a sum's terms and the merged bias: ``(terms, b')``, or ``(terms / q, b' / q, q)`` for fp16.

    q is (C_out,), fp16, without a gradient: the smallest powers of two with ``sum_k |s_k| / q <= 1/2`` and
    ``|b' / q| <= 1024``. The convolution of every branch is in fp16's range by itself, so the merged one, divided by q,
    is at most half of it. See `reference.prescale`.
    """
    wide = arithmetic(tensors)
    terms = _terms(expression, tensors, _Norms(expression, tensors, wide))
    weight = tensors[terms.weights[0]]
    dtype = dtype or weight.dtype
    shift = torch.zeros_like(terms.scales[0]) if terms.shift is None else terms.shift
    if dtype != torch.float16 or not prescale:
        return terms, shift.to(dtype)
    with torch.no_grad():
        scales = terms.scales if terms.identity is None else (*terms.scales, terms.identity)
        power = power_of_two(torch.maximum(2 * torch.stack(scales).abs().sum(0), shift.abs() / 1024))
    inverse = power.to(shift.dtype).reciprocal()  # exact
    return terms.times(inverse), (shift * inverse).to(dtype), power


class _Norms:
    """Scale and shift of the BatchNorms that follow a convolution or the input, computed together.

    A block of MobileOne has six. One by one they take 8 operations each.
    """

    def __init__(self, expression: Expression, tensors: Sequence[Tensor], wide: torch.dtype) -> None:
        self.tensors, self.wide = tensors, wide
        weight = tensors[weights_of(expression)[0]]
        self.ones = torch.ones(weight.shape[0], dtype=wide, device=weight.device)
        self.rows: dict[Expression, tuple[Tensor, Tensor]] = {}
        by_kind: dict[tuple[Any, ...], list[Expression]] = {}
        for norm in _innermost(expression):
            _, inner, bn_weight, bn_bias, _, _, eps = norm
            bias = inner[2] if inner[0] == "conv" else None
            by_kind.setdefault((bias is None, bn_weight is None, bn_bias is None, eps), []).append(norm)
        for norms in by_kind.values():
            self.rows |= dict(zip(norms, zip(*map(torch.unbind, self._computed(norms)), strict=True), strict=True))

    def _computed(self, norms: Sequence[Expression]) -> tuple[Tensor, Tensor]:
        """Return the scales and the shifts of BatchNorms of one kind, one row each."""
        _, inner, bn_weights, bn_biases, means, variances, eps = zip(*norms, strict=True)
        scale = torch.rsqrt(self._stacked(variances) + eps[0])
        if bn_weights[0] is not None:
            scale = self._stacked(bn_weights) * scale
        shift = -self._stacked(means)
        if inner[0][0] == "conv" and inner[0][2] is not None:
            shift = self._stacked([each[2] for each in inner]) + shift
        shift = shift * scale
        return scale, shift if bn_biases[0] is None else shift + self._stacked(bn_biases)

    def _stacked(self, positions: Sequence[int]) -> Tensor:
        return torch.stack([self.tensors[position] for position in positions]).to(self.wide)

    def of(self, norm: Expression) -> tuple[Tensor, Tensor]:
        """Return scale and shift of a BatchNorm: ``norm(inner) = scale * inner + shift``, inner without its bias."""
        if norm not in self.rows:
            scales, shifts = self._computed([norm])
            self.rows[norm] = scales[0], shifts[0]
        return self.rows[norm]


@lru_cache(maxsize=1024)
def _innermost(expression: Expression) -> dict[Expression, None]:
    """Return the BatchNorms that follow a convolution or the input, in order."""
    kind, *rest = expression
    if kind == "norm" and rest[0][0] in ("conv", "input"):
        return {expression: None}
    inner = [each for _, each in rest] if kind == "sum" else rest[:1] if kind in ("norm", "factor") else []
    found: dict[Expression, None] = {}
    for each in inner:
        found |= _innermost(each)
    return found


def _terms(expression: Expression, tensors: Sequence[Tensor], norms: _Norms) -> Terms:
    """Return the sum that an expression describes."""
    kind, *rest = expression
    if kind == "conv":
        weight, bias = rest
        return Terms((weight,), (norms.ones,), None, None if bias is None else tensors[bias].to(norms.wide))
    if kind == "input":
        return Terms((), (), norms.ones, None)
    if kind == "norm":
        scale, shift = norms.of(expression)
        inner = rest[0]
        if inner[0] == "conv":  # its bias is part of the shift
            return Terms((inner[1],), (scale,), None, shift)
        terms = _terms(inner, tensors, norms).times(scale)
        return terms._replace(shift=_total([terms.shift, shift]))
    if kind == "factor":
        inner, factor = rest
        by = tensors[factor].to(norms.wide).reshape(-1) if isinstance(factor, int) else factor[0]
        return _terms(inner, tensors, norms).times(by)
    if kind != "sum":
        raise ValueError(f"fold_branches: {kind!r} is no kind of expression")
    every = [_terms(inner, tensors, norms) for _, inner in rest]
    every = [each if sign == 1 else each.times(-1.0) for each, (sign, _) in zip(every, rest, strict=True)]
    return Terms(
        tuple(weight for each in every for weight in each.weights),
        tuple(scale for each in every for scale in each.scales),
        _total([each.identity for each in every]),
        _total([each.shift for each in every]),
    )


def _total(vectors: Sequence[Tensor | None]) -> Tensor | None:
    present = [vector for vector in vectors if vector is not None]
    return torch.stack(present).sum(0) if len(present) > 1 else next(iter(present), None)


@lru_cache(maxsize=1024)
def weights_of(expression: Expression) -> tuple[int, ...]:
    """Return the position of each convolution's weight, in order."""
    kind, *rest = expression
    if kind == "conv":
        return (rest[0],)
    inner = [each for _, each in rest] if kind == "sum" else rest[:1] if kind in ("norm", "factor") else []
    return tuple(position for each in inner for position in weights_of(each))
