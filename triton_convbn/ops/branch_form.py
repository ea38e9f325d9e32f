"""Multiply out a sum of branches, which an expression of nested tuples describes.

Its numbers are positions in a list of tensors:

    ("conv", weight, bias)                  a convolution; bias may be None
    ("input",)                              the input itself
    ("norm", inner, bn_weight, bn_bias, running_mean, running_var, eps)
    ("factor", inner, factor)               times a tensor of one element or one per channel, or a number ``(2.0,)``
    ("sum", (sign, inner), ...)             the sign is 1 or -1
"""

from collections.abc import Sequence
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


class Alike(NamedTuple):
    """BatchNorms that have the same vectors and the same eps.

    Attributes:
        vectors: The positions of all bn_weights, bn_biases, running_means, running_vars, and biases of convolutions.
            None for what they do not have.
    """

    vectors: tuple[tuple[int, ...] | None, ...]
    eps: float

    @classmethod
    def of(cls, norms: Sequence[Norm]) -> "Alike | None":
        """Return the BatchNorms, or None if they are not alike."""
        if len({(norm.eps, *(each is None for each in norm)) for norm in norms}) != 1:
            return None
        *vectors, _ = (None if each[0] is None else each for each in zip(*norms, strict=True))
        return cls(tuple(vectors), norms[0].eps)

    def read(self, values: Sequence[Any]) -> Any:
        """Return lists of the values at the positions."""
        return tuple(None if own is None else [values[position] for position in own] for own in self.vectors)


class Composition(NamedTuple):
    """What a sum consists of, if every weight has a BatchNorm of its own, and the input any number of them.

    Attributes:
        weights: The number of weights. The first BatchNorms are theirs, the others the input's.
        signs: The number that the output of each BatchNorm is multiplied by.
        own: The number that the input without a BatchNorm is multiplied by. None if it is no term.
        has_factor: A tensor multiplies the output of every BatchNorm.
    """

    weights: int
    signs: tuple[float, ...]
    own: float | None = None
    has_factor: bool = False

    @property
    def terms(self) -> int:
        """Return the number of weights, and one more if the input is a term."""
        return self.weights + (len(self.signs) > self.weights or self.own is not None)


class Composed(NamedTuple):
    """A sum that a `Composition` describes.

    Attributes:
        composition: What it consists of.
        norms: Its BatchNorms, in that order.
        factor: The position of its factor, if it has one.
    """

    composition: Composition
    norms: Alike
    factor: int | None = None


class Form:
    """A sum of branches as ``sum_k p_k * conv(x, W_k) + p_0 * x + shift``, where every p is a `Product`.

    Attributes:
        terms: The position of each weight and its product. The input has None for the weight.
        norms: All BatchNorms, each with the product that its output is multiplied by.
        biases: The position of each bias that no BatchNorm follows, and its product.
        weights: The position of each convolution's weight.
        composed: The sum as a `Composition`. None if it is another sum, or if its BatchNorms are not alike.
    """

    def __init__(self, expression: Expression) -> None:
        self.terms: list[tuple[int | None, Product]] = []
        self.norms: list[tuple[Norm, Product]] = []
        self.biases: list[tuple[int, Product]] = []
        self._add(expression, ONE)
        # No cached_property: Dynamo cannot enter its lock (torch 2.14).
        self.weights = tuple(weight for weight, _ in self.terms if weight is not None)
        self.composed = self._compose()

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

    def _compose(self) -> Composed | None:
        of_weights = [product for weight, product in self.terms if weight is not None]
        of_input = [product for weight, product in self.terms if weight is None]
        own = [product.number for product in of_input if not (product.norms or product.factors)]
        products = [*of_weights, *(product for product in of_input if product.norms)]
        numbers = tuple(number for product in products for number in product.norms)
        factors = {product.factors for product in products}
        if (
            self.biases
            or len(products) + len(own) < len(self.terms)
            or any(len(product.norms) != 1 for product in products)
            or not len(set(numbers)) == len(products) == len(self.norms)
            or any(self.norms[product.norms[0]][1] != product._replace(norms=()) for product in products)
            or len(factors) != 1
            or len(*factors) > 1
        ):
            return None
        signs = tuple(product.number for product in products)
        alike = Alike.of([self.norms[number][0] for number in numbers])
        composition = Composition(len(of_weights), signs, sum(own) if own else None, factors != {()})
        return None if alike is None else Composed(composition, alike, next(iter(*factors), None))


@lru_cache(maxsize=1024)
def form_of(expression: Expression) -> Form:
    """Return the expression multiplied out. Raises: ValueError for an expression of another kind."""
    return Form(expression)
