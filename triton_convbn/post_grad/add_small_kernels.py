"""Add the smaller kernel of a contiguous sum of branches in place, where Inductor writes C++.

`merge_reference` pads it with zeros to the size of the largest kernel. The C++ of such a sum takes one row of a kernel
at a time, which are three elements: 364 us for 192 x 192 x 3 x 3 and 1 x 1. This pass lets it write the largest kernel
alone and then overwrite the elements that the smaller one is added to: 71 us. Every element is rounded once, as before.

Channels_last, where the loop over channels is the innermost one, the padded sum takes 79 us and stays.
"""

import torch
from torch import Tensor, fx

from ..compat import WRITES_IN_ORDER
from . import nodes
from .context import PassContext

_aten = torch.ops.aten
_CONVERT = torch.ops.prims.convert_element_type.default
_CONVOLUTION, _BACKWARD = _aten.convolution.default, _aten.convolution_backward.default


def add_small_kernels(graph: fx.Graph, context: PassContext) -> None:
    """Rewrite every merged weight that a contiguous convolution on the CPU reads. Values do not change."""
    if not WRITES_IN_ORDER:
        return
    forward = [] if context.channels_last else graph.find_nodes(op="call_function", target=_CONVOLUTION)
    backward = graph.find_nodes(op="call_function", target=_BACKWARD)
    for weight in dict.fromkeys([*(node.args[1] for node in forward), *(node.args[2] for node in backward)]):
        if isinstance(weight, fx.Node) and _is_contiguous(weight):
            _rewrite(graph, weight)


def _is_contiguous(node: fx.Node) -> bool:
    """Return whether the node is a contiguous tensor on the CPU whose sizes are numbers."""
    example: Tensor = node.meta["val"]
    known = all(isinstance(size, int) for size in example.shape)
    return known and example.device.type == "cpu" and example.is_contiguous()


def _rewrite(graph: fx.Graph, weight: fx.Node) -> None:
    """Replace ``kernel + pad(small)``, converted or not, by a sum in place."""
    total = weight.args[0] if weight.target is _CONVERT else weight
    if not isinstance(total, fx.Node) or total.target is not _aten.add.Tensor or total.kwargs:
        return
    kernel, padded = total.args
    if not isinstance(kernel, fx.Node) or not isinstance(padded, fx.Node) or not _is_embedded(padded):
        return
    small, margins = padded.args[0], padded.args[1]
    assert isinstance(small, fx.Node)
    assert isinstance(margins, list | tuple)
    wide, example, like = kernel.meta["val"], weight.meta["val"], small.meta["val"]
    if (
        not wide.shape == padded.meta["val"].shape == example.shape
        or wide.dtype != like.dtype
        or not _is_contiguous(kernel)
    ):
        return
    if any(map(_is_embedded, kernel.all_input_nodes)):
        return  # a kernel of a third size: its elements would be rounded twice
    offset, middle = 0, kernel  # the margins begin with those of the last dimension, two for each
    with graph.inserting_before(weight):
        for dim, before in enumerate(reversed(margins[::2]), wide.ndim - len(margins) // 2):
            middle = nodes.call(graph, weight, _aten.slice.Tensor, middle, dim, before, before + like.shape[dim])
            offset += before * wide.stride(dim)
        middle = nodes.call(graph, weight, _aten.add.Tensor, middle, small)
        if wide.dtype != example.dtype:
            kernel, middle = (nodes.call(graph, weight, _CONVERT, node, example.dtype) for node in (kernel, middle))
        view = list(like.shape), list(wide.stride()), offset
        merged = nodes.call(graph, weight, _aten.as_strided_scatter.default, kernel, middle, *view)
    weight.replace_all_uses_with(merged)
    for node in dict.fromkeys((weight, total, padded)):
        if not node.users:
            graph.erase_node(node)


def _is_embedded(node: fx.Node) -> bool:
    """Return whether the node is a smaller kernel with zeros around it."""
    if node.target is not _aten.constant_pad_nd.default:
        return False
    _, margins, *value = node.args
    return all(isinstance(each, int) and each >= 0 for each in margins) and not any(value)  # type: ignore[union-attr]
