"""Differentiate the vectors of a sum of branches by formula: the gradients of its BatchNorms, biases and factors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .branch_form import Product
from .branch_terms import Norms, Vectors, times
from .reference import as_dtype


def gradients(
    vectors: Vectors, flags: Sequence[bool], of_rows: Sequence[Tensor | None], of_bias: Tensor | None
) -> list[Tensor | None]:
    """Return the gradient of each tensor but the weights, None where not needed.

    Args:
        flags: Which tensors need a gradient.
        of_rows: The gradients of `Terms.rows`, None where not needed.
        of_bias: The gradient of the sum's bias, (C_out,), or None if it is not needed.

    A term is multiplied by a product p of scales and factors. Its gradient g gives each of them ``g * p'``, where p' is
    the product of the others. A BatchNorm's shift is ``bn_bias - mean * scale``, so with the gradient h of the shift:

        d(bn_bias) = h    d(scale) += -h * mean    d(bias) = h * scale    d(bn_weight) = d(scale) * rsqrt(var + eps)
    """
    return _Gradients(vectors, flags).all(of_rows, of_bias)


class _Gradients:
    def __init__(self, vectors: Vectors, flags: Sequence[bool]) -> None:
        self.vectors, self.flags = vectors, flags
        self.found: list[Tensor | None] = [None] * len(vectors.tensors)
        self.of_scales: dict[int, Tensor] = {}  # by number of the BatchNorm

    def all(self, of_rows: Sequence[Tensor | None], of_bias: Tensor | None) -> list[Tensor | None]:
        form = self.vectors.form
        of_weights = iter(of_rows)
        for weight, product in form.terms:
            of_term = of_rows[-1] if weight is None else next(of_weights)
            if of_term is None:
                continue
            if (number := product.norm) is not None and number not in self.of_scales:
                self.of_scales[number] = of_term
            else:
                self._spread(of_term, product)
        if of_bias is not None:
            for position, product in form.biases:
                self._add(position, times(of_bias, self.vectors.product(product)))
                self._spread(of_bias * self.vectors.read(position), product)
            for norms in self.vectors.norms:
                if norms.alike.plain:
                    continue
                for number, shift in zip(norms.alike.numbers, norms.rows(norms.shift), strict=True):
                    self._spread(of_bias * shift, form.norms[number][1])
        for norms in self.vectors.norms:
            self._of_norms(norms, of_bias)
        return self.found

    def _add(self, position: int, grad: Tensor) -> None:
        if not self.flags[position]:
            return
        grad, before = as_dtype(grad, self.vectors.tensors[position].dtype), self.found[position]
        self.found[position] = grad if before is None else before + grad

    def _spread(self, grad: Tensor, product: Product) -> None:
        """Add the gradient of a vector times a product, multiplied by that vector, to the factors of the product."""
        norms, factors = product.norms, product.factors
        for index, number in enumerate(norms):
            others = product._replace(norms=norms[:index] + norms[index + 1 :])
            own, before = times(grad, self.vectors.product(others)), self.of_scales.get(number)
            self.of_scales[number] = own if before is None else before + own
        for index, position in enumerate(factors):
            if self.flags[position]:
                others = product._replace(factors=factors[:index] + factors[index + 1 :])
                own = grad * self.vectors.product(others)  # by 1 too: two factors of x would share the memory of grad
                shape = self.vectors.tensors[position].shape
                self._add(position, (own if own.numel() == shape.numel() else own.sum()).reshape(shape))

    def _of_norms(self, norms: Norms, of_bias: Tensor | None) -> None:
        numbers, (bn_weights, bn_biases, _, _, biases), _, plain = norms.alike
        of_shift = None
        if of_bias is not None:
            if plain:
                of_shift = of_bias if len(numbers) == 1 else of_bias.expand(len(numbers), -1)
            else:
                products = [self.vectors.form.norms[number][1] for number in numbers]
                of_shift = _rows([times(of_bias, self.vectors.product(product)) for product in products])
            if self._train(bn_biases):
                self._add_rows(norms, bn_biases, of_shift.contiguous())  # expanded, the gradients would share memory
            if self._train(biases):
                self._add_rows(norms, biases, of_shift * norms.scale)
        if self._train(bn_weights):
            of_scale = _rows([self.of_scales[number] for number in numbers])
            if of_shift is not None:
                of_scale = torch.addcmul(of_scale, of_shift, norms.mean, value=-1)
            self._add_rows(norms, bn_weights, of_scale * norms.inverse)

    def _train(self, positions: Sequence[int] | None) -> bool:
        return positions is not None and any(self.flags[position] for position in positions)

    def _add_rows(self, norms: Norms, positions: Sequence[int] | None, grads: Tensor) -> None:
        for position, grad in zip(positions or (), norms.rows(grads), strict=True):
            self._add(position, grad)


def _rows(vectors: list[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.stack(vectors)
