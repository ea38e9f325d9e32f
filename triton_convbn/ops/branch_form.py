"""Multiply out a sum of branches, which an expression of nested tuples describes.

Its numbers are positions in a list of tensors:

    ("conv", weight, bias)                  a convolution; bias may be None
    ("input",)                              the input itself
    ("bias", bias)                          a number per channel
    ("norm", inner, bn_weight, bn_bias, running_mean, running_var, eps)
    ("factor", inner, factor)               times a tensor of one element or one per channel, or a number ``(2.0,)``
    ("sum", (sign, inner), ...)             the sign is 1 or -1
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
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
        """The number of the BatchNorm whose scale is the product, if it is that alone."""
        alone = len(self.norms) == 1 and self.number == 1 and not self.factors
        return self.norms[0] if alone else None

    @property
    def factor(self) -> int | None:
        """The position of the factor that is the product, if it is that alone."""
        alone = len(self.factors) == 1 and self.number == 1 and not self.norms
        return self.factors[0] if alone else None


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
    """BatchNorms that are computed together.

    Attributes:
        numbers: Those of `Form.norms`.
        positions: Those of bn_weight, bn_bias, running_mean, running_var and bias, one for each BatchNorm. None for
            what they do not have.
        eps: That of all.
        plain: Whether the product of each is 1.
    """

    numbers: tuple[int, ...]
    positions: tuple[tuple[int, ...] | None, ...]
    eps: float
    plain: bool


class Form:
    """A sum of branches as ``sum_k p_k * conv(x, W_k) + p_0 * x + shift``, where every p is a `Product`.

    Attributes:
        terms: The position of each weight and its product. The input has None for the weight.
        norms: All BatchNorms, each with the product that its output is multiplied by.
        biases: The position of each bias that no BatchNorm follows, and its product.
    """

    def __init__(self, expression: Expression) -> None:
        self.expression = expression
        self.terms: list[tuple[int | None, Product]] = []
        self.norms: list[tuple[Norm, Product]] = []
        self.biases: list[tuple[int, Product]] = []
        self._add(expression, ONE)

    def _add(self, expression: Expression, product: Product) -> None:
        kind, *rest = expression
        if kind == "conv":
            weight, bias = rest
            self.terms.append((weight, product))
            if bias is not None:
                self.biases.append((bias, product))
        elif kind == "input":
            self.terms.append((None, product))
        elif kind == "bias":
            self.biases.append((rest[0], product))
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

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """The position of each convolution's weight."""
        return tuple(weight for weight, _ in self.terms if weight is not None)

    @cached_property
    def statistics(self) -> tuple[int, ...]:
        """The positions of the running means and variances."""
        return tuple(position for norm, _ in self.norms for position in (norm.running_mean, norm.running_var))

    def trains(self, flags: Sequence[bool]) -> tuple[bool, bool]:
        """Return whether the scales, and whether the bias of the sum need a gradient, given which positions do."""
        scales = any(norm.bn_weight is not None and flags[norm.bn_weight] for norm, _ in self.norms)
        bias = scales or any(
            position is not None and flags[position] for norm, _ in self.norms for position in (norm.bn_bias, norm.bias)
        )
        bias = bias or any(flags[position] for position, _ in self.biases)
        scales = scales or any(flags[factor] for _, product in self.terms for factor in product.factors)
        inner = (product for _, product in (*self.norms, *self.biases))
        return scales, bias or any(flags[factor] for product in inner for factor in product.factors)

    @cached_property
    def alike(self) -> tuple[Alike, ...]:
        """All BatchNorms, those together that can be computed together."""
        return together(self.norms)

    @cached_property
    def alone(self) -> tuple[Alike, ...]:
        """All BatchNorms, each by itself."""
        return tuple(_group(self.norms, [number]) for number in range(len(self.norms)))

    @cached_property
    def is_plain(self) -> bool:
        """Whether every BatchNorm ends a branch: nothing but the sum follows it, and its scale is all of a product."""
        terms = all(product == ONE or product.norm is not None for _, product in self.terms)
        return terms and bool(self.norms) and all(product == ONE for _, product in self.norms)


def together(norms: Sequence[tuple[Norm, Product]]) -> tuple[Alike, ...]:
    """Return all BatchNorms, those together that can be computed together. They are numbered in this order."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for number, (norm, _) in enumerate(norms):
        key = norm.bias is None, norm.bn_weight is None, norm.bn_bias is None, norm.eps
        found.setdefault(key, []).append(number)
    return tuple(_group(norms, numbers) for numbers in found.values())


def _group(norms: Sequence[tuple[Norm, Product]], numbers: Sequence[int]) -> Alike:
    own, products = zip(*(norms[number] for number in numbers), strict=True)
    *kinds, eps = zip(*own, strict=True)
    plain = all(product == ONE for product in products)
    return Alike(tuple(numbers), tuple(None if kind[0] is None else kind for kind in kinds), eps[0], plain)


@lru_cache(maxsize=1024)
def form_of(expression: Expression) -> Form:
    """Return the expression multiplied out. Raises: ValueError for an expression of another kind."""
    return Form(expression)
