"""Differentiate the vectors of a sum of branches by formula: the gradients of its BatchNorms, biases and factors."""

from collections.abc import Sequence

from torch import Tensor

from .branch_form import Product
from .branch_norms import Norms, gradients_of_norms
from .branch_terms import Vectors, times
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
    the product of the others. See `branch_norms` for what a BatchNorm makes of those of its scale and shift.
    """
    return _Gradients(vectors, flags).all(of_rows, of_bias)


class _Gradients:
    def __init__(self, vectors: Vectors, flags: Sequence[bool]) -> None:
        self.vectors, self.flags = vectors, flags
        self.found: list[Tensor | None] = [None] * len(vectors.tensors)
        self.of_scales: dict[int, Tensor] = {}  # by number of the BatchNorm
        self.given: set[int] = set()  # what is a parameter's gradient already, and so no other's

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
                assert norms.shift is not None
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
        if not norms and not any(self.flags[position] for position in factors):
            return
        for index, number in enumerate(norms):
            others = product._replace(norms=norms[:index] + norms[index + 1 :])
            own, before = times(grad, self.vectors.product(others)), self.of_scales.get(number)
            self.of_scales[number] = own if before is None else before + own
        for index, position in enumerate(factors):
            if self.flags[position]:
                own, shape = grad, self.vectors.tensors[position].shape
                if product.factor is None:
                    others = product._replace(factors=factors[:index] + factors[index + 1 :])
                    own = times(grad, self.vectors.product(others))
                if own is grad:
                    own = grad.clone() if id(grad) in self.given else grad
                    self.given.add(id(grad))
                if own.shape != shape:
                    own = (own if own.numel() == shape.numel() else own.sum()).reshape(shape)
                self._add(position, own)

    def _of_norms(self, norms: Norms, of_bias: Tensor | None) -> None:
        numbers, plain = norms.alike.numbers, norms.alike.plain
        of_shifts: list[Tensor] | None = None
        if of_bias is not None:
            products = [self.vectors.form.norms[number][1] for number in numbers]
            of_shifts = [of_bias if plain else times(of_bias, self.vectors.product(product)) for product in products]
        of_scales = [self.of_scales[number] for number in numbers] if numbers[0] in self.of_scales else None
        for position, grad in gradients_of_norms(norms, self.flags, of_scales, of_shifts):
            self._add(position, grad)
