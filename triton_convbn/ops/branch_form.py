"""Multiply out a sum of branches, which an expression of nested tuples describes.

Its numbers are positions in a list of tensors:

    ("conv", weight, bias)                  a convolution; bias may be None
    ("input",)                              the input itself
    ("norm", inner, bn_weight, bn_bias, running_mean, running_var, eps)
    ("factor", inner, factor)               times a tensor of one element or one per channel, or a number ``(2.0,)``
    ("sum", (sign, inner), ...)             the sign is 1 or -1
"""

from functools import lru_cache
from typing import Any, NamedTuple

Expression = tuple[Any, ...]


class Product(NamedTuple):
    """A product of a number, the scales of BatchNorms, and tensors of factors.

    Attributes:
        norms: Numbers of `Form.norms`.
        factors: Positions.
    """

    number: float = 1.0
    norms: tuple[int, ...] = ()
    factors: tuple[int, ...] = ()

    @property
    def norm(self) -> int | None:
        """Return the number of the BatchNorm whose scale is the product, if it is that alone."""
        alone = len(self.norms) == 1 and self.number == 1 and not self.factors
        return self.norms[0] if alone else None


ONE = Product()


class Norm(NamedTuple):
    """A BatchNorm, ``scale * (inner + bias - running_mean) + bn_bias``, all positions but eps.

    Attributes:
        bias: That of the convolution which it follows, if any.
    """

    bn_weight: int | None
    bn_bias: int | None
    running_mean: int
    running_var: int
    bias: int | None
    eps: float


class Form:
    """A sum of branches as ``sum_k p_k * conv(x, W_k) + p_0 * x + shift``, where every p is a `Product`.

    Attributes:
        terms: The position of each weight and its product. The input has None for the weight.
        norms: All BatchNorms, each with the product that its output is multiplied by.
        biases: The position of each bias that no BatchNorm follows, and its product.
        weights: The position of each convolution's weight.
        order: The numbers of the BatchNorms in the order of the terms, the input's last, if every term ends in its own.
            None if something else adds to the sum or multiplies it.
    """

    def __init__(self, expression: Expression) -> None:
        self.terms: list[tuple[int | None, Product]] = []
        self.norms: list[tuple[Norm, Product]] = []
        self.biases: list[tuple[int, Product]] = []
        self._add(expression, ONE)
        # No cached_property: Dynamo cannot enter its lock (torch 2.14).
        self.weights = tuple(weight for weight, _ in self.terms if weight is not None)
        self.order = self._order()

    def _add(self, expression: Expression, product: Product) -> None:
        kind, *rest = expression
        if kind == "conv":
            weight, bias = rest
            self.terms.append((weight, product))
            if bias is not None:
                self.biases.append((bias, product))
        elif kind == "input":
            self.terms.append((None, product))
        elif kind == "norm":
            inner, bn_weight, bn_bias, mean, var, eps = rest
            bias = inner[2] if inner[0] == "conv" else None
            if bias is not None:
                inner = ("conv", inner[1], None)
            self.norms.append((Norm(bn_weight, bn_bias, mean, var, bias, eps), product))
            self._add(inner, product._replace(norms=(*product.norms, len(self.norms) - 1)))
        elif kind == "factor":
            inner, factor = rest
            if isinstance(factor, int):
                product = product._replace(factors=(*product.factors, factor))
            else:
                product = product._replace(number=product.number * factor[0])
            self._add(inner, product)
        elif kind == "sum":
            for sign, inner in rest:
                self._add(inner, product._replace(number=product.number * sign))
        else:
            raise ValueError(f"fold_branches: {kind!r} is no kind of expression")

    def _order(self) -> tuple[int, ...] | None:
        of_weights = [product.norm for weight, product in self.terms if weight is not None]
        of_input = [product.norm for weight, product in self.terms if weight is None]
        numbers = [number for number in (*of_weights, *of_input) if number is not None]
        plain = not self.biases and all(product == ONE for _, product in self.norms) and len(of_input) <= 1
        return tuple(numbers) if plain and len(set(numbers)) == len(self.terms) == len(self.norms) else None


@lru_cache(maxsize=1024)
def form_of(expression: Expression) -> Form:
    """Return the expression multiplied out. Raises: ValueError for an expression of another kind."""
    return Form(expression)
