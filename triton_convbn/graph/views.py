"""Find which memory a value of the graph may be in: its storage, and the nodes that it may be a view of."""

from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from .calls import attribute
from .dialects import read_batch_norm, read_conv
from .writes import flatten, is_in_place

_VIEWS = frozenset(
    (
        *("_add_batch_dim", "_get_data_attr", "_make_dual", "_remove_batch_dim", "_unpack_dual", "_unwrap_batched"),
        *("_unwrap_for_grad", "_wrap_for_grad", "alias", "as_strided", "broadcast_to", "chunk", "conj", "contiguous"),
        *("cpu", "cuda", "data", "detach", "diagonal", "double", "dropout", "expand", "expand_as", "flatten", "float"),
        *("getattr", "getitem", "half", "imag", "movedim", "moveaxis", "narrow", "permute", "ravel", "real"),
        *("reshape", "reshape_as", "select", "split", "split_with_sizes", "squeeze"),
        *("swapaxes", "swapdims", "t", "tensor_split", "to", "transpose"),
        *("type", "type_as", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as"),
    )
)
"""Functions and methods that return a view of their first argument, or that argument itself, always or at times."""

_LAYERS = ("adaptive_avg_pool", "adaptive_max_pool", "avg_pool", "instance_norm", "lp_pool", "max_pool")
_NEW = frozenset(
    (
        *(f"{name}{dimensions}d" for name in _LAYERS for dimensions in (1, 2, 3)),
        *("group_norm", "instance_norm", "layer_norm", "local_response_norm", "rms_norm"),
        *("bilinear", "grid_sampler", "inner", "matmul", "scaled_dot_product_attention", "tensordot"),
        *("gru", "lstm", "rnn_relu", "rnn_tanh"),
        *("upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d", "upsample_trilinear3d"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    )
)
"""Operators and functions that never return a view, although the schema of most does not say so."""
_NEW_MODULES = frozenset(name.replace("_", "") for name in _NEW)
"""The modules of torch that call them, in lower case."""


def bases_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that the result of a call may be a view of."""
    op, first = node.target, [arg for arg in node.args[:1] if isinstance(arg, fx.Node)]
    if is_new(node):
        return []
    if isinstance(op, OpOverloadPacket):
        return list(dict.fromkeys(each for name in op.overloads() for each in _schema_bases(getattr(op, name), node)))
    if isinstance(op, HigherOrderOperator):  # a checkpoint may return a view of what it is given
        return [each for each in node.all_input_nodes if may_be_tensor(each)]
    if not isinstance(op, OpOverload):
        name = called_name(node)
        return first if node.op == "call_module" or name in _VIEWS or is_in_place(name) else []
    return _schema_bases(op, node)


def called_name(node: fx.Node) -> str:
    """Return the name of the function, method, operator or class of module that a node calls, in lower case, or ""."""
    target: Any = node.target
    if node.op == "call_module":
        owner = node.graph.owning_module
        return "" if owner is None else type(attribute(node.graph, str(target))).__name__.lower()
    if node.op not in ("call_function", "call_method"):
        return ""
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    return str(getattr(target, "__name__", target)).lower()


def is_new(node: fx.Node) -> bool:
    """Return whether the result of a call, or each part of it, is memory of its own."""
    op = node.target
    if read_conv(node) is not None or read_batch_norm(node) is not None:
        return True
    if node.op == "call_module":
        module = attribute(node.graph, str(op))
        return type(module).__module__.startswith("torch.nn.") and called_name(node) in _NEW_MODULES
    if isinstance(op, OpOverload) and op.namespace == "aten" and not _is_unannotated(op):
        if op is torch.ops.aten._unsafe_view.default:
            return False  # its schema does not say that it is a view
        return not any(argument.alias_info for argument in (*op._schema.arguments, *op._schema.returns))
    return called_name(node) in _NEW


def _schema_bases(op: OpOverload, node: fx.Node) -> list[fx.Node]:
    if _is_unannotated(op):
        return node.all_input_nodes
    aliased = {
        name for returned in op._schema.returns if returned.alias_info for name in returned.alias_info.before_set
    }
    named = dict(zip((a.name for a in op._schema.arguments), node.args, strict=False)) | node.kwargs
    infos = {a.name: a.alias_info for a in op._schema.arguments if a.alias_info is not None}
    values = [named.get(name) for name, i in infos.items() if i.before_set & aliased or "*" in i.after_set]
    return [value for value in flatten(values) if isinstance(value, fx.Node)]


def _is_unannotated(op: OpOverload) -> bool:
    """Return whether the schema of an operator does not say what its result is a view of.

    Composite operators are not annotated: dropout that drops nothing returns its argument. The dispatcher does not know
    `aten.mT.a`, to which Dynamo's `aten.mT` resolves (torch 2.14).
    """
    try:
        return op.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd)
    except RuntimeError:
        return True


def storage_of(tensor: Tensor | None) -> int | None:
    """Return an identity of the memory behind a tensor, also of a fake one, or None if it has none of its own."""
    if tensor is None:
        return None
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have no storage
        return None


def may_be_tensor(node: fx.Node) -> bool:
    """Return False for graphs and numbers among a node's arguments."""
    return node.op != "get_attr" if node.meta.get("val") is None else not isinstance(node.meta["val"], _NUMBERS)


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
