"""Compute the gradient of a large folded weight by a contiguous convolution where Inductor writes C++.

Convolutions on a CPU run channels_last. From a channels_last convolution torch takes a contiguous dW', which it copies
to channels_last (`mkldnn_convolution_backward_weights`), and the gradient of a contiguous parameter is written
contiguous again. If the weight is larger than the activations, it is less to copy these. So this pass computes dx and
dW' by two calls, as torch does within one.

A training step of ResNet-18 (batch 4, one thread) takes 117, before 127 ms. See docs/experiments.md. Sums whose weights
are that large mostly train contiguous, see `layout_of_sums`.
"""

import torch
from torch import Tensor, fx

from . import nodes
from .context import PassContext
from .cpu_layout import is_channels_last, preserved_weights, with_strides

_BACKWARD = torch.ops.aten.convolution_backward.default


def split_conv_backward(graph: fx.Graph, context: PassContext) -> None:
    """Split the backward of convolutions with a large folded weight. Values do not change but by rounding."""
    if context.is_body:  # torch compares the strides of its results with those of a carry, or of another branch
        return
    for backward in graph.find_nodes(op="call_function", target=_BACKWARD):
        grad, x, weight, *rest, (x_trains, weight_trains, bias_trains) = backward.args
        if not weight_trains or not is_channels_last(x) or not _is_large(weight, grad, x):
            continue
        parameter = _contiguous_weight(weight)
        if parameter is None:
            continue
        with graph.inserting_before(backward):
            contiguous = [with_strides(graph, node, node.meta["val"].contiguous()) for node in (grad, x)]
            arguments = *contiguous, parameter, *rest, [False, True, bias_trains]
            calls = [nodes.call(graph, backward, _BACKWARD, *arguments)] * 3
            if x_trains:
                calls[0] = nodes.call(graph, backward, _BACKWARD, grad, x, weight, *rest, [True, False, False])
        for result in list(backward.users):
            number = result.args[1]
            result.replace_input_with(backward, calls[number])
            result.meta["val"] = calls[number].meta["val"][number]
        graph.erase_node(backward)


def _is_large(weight: fx.Node, *activations: fx.Node) -> bool:
    """Return whether a kernel of several elements has more of them than the activations."""
    example: Tensor = weight.meta["val"]
    if example.ndim != 4 or tuple(example.shape[2:]) == (1, 1):  # these are stored alike in both layouts
        return False
    if example.dtype != torch.float32:  # the others were not measured
        return False
    others = [each.meta["val"] for each in activations]
    if not all(isinstance(size, int) for each in (example, *others) for size in each.shape):
        return False  # comparing dynamic sizes adds a guard, and strides in a graph cannot be symbols
    return bool(example.numel() > sum(each.numel() for each in others))


def _contiguous_weight(weight: fx.Node) -> fx.Node | None:
    """Return a parameter that looks as the folded weight does. The gradient of a weight does not read its values."""
    example: Tensor = weight.meta["val"]
    if not example.is_contiguous():
        return None
    like = (each for each in preserved_weights(weight) if each.meta["val"].shape == example.shape)
    return next((each for each in like if each.meta["val"].dtype == example.dtype), None)
