"""Replace a sum of branches by one convolution with merged parameters."""

import operator
from typing import Any

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor

from ..counters import count
from ..dispatch import use_kernel
from ..kernels.inputs import Unsupported
from ..kernels.merge_inputs import merge_spec_of
from ..ops import branches, branches_autograd, fp16_range, merge_reference, strides
from ..options import Options
from .branch import Branch
from .branch_groups import Scales, positions
from .calls import dtype_of, tensor_of
from .fold_nodes import (
    Calls,
    copied_if_saved,
    copy_example,
    copy_origin,
    erase,
    mark,
    mark_layer,
    mark_sum,
    read,
    rounding_keywords,
)
from .layout import restore_strides
from .one_thread import by_onednn


def merge(
    graph: fx.Graph,
    branch: Branch,
    replaced: dict[fx.Node, fx.Node],
    options: Options,
    prescale: bool = True,
    scales: Scales | None = None,
) -> fx.Node:
    """Replace the sum by a convolution before its last node. Return the node of its output.

    scales: What stands for the vectors of the sum, if they are computed with those of others.
    """
    conv, _ = branch.largest
    convolution: fx.Node | None = None
    with graph.inserting_before(branch.node):
        x = read(graph, branch.input, replaced)
        values = list(branch.values() if scales is None else scales.weights if scales.weight is None else ())
        tensors = [read(graph, value, replaced) for value in values]
        if options.recompute and not options.codegen:
            output = _as_one_function(graph, branch, x, tensors, options, scales)
        else:
            output, convolution = _as_fold_and_convolution(graph, branch, x, tensors, options, prescale)
        copy_origin(output, branch.node)
        copy_example(output, branch.node)
        if convolution is not None:
            mark_sum(convolution)
        mark_layer(output, options)
        output = restore_strides(graph, branch.node, conv.node, output, options, branch.first_norm)
    copy_example(output, branch.node)
    branch.node.replace_all_uses_with(output)
    nodes = set(branch.own)
    erase(graph, *[node for node in reversed(graph.nodes) if node in nodes])
    return output


def _as_one_function(
    graph: fx.Graph, branch: Branch, x: fx.Node | None, tensors: list[Any], options: Options, scales: Scales | None
) -> fx.Node:
    """Add a function that merges and convolves, and merges again in backward. Return its output.

    tensors: Those that `scales` does not stand for.
    """
    conv, grid = branch.largest
    call = Calls(graph)
    dilation = by_onednn(conv, graph, options)
    if scales is not None and scales.weight is not None:
        return graph.call_function(conv.function, (x, scales.weight, scales.bias), dict(conv.options) | dilation)
    keywords: dict[str, Any] = {"groups": conv.groups} | rounding_keywords(conv, _rounding(branch, graph))
    keywords |= {"stride": grid.stride, "padding": grid.padding, "dilation": grid.dilation} | dilation
    keywords |= {"kernel_merges": False} if options.kernel == "torch" else {}
    if scales is not None:
        return call(branches_autograd.conv_with_scales, x, tensors, scales.scales, scales.bias, **keywords)
    expression = positions(branch.expression, branch.values())
    return call(branches_autograd.conv_with_branches, x, tensors, expression, **keywords)


def _as_fold_and_convolution(
    graph: fx.Graph, branch: Branch, x: fx.Node | None, tensors: list[Any], options: Options, prescale: bool
) -> tuple[fx.Node, fx.Node]:
    """Add a fold and a convolution. Return the output and the convolution."""
    conv, grid = branch.largest
    call = Calls(graph)
    values = branch.values()
    if options.codegen:
        tensors = [
            call(strides.preserve_strides, node) if copied_if_saved(value, graph) else node
            for value, node in zip(values, tensors, strict=True)
        ]
    dtype = _rounding(branch, graph)
    largest = tensor_of(conv.weight, graph)
    prescaled = input_last = False
    if prescale and largest is not None:
        rounded = dtype or largest.dtype
        prescaled = rounded == torch.float16
        input_last = branch.reads_input and merge_reference.adds_input_last(largest, rounded)
    keywords: dict[str, Any] = {"groups": conv.groups} | ({} if dtype is None else {"dtype": dtype})
    keywords |= {} if prescale else {"prescale": False}
    keywords |= {"input_last": True} if input_last else {}
    keywords |= {"kernel_merges": True} if kernel_merges(branch, graph, options) else {}
    name = f"{branch.node.name}_fold"
    expression = positions(branch.expression, values)
    folded = call(branches.fold_branches, tensors, expression, grid.kernel, name=name, **keywords)
    results = 3 if prescaled or input_last else 2
    weight, bias, *scale = (call(operator.getitem, folded, index) for index in range(results))
    mark(call.added, branch.node, options)
    own = dict(conv.options) | by_onednn(conv, graph, options)
    convolution = graph.create_node(
        "call_function", conv.function, (x, weight, bias), own, name=f"{branch.node.name}_conv"
    )
    copy_example(convolution, branch.node)
    copy_origin(convolution, conv.node)
    if input_last:
        return graph.call_function(merge_reference.add_input, (convolution, x, *scale)), convolution
    if prescaled:
        return graph.call_function(fp16_range.scaled_back, (convolution, *scale)), convolution
    return convolution, convolution


def kernel_merges(branch: Branch, graph: fx.Graph, options: Options) -> bool:
    """Return whether a generated kernel merges the weights. Count the reason if it could run but cannot merge these.

    In graphs that Inductor compiles only with ``kernel="triton"``: each block is a launch of its own and its scales are
    stacked for it, which takes more launches than plain torch and moves as many bytes, see docs/experiments.md.

    Raises:
        OptionError: ``kernel="triton"``, and no kernel can run.
    """
    weights = [tensor_of(conv.weight, graph) for conv, _ in branch.convs]
    known = [weight for weight in weights if weight is not None]
    if options.codegen and options.kernel != "triton":
        return False
    if not known or not use_kernel(options.kernel, known[0].device) or len(known) < len(weights):
        return False
    if any(map(is_functorch_wrapped_tensor, known)):  # no operation on it is allowed outside its transform
        count("decomposed:inside a torch.func transform")
        return False
    scales = torch.empty(len(known) + branch.reads_input, known[0].shape[0], device="meta")
    try:
        merge_spec_of(known, scales, _rounding(branch, graph) or known[0].dtype)
    except Unsupported as error:
        count(f"decomposed:{error}")
        return False
    return True


def _rounding(branch: Branch, graph: fx.Graph) -> torch.dtype | None:
    """Return the dtype of the sum if some weight has another, as under autocast, else None."""
    dtype = dtype_of(branch.node, graph)
    weights = {tensor.dtype for conv, _ in branch.convs if (tensor := tensor_of(conv.weight, graph)) is not None}
    return None if weights == {dtype} else dtype
