"""aten before dispatch, as `torch.export` and `make_fx` write it: `aten.conv2d.default`, `aten.batch_norm.default`."""

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ..calls import BatchNormCall, ConvCall, Moves, PassthroughCall, tensor_of
from ._bind import REQUIRED, batch_norm_call, bind, conv_call, passthrough_call

_aten = torch.ops.aten

_CONVS: dict[OpOverload, dict[str, bool]] = {
    _aten.conv1d.default: {},
    _aten.conv2d.default: {},
    _aten.conv3d.default: {},
    _aten.conv1d.padding: {},
    _aten.conv2d.padding: {},
    _aten.conv3d.padding: {},
    _aten.conv_transpose1d.default: {"transposed": True},
    _aten.conv_transpose2d.input: {"transposed": True},
    _aten.conv_transpose3d.input: {"transposed": True},
    _aten.convolution.default: {},
    _aten.linear.default: {"linear": True},
}

# Those that return a tuple hold the normalized tensor first. Those without a `training` argument are eval mode only.
_BATCH_NORMS: dict[OpOverload, bool] = {
    _aten.batch_norm.default: False,
    _aten._native_batch_norm_legit_no_training.default: True,
    _aten._native_batch_norm_legit.default: True,
    _aten._native_batch_norm_legit_functional.default: True,
    _aten._batch_norm_no_update.default: True,
    _aten.native_batch_norm.default: True,
    _aten.cudnn_batch_norm.default: True,
    _aten.miopen_batch_norm.default: True,
}

_STEPS: dict[OpOverload, Moves] = {
    **dict.fromkeys((_aten.alias.default, _aten.clone.default, _aten.contiguous.default), "same"),
    **dict.fromkeys((_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default), "reshape"),
    **dict.fromkeys((_aten.flatten.using_ints, _aten.unflatten.int), "reshape"),
    **dict.fromkeys((_aten.reshape_as.default, _aten.view_as.default, _aten.unsqueeze.default), "reshape"),
    **dict.fromkeys((_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims), "reshape"),
    **dict.fromkeys((_aten.cat.default, _aten.concat.default, _aten.concatenate.default), "cat"),
}
_DROPOUTS = (_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default)


def _bound(node: fx.Node, op: OpOverload) -> dict[str, Any] | None:
    arguments = op._schema.arguments
    return bind(node, tuple((a.name, a.default_value if a.has_default_value() else REQUIRED) for a in arguments))


def _matmul(node: fx.Node, op: OpOverload) -> ConvCall | None:
    """Return a 2-D Linear that `run_decompositions` has made ``addmm(bias, x, weight.T)`` or ``mm(x, weight.T)``."""
    bound = _bound(node, op) or {}
    weight = _transposed(bound.get("mat2"))
    if bound.get("beta", 1) != 1 or bound.get("alpha", 1) != 1 or weight is None:
        return None
    named = {"input": bound.get("mat1", bound.get("self")), "weight": weight}
    bias = bound.get("self") if op is _aten.addmm.default else None
    return conv_call(node, _aten.linear.default, named | {"bias": bias}, linear=True)


def _batched_matmul(node: fx.Node) -> ConvCall | None:
    """Return a 3-D Linear without bias, whose input is transposed, that has become ``bmm(x, weight.T.expand(...))``."""
    x, matrices = node.args
    if isinstance(matrices, fx.Node) and matrices.target is _aten.view.default:
        source, size = matrices.args
        if not isinstance(source, fx.Node) or len(source.args) < 2 or source.args[1] != size:
            return None
        matrices = source
    if not isinstance(matrices, fx.Node) or matrices.target is not _aten.expand.default:
        return None
    weight, size = _transposed(matrices.args[0]), matrices.args[1]
    matrix = None if weight is None else tensor_of(weight, node.graph)
    if matrix is None or matrix.ndim != 2 or not isinstance(size, list | tuple) or len(size) != 3:
        return None
    if any(one not in (-1, other) for one, other in zip(size[1:], reversed(matrix.shape), strict=True)):
        return None  # columns or rows are repeated as well
    return conv_call(node, _aten.linear.default, {"input": x, "weight": weight, "bias": None}, linear=True)


def _transposed(value: Any) -> fx.Node | None:
    """Return the matrix that the value is the transpose of, or None."""
    if not isinstance(value, fx.Node) or not isinstance(matrix := next(iter(value.args), None), fx.Node):
        return None
    moved = value.target is _aten.permute.default and list(value.args[1]) == [1, 0]  # type: ignore[arg-type]
    return matrix if moved or value.target is _aten.t.default else None


def conv(node: fx.Node) -> ConvCall | None:
    """Return the convolution or Linear that `node` calls, or None."""
    op = node.target
    if node.op == "call_function" and op in (_aten.addmm.default, _aten.mm.default):
        return _matmul(node, op)
    if node.op == "call_function" and op is _aten.bmm.default:
        return _batched_matmul(node)
    if node.op != "call_function" or not isinstance(op, OpOverload) or op not in _CONVS:
        return None
    return conv_call(node, op, _bound(node, op), **_CONVS[op])


def batch_norm(node: fx.Node) -> BatchNormCall | None:
    """Return the BatchNorm that `node` calls, or None."""
    op = node.target
    if node.op != "call_function" or not isinstance(op, OpOverload) or op not in _BATCH_NORMS:
        return None
    bound = _bound(node, op)
    if bound is not None and "epsilon" in bound:  # cuDNN's and MIOpen's name for it
        bound["eps"] = bound.pop("epsilon")
    return batch_norm_call(node, bound, in_tuple=_BATCH_NORMS[op])


def step(node: fx.Node) -> PassthroughCall | None:
    """Return the call that `node` is if it only moves, drops or repeats elements, or None."""
    op = node.target
    if node.op != "call_function" or not isinstance(op, OpOverload):
        return None
    if op in _DROPOUTS:
        bound = _bound(node, op) or {}
        return PassthroughCall(node, (bound["input"],)) if bound.get("train") is False else None
    return passthrough_call(node, _STEPS[op]) if op in _STEPS else None
