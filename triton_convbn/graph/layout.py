"""Give what replaces a node the strides of that node.

A BatchNorm returns a tensor of its own. A fold leaves its input in its place, or the last view of the convolution's
output, whose strides differ after a crop or a transposition. A sum has the strides of its first operand, which may be
the input. A view of it, in the graph or of the model's output, could then fail.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..compile_context import compiling
from ..options import Options
from .calls import BatchNormCall, shape_of, strides_of, tensor_of
from .channels import hint
from .dialects import read_passthrough
from .findings import Pair
from .fold_nodes import copy_origin
from .mutation import Mutations

_aten = torch.ops.aten


def restore_strides(
    graph: fx.Graph,
    output: fx.Node,
    source: fx.Node,
    last: fx.Node,
    options: Options,
    norm: BatchNormCall | None = None,
    copy: bool = False,
    convolved: bool = False,
) -> fx.Node:
    """Add a copy of `last` with the strides of what it replaces if it has others. Return the copy, or `last`.

    Inductor computes the copy in the kernel that reads it. In eager mode it takes as long as a BatchNorm.

    Args:
        output: The node that is replaced.
        source: A node with the strides of `last`.
        norm: The BatchNorm that computes the output, or the operand that gives the output its strides, if one does.
        copy: Copy `last` if it has the strides, too.
        convolved: A convolution reads the output, and so the strides of dimensions of size 1 count: those of a signal
            of one channel that was transposed would make it return channels last.
    """
    shape, given, wanted = shape_of(output, graph), strides_of(source, graph), strides_of(output, graph)
    if shape is None or given is None or wanted is None:
        return last if not copy else graph.call_function(_aten.clone.default, (last,))
    natural = list(range(len(shape)))
    try:
        order = sorted(natural, key=lambda dim: (-hint(wanted[dim]), dim))
    except (TypeError, RuntimeError):  # a size that only a run knows
        order = natural
    example = tensor_of(output, graph)
    eager_cpu = not (options.codegen and compiling()) and (example is None or example.device.type == "cpu")
    exact = convolved and (eager_cpu or len(shape) < 4)
    if norm is not None and not norm.parts and eager_cpu:  # arithmetic keeps the order of its input
        order = [0, *natural[2:], 1] if _returns_channels_last(norm, shape, order) else natural
        # Of one channel or one position, `interpolate` and others would return channels_last.
        exact = exact or (order == natural and _suggests_channels_last(given, shape))
    if _has_order(given, shape, order, exact) and not copy:
        return last
    calls: list[tuple[Any, ...]] = [(_aten.clone.default,)]
    if order != natural:
        inverse = [order.index(dim) for dim in natural]
        calls = [(_aten.permute.default, order), *calls, (_aten.permute.default, inverse)]
    for function, *arguments in calls:
        keywords: dict[str, Any] = {} if arguments else {"memory_format": torch.contiguous_format}
        example = last.meta.get("val")
        last = graph.call_function(function, (last, *arguments), keywords)
        copy_origin(last, output)
        if example is not None:  # torch.export demands one of every node
            last.meta["val"] = function(example, *arguments, **keywords)
    return last


def _returns_channels_last(norm: BatchNormCall, shape: Sequence[Any], order: Sequence[int]) -> bool:
    """Return whether the CPU's kernel of a BatchNorm returns channels_last: it does if its input is, also with gaps.

    It returns any other layout contiguous, although a fake tensor keeps it. Without gaps, dimensions of size 1 do not
    count.
    """
    if len(shape) < 4:
        return False
    natural, last = list(range(len(shape))), [0, *range(2, len(shape)), 1]
    size, strides = shape_of(norm.input, norm.node.graph), strides_of(norm.input, norm.node.graph)
    if size is None or strides is None:
        return list(order) == last
    if _has_order(strides, size, natural):
        return False
    return _has_order(strides, size, last) or _suggests_channels_last(strides, size)


def _suggests_channels_last(strides: Sequence[Any], shape: Sequence[Any]) -> bool:
    """Return whether torch takes strides for channels_last (c10's `is_channels_last_strides_2d`)."""
    try:
        steps, sizes = ([hint(each) for each in values] for values in (strides, shape))
        least = 0
        for dim in (1, *reversed(range(2, len(shape))), 0):
            if steps[dim] < least or (dim == 0 and least == steps[1]):
                return False
            least = steps[dim] * max(sizes[dim], 1)
    except (TypeError, RuntimeError):  # a size that only a run knows
        return False
    return bool(steps[1] > 0 and min(sizes) > 0)


def _has_order(strides: Sequence[Any], shape: Sequence[Any], order: Sequence[int], exact: bool = False) -> bool:
    """Return whether these are the strides of a tensor without gaps whose dimensions are stored in this order.

    exact: Count those of dimensions of size 1.
    """
    step: Any = 1
    for dim in reversed(order):
        if exact or not statically_known_true(shape[dim] == 1):
            if not statically_known_true(strides[dim] == step):
                return False
            step = step * shape[dim]
    return True


def written_parts(graph: fx.Graph, pairs: Sequence[Pair], mutations: Mutations) -> set[fx.Node]:
    """Return the BatchNorms of parts of an output where a result is written to, as an in-place ReLU does, or returned.

    Without the BatchNorm the result is a view. Autograd forbids writes to what a chunk returns, and takes a write to
    one of several parts for a write to all.
    """
    parts = [pair for pair in pairs if pair.twins or any(map(_is_one_of_several, pair.steps))]
    if not parts:
        return set()

    def written(bn: BatchNormCall) -> bool:
        return graph.output_node() in bn.output.users or mutations.writes_to(bn.output)

    return {pair.bn.node for pair in parts if any(map(written, (pair.bn, *pair.twins)))}


def _is_one_of_several(node: fx.Node) -> bool:
    """Return whether a node takes one of the views that a call returns."""
    call = read_passthrough(node)
    return call is not None and call.parts is not None
