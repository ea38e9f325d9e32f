"""Read the calls that move, drop or repeat elements: views, parts, flips and pads, in every dialect."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..calls import PassthroughCall
from ._bind import REQUIRED, Signature, bind
from ._padding import repeated_dims

_aten = torch.ops.aten


def _targets(*names: str) -> frozenset[Any]:
    """Return the functions, methods and aten operators of these names. A method's target is its name."""
    functions = [getattr(torch, name) for name in names if hasattr(torch, name)]
    packets = [getattr(_aten, name) for name in names if hasattr(_aten, name)]
    overloads = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    return frozenset([*(name for name in names if hasattr(Tensor, name)), *functions, *packets, *overloads])


_VIEWS = _targets("diagonal", "expand", "expand_as", "narrow", "select", "unfold")
_VIEWS |= _targets("movedim", "moveaxis", "permute", "swapaxes", "swapdims", "t", "transpose", "numpy_T", "mT")
_VIEWS |= {_aten.slice.Tensor}
_PARTS = _targets("chunk", "split", "split_with_sizes", "tensor_split", "unbind")
_FLIP, _ROLL, _INDEX_SELECT = _targets("flip"), _targets("roll"), _targets("index_select")

_ROLLED: Signature = (("input", REQUIRED), ("shifts", REQUIRED), ("dims", ()))
_SELECTED: Signature = (("input", REQUIRED), ("dim", REQUIRED), ("index", REQUIRED))


def read_move(node: fx.Node) -> PassthroughCall | None:
    """Return the call that `node` is if it moves, drops or repeats elements and computes nothing, or None."""
    if node.op not in ("call_function", "call_method") or "out" in node.kwargs:
        return None
    target = node.target
    x = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    if not isinstance(x, fx.Node):
        return None
    if target is operator.getitem and x.op in ("call_function", "call_method") and x.target in _PARTS:
        whole = x.args[0] if x.args else None
        return PassthroughCall(node, (whole,), "view", parts=x) if isinstance(whole, fx.Node) else None
    if target in _VIEWS or (target is operator.getitem and _is_slice(node.args[1])):
        return PassthroughCall(node, (x,), "view")
    if target is getattr and node.args[1] in ("T", "mT"):
        return PassthroughCall(node, (x,), "view")
    dims = _dims(node)
    return None if dims is None else PassthroughCall(node, (x,), "along", dims=dims)


def _is_slice(index: Any) -> bool:
    """Return whether an index has nothing but slices, numbers, None and an ellipsis. A tensor would copy elements."""
    parts = index if isinstance(index, tuple) else (index,)
    computed = [each for each in parts if isinstance(each, fx.Node)]
    if any(isinstance(each.meta.get("example_value", each.meta.get("val")), Tensor) for each in computed):
        return False
    return all(each is None or each is ... or isinstance(each, int | slice | fx.Node) for each in parts)


def _dims(node: fx.Node) -> tuple[int, ...] | None:
    """Return the dimensions along which a copy moves, drops or repeats elements, or None for another call."""
    dims: Any = None
    if node.target in _FLIP:
        dims = node.kwargs.get("dims", node.args[1:])
        dims = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    elif node.target in _ROLL:
        dims = (bind(node, _ROLLED) or {}).get("dims")
        if isinstance(dims, list | tuple) and not dims:  # it rolls all elements as one row
            return None
    elif node.target in _INDEX_SELECT:
        dims = (bind(node, _SELECTED) or {}).get("dim")
    else:
        dims = repeated_dims(node)
    dims = dims if isinstance(dims, list | tuple) else (dims,)
    return tuple(dims) if all(isinstance(dim, int) for dim in dims) else None
