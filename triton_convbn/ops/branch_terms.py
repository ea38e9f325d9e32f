"""Combine the BatchNorms and factors of a sum of branches into a scale for each term, and a bias."""

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .branch_form import Alike, Form, Product
from .reference import arithmetic, as_dtype, power_of_two


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


class Norms(NamedTuple):
    """BatchNorms that are computed together: ``scale * inner + shift``, the inner value without its bias.

    Attributes:
        alike: Which ones.
        inverse: ``rsqrt(running_var + eps)``. This and the others are (C_out,), or a row for each of several.
        mean: The running mean less the convolution's bias.
        scale, shift: As in the formula.
    """

    alike: Alike
    inverse: Tensor
    mean: Tensor
    scale: Tensor
    shift: Tensor

    def rows(self, of_each: Tensor) -> Sequence[Tensor]:
        return (of_each,) if len(self.alike.numbers) == 1 else of_each.unbind()


class Vectors:
    """The vectors of a sum of branches: the scales of its terms and its bias.

    Args:
        form: The sum.
        tensors: What its positions refer to.
        stacks: Compute BatchNorms that are alike as rows of one tensor. A block of MobileOne has six, and one by one
            each takes 5 operations. Under Inductor they fuse, and a stack would be a copy of its rows.

    Stacked, scales and shifts are computed in fp64 and rounded once. The error of a scale is that of a whole channel,
    so it does not average out: in fp32 the gradients of mobileone_s0 have 1.10 times the error of eager's (median), in
    fp64 1.03, in the same time. Under Inductor the output is as exact as eager's in fp32, and fp64 is slower.
    """

    def __init__(self, form: Form, tensors: Sequence[Tensor], stacks: bool = False) -> None:
        self.form, self.tensors = form, tensors
        self.wide = arithmetic(tensors)
        fine = stacks and tensors[form.weights[0]].device.type in ("cpu", "cuda")
        self.fine = torch.float64 if fine else self.wide
        self.norms = [self._compute(alike) for alike in (form.alike if stacks else form.alone)]
        self.scales: dict[int, Tensor] = {}
        for norms in self.norms:
            self.scales.update(zip(norms.alike.numbers, norms.rows(norms.scale), strict=True))

    def read(self, position: int) -> Tensor:
        """Return a tensor in the dtype of the arithmetic."""
        return as_dtype(self.tensors[position], self.wide)

    def _compute(self, alike: Alike) -> Norms:
        bn_weight, bn_bias, mean, var, bias = self._read(alike)
        assert mean is not None
        assert var is not None
        mean = mean if bias is None else as_dtype(mean, self.fine) - bias
        inverse = torch.rsqrt(as_dtype(var, self.fine) + alike.eps)
        scale = inverse if bn_weight is None else bn_weight * inverse
        shift = -mean * scale if bn_bias is None else torch.addcmul(as_dtype(bn_bias, self.fine), mean, scale, value=-1)
        inverse, mean, scale = (as_dtype(each, self.wide) for each in (inverse, mean, scale))
        return Norms(alike, inverse, mean, scale, shift)

    def _read(self, alike: Alike) -> list[Tensor | None]:
        """Return the five vectors of BatchNorms, None for what they do not have. One call stacks all of several."""
        if len(alike.numbers) == 1:
            return [None if positions is None else self.read(positions[0]) for positions in alike.positions]
        every = [self.tensors[position] for positions in alike.positions for position in positions or ()]
        stacked = as_dtype(torch.stack(every), self.wide)
        kinds = iter(stacked.view(-1, len(alike.numbers), stacked.shape[1]).unbind())  # unflatten takes 3 us more
        return [None if positions is None else next(kinds) for positions in alike.positions]

    def product(self, product: Product) -> Tensor | float:
        """Return the value of a product: (C_out,), (1,) or a number."""
        values = [self.scales[number] for number in product.norms]
        values += [self.read(position).reshape(-1) for position in product.factors]
        return times(reduce(operator.mul, values), product.number) if values else product.number

    def _scale(self, product: Product) -> Tensor:
        if (number := product.norm) is not None:
            return self.scales[number]
        value = self.product(product)
        if isinstance(value, Tensor) and product.norms:
            return value
        weight = self.tensors[self.form.weights[0]]
        return torch.ones(weight.shape[0], dtype=self.wide, device=weight.device) * value

    def terms(self) -> Terms:
        """Return the scale of each term."""
        scales = [(weight, self._scale(product)) for weight, product in self.form.terms]
        of_input = [scale for weight, scale in scales if weight is None]
        identity = reduce(operator.add, of_input) if of_input else None
        return Terms(self.form.weights, tuple(scale for weight, scale in scales if weight is not None), identity)

    def shift(self) -> Tensor | None:
        """Return the bias of the sum, (C_out,). None for zeros."""
        found = []
        for norms in self.norms:
            if norms.alike.plain:
                found.append(norms.shift.sum(0) if norms.shift.ndim > 1 else norms.shift)
                continue
            for number, row in zip(norms.alike.numbers, norms.rows(norms.shift), strict=True):
                found.append(times(row, self.product(self.form.norms[number][1])))
        found += [times(self.read(bias), self.product(product)) for bias, product in self.form.biases]
        return reduce(operator.add, found) if found else None


def times(vector: Tensor, by: Tensor | float) -> Tensor:
    """Return the product. By 1 it is the vector itself."""
    return vector if isinstance(by, float) and by == 1 else vector * by


def combine(vectors: Vectors, dtype: torch.dtype | None, prescale: bool = True) -> tuple[Any, ...]:
    """Return the scales of a sum's terms and the merged bias: ``(terms, b')``, or ``(terms / q, b' / q, q)`` for fp16.

    q is (C_out,), fp16, without a gradient: the smallest powers of two with ``sum_k |s_k| / q <= 1/2`` and
    ``|b' / q| <= 1024``. The convolution of every branch is in fp16's range by itself, so the merged one, divided by q,
    is at most half of it. See `reference.prescale`.
    """
    terms, shift = vectors.terms(), vectors.shift()
    dtype = dtype or vectors.tensors[terms.weights[0]].dtype
    shift = torch.zeros_like(terms.scales[0]) if shift is None else shift
    if dtype != torch.float16 or not prescale:
        return terms, as_dtype(shift, dtype)
    with torch.no_grad():
        power = power_of_two(torch.maximum(2 * torch.stack(terms.rows()).abs().sum(0), shift.abs() / 1024))
    inverse = power.to(vectors.wide).reciprocal()  # exact
    return terms.times(inverse), (shift * inverse).to(dtype), power
