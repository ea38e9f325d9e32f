"""Read the calls that add branches up: sums, differences and factors per channel, in every dialect."""

import operator

import torch
from torch import fx

from ..calls import FactorCall, SumCall
from ..reasons import Reason
from ._bind import REQUIRED, Signature, bind

_aten = torch.ops.aten


_ADD = {operator.add, torch.add, "add", _aten.add.Tensor}
_ADD_IN_PLACE = {operator.iadd, "add_", _aten.add_.Tensor}
_SUB = {operator.sub, torch.sub, torch.subtract, "sub", "subtract", _aten.sub.Tensor}
_SUB_IN_PLACE = {operator.isub, "sub_", "subtract_", _aten.sub_.Tensor}
_MUL = {operator.mul, torch.mul, torch.multiply, "mul", "multiply", _aten.mul.Tensor}
_MUL_IN_PLACE = {operator.imul, "mul_", "multiply_", _aten.mul_.Tensor}
_DIV = {operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide", "true_divide", _aten.div.Tensor}
_DIV_IN_PLACE = {operator.itruediv, "div_", "divide_", "true_divide_", _aten.div_.Tensor}
_NEG = {operator.neg, torch.neg, torch.negative, "neg", "negative", _aten.neg.default}
_OPERANDS: Signature = (("input", REQUIRED), ("other", REQUIRED))
_IN_PLACE = _ADD_IN_PLACE | _SUB_IN_PLACE


def read_sum(node: fx.Node) -> SumCall | None:
    """Return the sum or difference that `node` computes, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    adds = node.target in _ADD or node.target in _ADD_IN_PLACE
    if not adds and node.target not in _SUB and node.target not in _SUB_IN_PLACE:
        return None
    bound = bind(node, (*_OPERANDS, ("alpha", 1)))
    if bound is None:
        return None
    operands = [(1, bound["input"]), (1 if adds else -1, bound["other"])]
    terms = tuple((sign, value) for sign, value in operands if isinstance(value, fx.Node))
    numbers = [value for _, value in operands if not isinstance(value, fx.Node)]
    if not terms or any(isinstance(value, bool) or value != 0 for value in numbers):
        return None
    writes = node.target in _IN_PLACE and terms[0][1] is bound["input"]
    return SumCall(node, terms, writes, None if bound["alpha"] == 1 else Reason.ALPHA)


def read_factor(node: fx.Node) -> FactorCall | None:
    """Return the product that `node` computes, or None. A negation is a product with -1, a quotient by 2 with 0.5."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _NEG:
        bound = bind(node, _OPERANDS[:1])
        return FactorCall(node, (-1.0, bound["input"])) if bound and isinstance(bound["input"], fx.Node) else None
    if node.target in _DIV or node.target in _DIV_IN_PLACE:
        bound = bind(node, (*_OPERANDS, ("rounding_mode", None)))
        if bound is None or not isinstance(bound["input"], fx.Node) or bound["rounding_mode"] is not None:
            return None
        divisor = bound["other"]
        known = isinstance(divisor, int | float) and not isinstance(divisor, bool) and divisor != 0
        return FactorCall(node, (1 / divisor, bound["input"]), node.target in _DIV_IN_PLACE) if known else None
    if node.target not in _MUL and node.target not in _MUL_IN_PLACE:
        return None
    values = list((bind(node, _OPERANDS) or {}).values())
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    nodes = [value for value in values if isinstance(value, fx.Node)]
    writes = node.target in _MUL_IN_PLACE
    if len(nodes) == 2:
        return FactorCall(node, (nodes[0], nodes[1]), writes)
    return FactorCall(node, (numbers[0], nodes[0]), writes) if len(nodes) == len(numbers) == 1 else None
