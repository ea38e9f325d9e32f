"""Set the layouts of folded weights and of weight gradients where Inductor writes C++ for plain torch's fold.

In such a backward graph a fold is ``mul(W, s)``, where W has passed through `strides.preserve_strides`, and a sum of
branches adds several of these. Their gradients are ``mul(dW', s)`` and sums of ``mul(dW', W)``. Convolutions on a CPU
run channels_last, unless `layout_of_sums` keeps them contiguous, but most parameters are contiguous. This pass writes
the gradient ``dW' * s`` with the strides of its parameter, which saves autograd a copy. It lets the fold write W'
channels_last, which saves the convolution's backward a copy.

On ResNet-18, batch 4, one thread, autograd's copies take 0.2 ms instead of 9. Channels_last, a training step of
repvgg_a0 takes 0.97 to 0.99 of eager's time instead of 1.10.

Converting dW' once, for both of its products, is not faster: its copy takes memory that is new in every step, with
page faults. Without these, repvgg_a0 takes 0.92 instead of 0.95.
"""

import operator

import torch
from torch import Tensor, fx

from .context import PassContext

_aten, _prims = torch.ops.aten, torch.ops.prims
_CONVERT = _prims.convert_element_type.default
_BACKWARD = _aten.convolution_backward.default
_ELEMENTWISE = _aten.mul.Tensor, _aten.add.Tensor, _aten.sub.Tensor, _aten.constant_pad_nd.default, _CONVERT
"""What a folded weight is computed by."""


def set_cpu_layouts(graph: fx.Graph, context: PassContext) -> None:
    """Set the layouts around every weight gradient of a fold on the CPU. Values do not change."""
    for backward in graph.find_nodes(op="call_function", target=_BACKWARD):
        weight = backward.args[2]
        if not isinstance(weight, fx.Node) or not is_channels_last(backward.args[1]) or not preserved_weights(weight):
            continue
        example: Tensor = weight.meta["val"]
        if example.is_contiguous():
            force_strides(graph, weight, [backward], example.to(memory_format=torch.channels_last))
    for gradient, weight in _scaled_gradients(graph).items():
        force_strides(graph, gradient, list(gradient.users), weight)
    for gradient, weight in _gradients_alike(graph).items():
        force_strides(graph, gradient, [graph.output_node()], weight)


def _scaled_gradients(graph: fx.Graph) -> dict[fx.Node, Tensor]:
    """Return every gradient ``dW' * s`` of a preserved weight, and the weight, whose layout it should have."""
    reads = {node: node for node in graph.nodes if _is_preserved_weight(node)}
    reads |= {user: read for read in reads for user in read.users if user.target is _CONVERT}
    found: dict[fx.Node, Tensor] = {}
    for value, read in reads.items():
        factors = [other for product in _products(value) for other in product.all_input_nodes if other is not value]
        for gradient in filter(_is_weight_gradient, factors):
            scaled = [product for product in _products(gradient) if reads.keys().isdisjoint(product.all_input_nodes)]
            found |= {_converted(product): read.meta["val"] for product in scaled}
    return found


def _gradients_alike(graph: fx.Graph) -> dict[fx.Node, Tensor]:
    """Return the gradients of contiguous weights that are channels_last too, and these weights.

    Such are 1 x 1 and depthwise kernels. Inductor and oneDNN give the gradients the strides of channels_last, where MKL
    gives contiguous ones. The elements are stored alike, but DDP warns about other strides.
    AOTAutograd returns a gradient for each input of the forward, in order, and calls these primals_1, primals_2, ...
    """
    inputs = {node.name: node.meta.get("val") for node in graph.find_nodes(op="placeholder")}
    returned, found = graph.output_node().args[0], dict[fx.Node, Tensor]()
    for number, node in enumerate(returned if isinstance(returned, list | tuple) else (), 1):
        weight = inputs.get(f"primals_{number}")
        if not isinstance(node, fx.Node) or not isinstance(weight, Tensor):
            continue
        if node.target in _ELEMENTWISE or _is_weight_gradient(node):
            if weight.device.type != "cpu" or weight.ndim != 4 or node.meta["val"].shape != weight.shape:
                continue
            if weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
                found[node] = weight
    return found


def _products(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is _aten.mul.Tensor]


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


def preserved_weights(node: fx.Node) -> list[fx.Node]:
    """Return the preserved weights that the node is computed from: of a folded weight, those that it folds."""
    seen, waiting = {node}, [node]
    for current in waiting:
        new = set(current.all_input_nodes) - seen if current.target in _ELEMENTWISE else set()
        seen |= new
        waiting += sorted(new)
    return list(filter(_is_preserved_weight, waiting))


def is_channels_last(node: object) -> bool:
    """Return whether a node's result is channels_last and not contiguous as well."""
    example = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(example, Tensor) or example.ndim != 4 or example.is_contiguous():
        return False
    return example.is_contiguous(memory_format=torch.channels_last)


def force_strides(graph: fx.Graph, node: fx.Node, users: list[fx.Node], laid_out: Tensor) -> None:
    """Let the users read the node with the strides of `laid_out`, by the operator that freezing uses for this."""
    with graph.inserting_after(node):
        forced = with_strides(graph, node, laid_out)
    for user in users:
        user.replace_input_with(node, forced)
        if user.op == "output":
            _set_output_strides(user, forced, laid_out.stride())


def with_strides(graph: fx.Graph, node: fx.Node, laid_out: Tensor) -> fx.Node:
    """Add the node's result with the strides of `laid_out`."""
    forced = graph.call_function(_prims.inductor_force_stride_order.default, (node, laid_out.stride()))
    forced.meta.update(node.meta)
    forced.meta["val"] = laid_out.to(node.meta["val"].dtype)
    return forced


def _set_output_strides(output: fx.Node, node: fx.Node, stride: tuple[int, ...]) -> None:
    """Update the strides that Inductor has recorded for an output of the graph."""
    recorded = output.meta.get("original_output_strides")
    if recorded is not None:
        returned = output.args[0]
        output.meta["original_output_strides"] = [
            stride if each is node else before
            for each, before in zip(returned, recorded, strict=True)  # type: ignore[arg-type]
        ]
