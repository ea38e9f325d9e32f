"""Combine the BatchNorms and factors of a sum of branches into a scale for each term, and a bias."""

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .branch_form import Alike, Composition, Form, Norm, Product
from .branch_norms import precise, scale_and_shift, scales_of_sums
from .fp16_range import power_of_two
from .reference import arithmetic, as_dtype


class Terms(NamedTuple):
    """A sum as ``sum_k scale_k * conv(x, weight_k) + identity * x``.

    Attributes:
        weights: The position of each weight.
        scales: The scale of each weight, (C_out,).
        identity: The scale of the input, (C_out,), or None if the input is no term.
    """

    weights: tuple[int, ...]
    scales: tuple[Tensor, ...]
    identity: Tensor | None

    def rows(self) -> tuple[Tensor, ...]:
        """Return all scales, that of the input last."""
        return self.scales if self.identity is None else (*self.scales, self.identity)

    def times(self, factor: Tensor) -> "Terms":
        identity = None if self.identity is None else self.identity * factor
        return Terms(self.weights, tuple(scale * factor for scale in self.scales), identity)


class Vectors:
    """The vectors of a sum of branches: the scales of its terms and its bias. Differentiable.

    Args:
        form: The sum.
        tensors: What its positions refer to.
        compiled: See `branch_norms.precise`.
    """

    def __init__(self, form: Form, tensors: Sequence[Tensor], compiled: bool = True) -> None:
        self.form, self.tensors = form, tensors
        self.wide = precise(tensors[form.weights[0]], arithmetic(tensors), compiled)
        self._reads: dict[int, Tensor] = {}
        norms = [norm for norm, _ in form.norms]
        alike = None if compiled else Alike.of(norms)
        if alike is not None:  # nothing compiles: fewer calls are faster
            alone = [Composition(1, (1.0,))] * len(norms)
            found = scales_of_sums(alike.read(tensors), (), alike.eps, alone, self.wide)
            self.scales, self.shifts = [scale.view(-1) for scale in found[: len(norms)]], list(found[len(norms) :])
        else:
            each = [self._one(norm) for norm in norms]
            self.scales, self.shifts = [scale for scale, _ in each], [shift for _, shift in each]

    def _one(self, norm: Norm) -> tuple[Tensor, Tensor]:
        bn_weight, bn_bias, bias = (
            None if each is None else self.read(each) for each in (norm.bn_weight, norm.bn_bias, norm.bias)
        )
        mean = self.read(norm.running_mean)
        mean = mean if bias is None else mean - bias
        return scale_and_shift(bn_weight, bn_bias, mean, torch.rsqrt(self.read(norm.running_var) + norm.eps))

    def read(self, position: int) -> Tensor:
        """Return a tensor in the dtype of the vectors."""
        if position not in self._reads:
            self._reads[position] = as_dtype(self.tensors[position], self.wide)
        return self._reads[position]

    def product(self, product: Product) -> Tensor | float:
        """Return the value of a product: (C_out,), (1,) or a number."""
        values = [self.scales[number] for number in product.norms]
        values += [self.read(position).reshape(-1) for position in product.factors]
        return _times(reduce(operator.mul, values), product.number) if values else product.number

    def _scale(self, product: Product) -> Tensor:
        value, weight = self.product(product), self.tensors[self.form.weights[0]]
        if isinstance(value, Tensor) and product.norms:
            return value
        # The product also keeps the gradients of two factors apart, which would be views of one tensor.
        return torch.ones(weight.shape[:1], dtype=self.wide, device=weight.device) * value

    def terms(self) -> Terms:
        """Return the scale of each term."""
        scales = [(weight, self._scale(product)) for weight, product in self.form.terms]
        of_input = [scale for weight, scale in scales if weight is None]
        identity = reduce(operator.add, of_input) if of_input else None
        return Terms(self.form.weights, tuple(scale for weight, scale in scales if weight is not None), identity)

    def shift(self) -> Tensor | None:
        """Return the bias of the sum, (C_out,). None for zeros."""
        shifts = zip(self.shifts, self.form.norms, strict=True)
        found = [_times(shift, self.product(product)) for shift, (_, product) in shifts]
        found += [_times(self.read(bias), self.product(product)) for bias, product in self.form.biases]
        return reduce(operator.add, found) if found else None


def _times(vector: Tensor, by: Tensor | float) -> Tensor:
    """Return the product. By 1 it is the vector itself."""
    return vector if isinstance(by, float) and by == 1 else vector * by


def combine(vectors: Vectors, dtype: torch.dtype | None, prescale: bool = True) -> tuple[Any, ...]:
    """Return the scales of a sum's terms and the merged bias: ``(terms, b')``, or ``(terms / q, b' / q, q)`` for fp16.

    q is that of `power_for`.
    """
    terms, shift = vectors.terms(), vectors.shift()
    dtype = dtype or vectors.tensors[terms.weights[0]].dtype
    shift = torch.zeros_like(terms.scales[0]) if shift is None else shift
    if dtype != torch.float16 or not prescale:
        return terms, as_dtype(shift, dtype)
    power = power_for(torch.stack(terms.rows()), shift)
    inverse = power.to(vectors.wide).reciprocal()  # exact
    return terms.times(inverse), (shift * inverse).to(dtype), power


def power_for(scales: Tensor, bias: Tensor) -> Tensor:
    """Return what to divide a merged fp16 convolution by: q, (C_out,), fp16, without a gradient.

    q are the smallest powers of two with ``sum_k |s_k| / q <= 1/2`` and ``|b' / q| <= 1024``. The convolution of every
    branch is in fp16's range by itself, so the merged one, divided by q, is at most half of it. See
    `fp16_range.prescale`.

    Args:
        scales: ``(n, C_out)``.
        bias: (C_out,).
    """
    with torch.no_grad():
        return power_of_two(torch.maximum(2 * scales.abs().sum(0), bias.abs() / 1024))
