"""Give what replaces a BatchNorm the strides that the BatchNorm's output has.

A BatchNorm returns a tensor of its own. A fold leaves the last view of the convolution's output in its place, whose
strides differ after a crop or a transposition. A view of it, in the graph or of the model's output, could then fail.
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
from .fold_nodes import copy_origin

_aten = torch.ops.aten


def restore_strides(graph: fx.Graph, bn: BatchNormCall, last: fx.Node, options: Options) -> fx.Node:
    """Add a copy of `last` with the strides of the BatchNorm's output if it has others. Returns the copy, or `last`.

    Inductor computes the copy in the kernel that reads it. In eager mode it takes as long as the BatchNorm.
    """
    shape, given, wanted = shape_of(bn.output, graph), strides_of(bn.input, graph), strides_of(bn.output, graph)
    if shape is None or given is None or wanted is None:
        return last
    natural = list(range(len(shape)))
    try:
        order = sorted(natural, key=lambda dim: (-hint(wanted[dim]), dim))
    except (TypeError, RuntimeError):  # a size that only a run knows
        order = natural
    output = tensor_of(bn.output, graph)
    eager_cpu = not (options.codegen and compiling()) and (output is None or output.device.type == "cpu")
    if eager_cpu and (len(shape) < 4 or order != [0, *natural[2:], 1]):
        order = natural  # the CPU's kernel knows no other layouts, although that of a fake tensor does
    if _has_order(given, shape, order):
        return last
    calls: list[tuple[Any, ...]] = [(_aten.clone.default,)]
    if order != natural:
        inverse = [order.index(dim) for dim in natural]
        calls = [(_aten.permute.default, order), *calls, (_aten.permute.default, inverse)]
    for function, *arguments in calls:
        keywords: dict[str, Any] = {} if arguments else {"memory_format": torch.contiguous_format}
        last = graph.call_function(function, (last, *arguments), keywords)
        copy_origin(last, bn.node)
    return last


def _has_order(strides: Sequence[Any], shape: Sequence[Any], order: Sequence[int]) -> bool:
    """Return whether these are the strides of a tensor without gaps whose dimensions are stored in this order."""
    step: Any = 1
    for dim in reversed(order):
        if not statically_known_true(shape[dim] == 1):
            if not statically_known_true(strides[dim] == step):
                return False
            step = step * shape[dim]
    return True
