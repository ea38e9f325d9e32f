"""Combine the BatchNorms and factors of a sum of branches into a scale for each term, and a bias."""

import operator
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .branch_form import Alike, Form, Product
from .branch_norms import Norms, differentiable_norm, norms_at_once, restored
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


class Vectors:
    """The vectors of a sum of branches: the scales of its terms and its bias.

    Args:
        form: The sum.
        tensors: What its positions refer to.
        stacks: Compute BatchNorms that are alike as rows of one tensor, in place. A block of MobileOne has six, and one
            by one each takes 5 operations. Under Inductor they fuse, and a stack would be a copy of its rows.
        restored: What `saved` has returned for the same sum. Nothing is computed then.
    """

    def __init__(
        self, form: Form, tensors: Sequence[Tensor], stacks: bool = False, restored: Sequence[Tensor] | None = None
    ) -> None:
        self.form, self.tensors = form, tensors
        self.wide = arithmetic(tensors)
        if restored is not None:
            of_each = iter(restored)
            self.norms = [self._restored(alike, of_each) for alike in form.alike]
        else:
            compute = norms_at_once if stacks else differentiable_norm
            self.norms = [compute(alike, tensors, self.wide) for alike in (form.alike if stacks else form.alone)]
        self.scales: dict[int, Tensor] = {}
        for norms in self.norms:
            self.scales.update(zip(norms.alike.numbers, norms.rows(norms.scale), strict=True))

    def saved(self) -> list[Tensor]:
        """Return what backward needs, 16 bytes a channel of a BatchNorm. It takes some 15 operations to compute."""
        every = [tensor for norms in self.norms for tensor in (norms.stack, None if norms.alike.plain else norms.shift)]
        return [tensor for tensor in every if tensor is not None]

    def _restored(self, alike: Alike, saved: Iterator[Tensor]) -> Norms:
        sizes = tuple(self.tensors[position].shape[0] for position in alike.positions[2] or ())
        return restored(alike, sizes, next(saved), None if alike.plain else next(saved))

    def read(self, position: int) -> Tensor:
        """Return a tensor in the dtype of the arithmetic."""
        return as_dtype(self.tensors[position], self.wide)

    def product(self, product: Product) -> Tensor | float:
        """Return the value of a product: (C_out,), (1,) or a number."""
        values = [self.scales[number] for number in product.norms]
        values += [self.read(position).reshape(-1) for position in product.factors]
        return times(reduce(operator.mul, values), product.number) if values else product.number

    def _scale(self, product: Product) -> Tensor:
        if (number := product.norm) is not None:
            return self.scales[number]
        channels = self.tensors[self.form.weights[0]].shape[:1]
        if (position := product.factor) is not None and self.tensors[position].shape == channels:
            return self.read(position)
        value = self.product(product)
        if isinstance(value, Tensor) and product.norms:
            return value
        return torch.ones(channels, dtype=self.wide, device=self.tensors[self.form.weights[0]].device) * value

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
            assert norms.shift is not None
            if norms.alike.plain:
                found.append(total(norms.shift, len(norms.sizes)))
                continue
            for number, row in zip(norms.alike.numbers, norms.rows(norms.shift), strict=True):
                found.append(times(row, self.product(self.form.norms[number][1])))
        found += [times(self.read(bias), self.product(product)) for bias, product in self.form.biases]
        return reduce(operator.add, found) if found else None


def total(shift: Tensor, number: int) -> Tensor:
    """Return the sum of vectors that follow each other."""
    return shift if number == 1 else shift.view(number, -1).sum(0)


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
