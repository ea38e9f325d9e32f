"""Read the vectors of a BatchNorm from its arithmetic, ``x * scale + shift`` or ``(x - mean) * scale + bias``."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

_aten = torch.ops.aten

CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
MOVES = ("view", "unsqueeze", "index", "to", "type_as", *CASTS)

# What every target computes. That of a method is its name. See `operation`.
_OPERATIONS: dict[Any, str] = {
    **{name: name for name in ("add", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "reciprocal", "pow")},
    **{name: name for name in ("view", "unsqueeze", "to", "type_as", *CASTS)},
    "reshape": "view",
    **{getattr(operator, name): name for name in ("add", "sub", "mul", "neg", "pow")},
    operator.truediv: "div",
    **{
        getattr(torch, name): name for name in ("add", "sub", "mul", "div", "neg", "sqrt", "rsqrt", "reciprocal", "pow")
    },
    torch.reshape: "view",
    torch.unsqueeze: "unsqueeze",
    **{getattr(_aten, name).Tensor: name for name in ("add", "sub", "mul", "div")},
    **{getattr(_aten, name).default: name for name in ("neg", "sqrt", "rsqrt", "reciprocal", "view", "unsqueeze")},
    _aten.add.Scalar: "add",
    _aten.mul.Scalar: "mul",
    _aten.pow.Tensor_Scalar: "pow",
    _aten.reshape.default: "view",
    _aten.to.dtype: "to",
    _aten.to.device: "to",
    _aten._to_copy.default: "to",
}


class Inverse(NamedTuple):
    """``(var + eps) ** -0.5``"""

    var: fx.Node
    eps: float | fx.Node


class Scale(NamedTuple):
    """``weight * inverse``; without a weight where that is None."""

    weight: fx.Node | None
    inverse: Inverse


class Shift(NamedTuple):
    """``bias - mean * scale``; without a bias where that is None."""

    bias: fx.Node | None
    mean: fx.Node


class Reading(NamedTuple):
    """The arithmetic of a BatchNorm.

    Attributes:
        applied: What is applied to x: vectors, as they are reshaped and cast.
        products: What is computed of x before the result.
    """

    x: fx.Node
    scale: Scale
    shift: Shift
    applied: tuple[Any, ...]
    products: tuple[fx.Node, ...]


def operation(node: fx.Node) -> str | None:
    """Return what a node computes, or None. ``vector[:, None, None]`` is an index, which only adds dimensions."""
    if node.target is operator.getitem and _adds_dimensions(node.args[1]):
        return "index"
    return _OPERATIONS.get(node.target)


def _adds_dimensions(index: Any) -> bool:
    return isinstance(index, tuple) and all(each in (None, ..., slice(None)) for each in index)


def _arguments(value: Any, name: str) -> Sequence[Any]:
    """Return the arguments of a node of this operation, or nothing, also if keywords change the operation."""
    if not isinstance(value, fx.Node) or value.op not in ("call_function", "call_method") or value.kwargs:
        return ()
    return value.args if operation(value) == name else ()


def _orders(value: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """Return the two operands of a commutative operation in both orders."""
    arguments = _arguments(value, name)
    if len(arguments) == 2:
        yield arguments[0], arguments[1]
        yield arguments[1], arguments[0]


def _source(value: Any) -> Any:
    """Return the node under all reshapes and casts."""
    while isinstance(value, fx.Node) and value.op != "call_module" and value.args:
        if operation(value) not in MOVES:
            break
        value = value.args[0]
    return value


def _vector(value: Any) -> fx.Node | None:
    source = _source(value)
    return source if isinstance(source, fx.Node) else None


def scaled_and_shifted(node: fx.Node) -> Reading | None:
    """Read ``x * scale + shift`` with ``shift = bias - mean * scale``."""
    for product, shifted in _orders(node, "add"):
        for x, scaled in _orders(product, "mul"):
            scale = _scale(scaled)
            shift = None if scale is None else _shift(shifted, scale)
            if isinstance(x, fx.Node) and scale is not None and shift is not None:
                return Reading(x, scale, shift, (scaled, shifted), (product,))
    return None


def centred_first(node: fx.Node) -> Reading | None:
    """Read ``(x - mean) * inverse * weight + bias``, without the weight or the bias where it is None.

    Without both nothing is read: the backward of a BatchNorm computes ``(x - mean) * inverse`` too.
    """
    for product, added in (*_orders(node, "add"), (node, None)):
        bias = _vector(added)
        if bias is None and added is not None:
            continue
        for centred, factors, products in _factors(product):
            x, mean = centred.args
            scale, vector = _scale_of_factors(factors), _vector(mean)
            if not isinstance(x, fx.Node) or vector is None or scale is None or (scale.weight is None and bias is None):
                continue
            applied = (mean, *(factor for _, factor in factors), added)
            inner = tuple(each for each in products if each is not node)
            return Reading(x, scale, Shift(bias, vector), applied, inner)
    return None


Factors = tuple[tuple[str, Any], ...]
"""What a value is multiplied by ("mul") or divided by ("div")."""


def _factors(value: Any, most: int = 2) -> Iterator[tuple[fx.Node, Factors, tuple[fx.Node, ...]]]:
    """Return each difference in a product, its factors, at most `most`, and the nodes from the difference on."""
    if len(_arguments(value, "sub")) == 2:
        yield value, (), (value,)
    quotient = _arguments(value, "div")
    steps = [("mul", inner, factor) for inner, factor in _orders(value, "mul")]
    steps += [("div", *quotient)] if len(quotient) == 2 else []
    for name, inner, factor in steps if most else ():
        for centred, factors, products in _factors(inner, most - 1):
            yield centred, (*factors, (name, factor)), (*products, value)


def _scale_of_factors(factors: Factors) -> Scale | None:
    """Return the scale that these factors are together, or None."""
    if len(factors) == 1:
        ((name, factor),) = factors
        inverse = _under_root(factor) if name == "div" else None
        return Scale(None, inverse) if inverse else _scale(factor) if name == "mul" else None
    for (name, factor), (other, weight) in (factors, factors[::-1]) if len(factors) == 2 else ():
        inverse = _under_root(factor) if name == "div" else _inverse(_source(factor))
        vector = _vector(weight) if other == "mul" else None
        if inverse is not None and vector is not None:
            return Scale(vector, inverse)
    return None


def _scale(value: Any) -> Scale | None:
    """Return the scale that a node computes, or None."""
    value = _source(value)
    inverse = _inverse(value)
    if inverse is not None:
        return Scale(None, inverse)
    products = [(factor, _inverse(_source(other))) for factor, other in _orders(value, "mul")]
    if len(arguments := _arguments(value, "div")) == 2:
        products.append((arguments[0], _under_root(arguments[1])))
    for factor, inverse in products:
        weight = _vector(factor)
        if weight is not None and inverse is not None:
            return Scale(weight, inverse)
    return None


def _shift(value: Any, scale: Scale) -> Shift | None:
    """Return the shift that a node computes with this scale, or None."""
    value = _source(value)
    if len(arguments := _arguments(value, "sub")) == 2:
        bias, mean = _vector(arguments[0]), _mean(arguments[1], scale)
        return None if bias is None or mean is None else Shift(bias, mean)
    if len(arguments := _arguments(value, "neg")) == 1:
        mean = _mean(arguments[0], scale)
        return None if mean is None else Shift(None, mean)
    return None


def _mean(value: Any, scale: Scale) -> fx.Node | None:
    """Return the mean in ``mean * scale``, or None."""
    products = _orders(_source(value), "mul")
    return next((mean for factor, other in products if _scale(other) == scale and (mean := _vector(factor))), None)


def _inverse(value: Any) -> Inverse | None:
    if len(arguments := _arguments(value, "rsqrt")) == 1:
        return _variance(arguments[0])
    if len(arguments := _arguments(value, "reciprocal")) == 1:
        return _under_root(arguments[0])
    if len(arguments := _arguments(value, "div")) == 2 and _is(arguments[0], 1):
        return _under_root(arguments[1])
    if len(arguments := _arguments(value, "pow")) == 2 and _is(arguments[1], -0.5):
        return _variance(arguments[0])
    # Export writes 1 / t as t.reciprocal() * 1.
    return next((_inverse(other) for other, one in _orders(value, "mul") if _is(one, 1)), None)


def _under_root(value: Any) -> Inverse | None:
    value = _source(value)
    if len(arguments := _arguments(value, "sqrt")) == 1:
        return _variance(arguments[0])
    if len(arguments := _arguments(value, "pow")) == 2 and _is(arguments[1], 0.5):
        return _variance(arguments[0])
    return None


def _variance(value: Any) -> Inverse | None:
    value = _source(value)
    for added_to, eps in _orders(value, "add"):
        var = _vector(added_to)
        if var is not None and is_scalar(eps):
            return Inverse(var, eps if isinstance(eps, fx.Node) else float(eps))
    return Inverse(value, 0.0) if isinstance(value, fx.Node) else None


def _is(value: Any, number: float) -> bool:
    return isinstance(value, int | float) and value == number


def is_scalar(value: Any) -> bool:
    """Return whether a value is a number. Dynamo computes eps in the graph under ``dynamic=True``."""
    if isinstance(value, fx.Node):
        value = value.meta.get("example_value", value.meta.get("val"))
    return isinstance(value, int | float | torch.SymFloat)
