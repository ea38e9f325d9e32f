"""Set the layouts of folded weights and of weight gradients where Inductor writes C++ for plain torch's fold.

In such a backward graph a fold is ``mul(W, s)``, where W has passed through `strides.preserve_strides`. Its gradients
are ``mul(dW', s)`` and sums of ``mul(dW', W)``. Convolutions on a CPU run channels_last, but most parameters are
contiguous. This pass writes the gradient ``dW' * s`` with the strides of its parameter, which saves autograd a copy. It
lets the fold write W' channels_last, which saves Inductor a copy.

On ResNet-18, batch 4, one thread, autograd's copies take 0.2 ms instead of 9. Converting dW' once, for both of its
products, is slower: 22 ms instead of 8.
"""

import operator

import torch
from torch import Tensor, fx

from .context import PassContext

_aten, _prims = torch.ops.aten, torch.ops.prims
_CONVERT = _prims.convert_element_type.default
_BACKWARD = _aten.convolution_backward.default


def set_cpu_layouts(graph: fx.Graph, context: PassContext) -> None:
    """Set the layouts of the products that read a contiguous weight on the CPU. Values do not change."""
    for read in [node for node in graph.nodes if _is_preserved_weight(node)]:
        weight: Tensor = read.meta["val"]
        for product in [user for user in read.users if user.target is _aten.mul.Tensor]:
            other = product.args[1] if product.args[0] is read else product.args[0]
            if isinstance(other, fx.Node) and _is_weight_gradient(other):
                for scaled in [user for user in other.users if user is not product and user.target is _aten.mul.Tensor]:
                    gradient = _converted(scaled)
                    _force(graph, gradient, list(gradient.users), weight)
            else:
                folded = _converted(product)
                convolutions = [user for user in folded.users if _is_backward_in_channels_last(user, folded)]
                if convolutions:
                    example: Tensor = folded.meta["val"]
                    _force(graph, folded, convolutions, example.to(memory_format=torch.channels_last))


def _is_preserved_weight(node: fx.Node) -> bool:
    """Return whether the node is `preserve_strides` of a contiguous 4-D weight on the CPU."""
    if node.target is not _aten.as_strided.default or not isinstance(node.args[0], fx.Node):
        return False
    source, weight = node.args[0], node.meta.get("val")
    if source.op != "placeholder" or not isinstance(weight, Tensor) or weight.ndim != 4 or weight.device.type != "cpu":
        return False
    return bool(weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last))


def _is_weight_gradient(node: fx.Node) -> bool:
    """Return whether the node is the weight gradient of a convolution, converted or not."""
    if node.target is _CONVERT and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    source = node.args[0] if node.target is operator.getitem else None
    return bool(isinstance(source, fx.Node) and source.target is _BACKWARD and node.args[1] == 1)


def _converted(node: fx.Node) -> fx.Node:
    """Return the conversion of the node if that is its only user, else the node."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is _CONVERT else node


def _is_backward_in_channels_last(node: fx.Node, weight: fx.Node) -> bool:
    if node.target is not _BACKWARD or node.args[2] is not weight or not isinstance(node.args[1], fx.Node):
        return False
    convolved = node.args[1].meta.get("val")
    if not isinstance(convolved, Tensor) or convolved.ndim != 4 or convolved.is_contiguous():
        return False
    return bool(convolved.is_contiguous(memory_format=torch.channels_last))


def _force(graph: fx.Graph, node: fx.Node, users: list[fx.Node], laid_out: Tensor) -> None:
    """Let the users read the node with the strides of `laid_out`, by the operator that freezing uses for this."""
    with graph.inserting_after(node):
        forced = graph.call_function(_prims.inductor_force_stride_order.default, (node, laid_out.stride()))
    forced.meta.update(node.meta)
    forced.meta["val"] = laid_out.to(node.meta["val"].dtype)
    for user in users:
        user.replace_input_with(node, forced)
        if user.op == "output":
            _set_output_strides(user, forced, laid_out.stride())


def _set_output_strides(output: fx.Node, node: fx.Node, stride: tuple[int, ...]) -> None:
    """Update the strides that Inductor has recorded for an output of the graph."""
    recorded = output.meta.get("original_output_strides")
    if recorded is not None:
        returned = output.args[0]
        output.meta["original_output_strides"] = [
            stride if each is node else before
            for each, before in zip(returned, recorded, strict=True)  # type: ignore[arg-type]
        ]
