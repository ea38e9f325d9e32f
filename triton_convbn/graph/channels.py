"""Follow the channels of a convolution through a call that moves, drops or repeats elements.

A scale and a shift per channel commute with such a call if it keeps the channels whole, as one dimension.

A reshape is followed by sizes, see `_after_reshape`. A view is called again on a probe: a tensor without memory whose
stride is 1 along the channels and 0 along all other dimensions. The channels are then where the result has stride 1.
This covers every way to transpose, slice, split, expand or unfold a tensor.
"""

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .calls import PassthroughCall, rank_of, shape_of
from .findings import CannotFold
from .reasons import Reason


def dim_after(call: PassthroughCall, dim: int, graph: fx.Graph) -> int:
    """Return the dimension that has the channels after a call of one tensor.

    Args:
        call: The call.
        dim: The dimension that has the channels before it.
        graph: The graph of the call.

    Raises:
        CannotFold: the channels are not one dimension afterwards, or the graph does not say enough to know.
    """
    if call.kind == "reshape":
        return _after_reshape(call, dim, graph)
    if call.kind == "view":
        return _after_view(call, dim, graph)
    if call.kind == "along":
        rank = rank_of(call.inputs[0], graph)
        if rank is None:
            raise CannotFold(Reason.UNKNOWN_SHAPE, call.node)
        if dim in [each % rank for each in call.dims]:
            raise CannotFold(Reason.CHANNELS_MOVED, call.node)
    return dim


def _after_reshape(call: PassthroughCall, dim: int, graph: fx.Graph) -> int:
    """Return the dimension of the channels after a reshape.

    Element e, in the order that a reshape keeps, has channel ``e // inner % channels``, where `inner` is the number of
    elements per step along the channels. So the dimension has as many channels and the same inner.
    """
    old, new = shape_of(call.inputs[0], graph), shape_of(call.node, graph)
    if old is None or new is None or dim >= len(old) or not isinstance(old[dim], int):
        raise CannotFold(Reason.UNKNOWN_SHAPE, call.node)
    inner = math.prod(old[dim + 1 :])
    fitting = [
        position
        for position, size in enumerate(new)
        if statically_known_true(size == old[dim]) and statically_known_true(math.prod(new[position + 1 :]) == inner)
    ]
    if fitting:
        return dim if dim in fitting else fitting[0]
    static = all(isinstance(size, int) for size in (*old[dim:], *new))
    raise CannotFold(Reason.CHANNELS_MOVED if static else Reason.UNKNOWN_SHAPE, call.node)


def _after_view(call: PassthroughCall, dim: int, graph: fx.Graph) -> int:
    """Return the dimension of the channels after a view."""
    shape = shape_of(call.inputs[0], graph)
    if shape is None or dim >= len(shape) or not isinstance(shape[dim], int):
        raise CannotFold(Reason.UNKNOWN_SHAPE, call.node)
    try:
        strides = [int(position == dim) for position in range(len(shape))]
        probe = torch.empty_strided([hint(size) for size in shape], strides, device="meta")
        values = {call.inputs[0]: probe}
        for node in call.nodes:
            values[node] = _run(node, values, graph)
        result = values[call.node]
    except Exception:  # an argument that only a run knows, or that does not fit
        raise CannotFold(Reason.UNKNOWN_SHAPE, call.node) from None
    if not isinstance(result, Tensor) or result.untyped_storage()._cdata != probe.untyped_storage()._cdata:
        raise CannotFold(Reason.INPUT_NOT_CONV, call.node)
    channels = shape[dim]
    sizes = list(enumerate(zip(result.shape, result.stride(), strict=True)))
    # A dimension of size 1 may have any stride.
    fitting = [position for position, (size, stride) in sizes if stride and (size > 1 or channels == 1)]
    if len(fitting) != 1 or result.stride(fitting[0]) != 1 or result.size(fitting[0]) != channels:
        raise CannotFold(Reason.CHANNELS_MOVED, call.node)
    return fitting[0]


def _run(node: fx.Node, values: dict[fx.Node, Any], graph: fx.Graph) -> Any:
    """Return what a call returns for tensors without memory and for the sizes that the graph was captured with."""

    def value_of(argument: fx.Node) -> Any:
        if argument in values:
            return values[argument]
        shape = shape_of(argument, graph)
        if shape is not None:
            return torch.empty([hint(size) for size in shape], device="meta")
        return hint(argument.meta.get("example_value", argument.meta.get("val")))

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def hint(size: Any) -> int:
    """Return a number, or what a symbol stood for when the graph was captured. Raise TypeError if that is unknown."""
    known: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(known)
