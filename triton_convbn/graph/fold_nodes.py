"""Add the nodes that fold a group of pairs.

If kernels fold the group, one node of ``triton_convbn::fold`` serves all its pairs. Otherwise each pair is one call of
plain torch. A fold that is rounded to fp16 is divided by powers of two, see `fp16_range.prescale`.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..compile_context import LAYER, MARK, SUM, compiling
from ..kernels.inputs import FoldInputs
from ..ops import fp16_range, library, reference, strides
from ..ops.packed_pairs import PackedPairs
from ..options import Options
from .calls import Attribute, ConvCall, Value, may_train, tensor_of
from .findings import Pair
from .grouping import Group, fold_inputs

# Regions that are recomputed together have one number. The partitioner saves a tensor that crosses into a region with a
# higher number. No tensor goes from one fold to another, so one number serves all folds.
_RECOMPUTED = {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": 0}

# Vectors. Recomputing them would add 53 launches to ResNet-50's backward.
_SAVED = (fp16_range.prescale, fp16_range.divided, reference.compose)

GENERAL = (torch.convolution, torch.ops.aten.convolution.default)
"""Autocast does not change these on a CPU."""

Folded = tuple[fx.Node, fx.Node, fx.Node | None]
"""The folded weight and bias, and the powers of two to multiply the convolution's output by, if any."""


class Calls:
    """Add calls of functions to a graph, at its current place.

    Attributes:
        added: The nodes, in order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.added = graph, list[fx.Node]()

    def __call__(self, function: Any, *arguments: Any, name: str | None = None, **keywords: Any) -> fx.Node:
        self.added.append(self.graph.create_node("call_function", function, arguments, keywords, name=name))
        return self.added[-1]


def insert_fold(
    graph: fx.Graph, group: Group, replaced: dict[fx.Node, fx.Node], options: Options, prescale: bool
) -> dict[fx.Node, Folded]:
    """Add the fold of a group before its first BatchNorm. Return the results by convolution."""
    first = group.pairs[0].bn.node
    call = Calls(graph)

    def inputs_of(pair: Pair) -> FoldInputs:
        inputs = fold_inputs(pair, graph, lambda value: read(graph, value, replaced), call)
        if options.codegen and copied_if_saved(pair.conv.weight, graph):
            inputs = inputs._replace(weight=call(strides.preserve_strides, inputs.weight))
        return inputs if prescale else inputs._replace(prescale=False)

    with graph.inserting_before(first):
        inputs = list(map(inputs_of, group.pairs))
        name = f"{first.name}_fold"
        if group.kernel:
            folded = _fold_by_operator(call, graph, group, inputs, name)
        else:
            cpp = options.codegen and _compiles_to_cpp(group.pairs[0].conv.weight, graph)
            function = strides.fold_vectorized if cpp else reference.fold_reference
            folded = [_fold_in_torch(call, function, inputs[0], name)]
    mark(call.added, first, options)
    return {pair.conv.node: each for pair, each in zip(group.pairs, folded, strict=True)}


def _fold_by_operator(call: Any, graph: fx.Graph, group: Group, inputs: list[FoldInputs], name: str) -> list[Folded]:
    """Add one operator for the group.

    Autograd treats all outputs of an operator as differentiable if one of them is. So outputs without a gradient are
    detached: otherwise the gradients of frozen biases and of powers of two would be computed, at the cost of a sum over
    the convolution's output.
    """
    packed = PackedPairs.pack(inputs)
    source = call(library.fold_op, *packed, name=name)
    outputs = [call(operator.getitem, source, index) for index in range(2 * len(inputs) + sum(packed.prescale))]
    return [
        (
            weight,
            call(torch.detach, bias) if _has_frozen_bias(pair, graph) else bias,
            None if power is None else call(torch.detach, power),
        )
        for pair, (weight, bias, power) in zip(group.pairs, packed.by_pair(outputs), strict=True)
    ]


def _fold_in_torch(call: Any, function: Any, inputs: FoldInputs, name: str) -> Folded:
    """Add one call of `function`, which is `reference.fold_reference` or equivalent."""
    power: fx.Node | None = None
    if inputs.prescale:
        power = call(fp16_range.prescale, inputs.bn_weight, inputs.bn_bias, inputs.running_var, inputs.eps)
        bn_weight = call(fp16_range.divided, inputs.bn_weight, power)
        bn_bias = None if inputs.bn_bias is None else call(fp16_range.divided, inputs.bn_bias, power)
        inputs = inputs._replace(bn_weight=bn_weight, bn_bias=bn_bias)
    keywords: dict[str, Any] = {"transposed": True, "groups": inputs.groups} if inputs.transposed else {}
    keywords |= {} if inputs.out_dtype is None else {"dtype": inputs.out_dtype}
    source = call(function, *inputs[:7], name=name, **keywords)
    return call(operator.getitem, source, 0), call(operator.getitem, source, 1), power


def _compiles_to_cpp(weight: Value, graph: fx.Graph) -> bool:
    """Return whether Inductor writes C++ for what is computed from this weight."""
    tensor = tensor_of(weight, graph)
    return compiling() and tensor is not None and tensor.device.type == "cpu"


def _has_frozen_bias(pair: Pair, graph: fx.Graph) -> bool:
    """Return whether the folded bias needs no gradient. Only a compiler recompiles if its parameters train later."""
    affine = (value for bn in pair.norms for value in (bn.weight, bn.bias))
    return compiling() and not any(may_train(value, graph) for value in (pair.conv.bias, *affine))


def copied_if_saved(value: Value, graph: fx.Graph) -> bool:
    """Return whether the value is an input of the graph that Inductor would copy to save it for backward."""
    if not isinstance(value, fx.Node) or value.op != "placeholder":
        return False
    weight = tensor_of(value, graph)
    return weight is not None and strides.would_be_copied(weight)


def rounding_keywords(conv: ConvCall, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return what tells a function that folds and convolves which dtype to round to, as keywords."""
    return ({} if dtype is None else {"dtype": dtype}) | ({"general": True} if conv.function in GENERAL else {})


def read(graph: fx.Graph, value: Value, replaced: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """Return a node with the value. An attribute of a module is read again at every call."""
    if isinstance(value, fx.Node) and value.op == "get_attr":
        value = Attribute(str(value.target))  # the node may be after the place where it is read now
    if isinstance(value, Attribute):
        return graph.create_node("get_attr", value.path)  # graph.get_attr warns about paths through submodules
    return None if value is None else replaced.get(value, value)


def copy_origin(node: fx.Node, source: fx.Node) -> None:
    """Copy what tracebacks and the names of generated kernels refer to, and the user's annotations.

    ``meta["custom"]`` has the annotations of `torch.fx.traceback.annotate` and of activation memory budgets.
    """
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "custom"):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def mark(nodes: Sequence[fx.Node], source: fx.Node, options: Options) -> None:
    """Mark the nodes of a fold for the partitioner and for the passes after autograd, with the origin of `source`."""
    for node in nodes:
        copy_origin(node, source)
        _annotate(node, MARK, "fold")
        # `preserve_strides` is always recomputed: saved, its result would be a copy of the weight.
        if (options.recompute and node.target not in _SAVED) or node.target is strides.preserve_strides:
            node.meta.update(_RECOMPUTED)


def mark_layer(node: fx.Node, options: Options) -> None:
    """Let backward compute again what follows the node, see `post_grad.recompute`."""
    if options.recompute_activations and options.codegen:
        _annotate(node, LAYER)


def mark_sum(node: fx.Node) -> None:
    """Mark the convolution that a sum of branches became, see `post_grad.layout_of_sums`."""
    _annotate(node, SUM)


def _annotate(node: fx.Node, key: str, value: Any = True) -> None:
    """Add a key to what AOTAutograd copies to the nodes that it traces this one to, if it will."""
    if compiling():
        node.meta["custom"] = node.meta.get("custom", {}) | {key: value}


def copy_example(node: fx.Node, source: fx.Node) -> None:
    """Copy the example of the result."""
    for key in ("example_value", "val", "tensor_meta"):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def erase(graph: fx.Graph, *nodes: fx.Node) -> None:
    """Erase each node, together with its unused getitems and the attributes that only it read."""
    for node in dict.fromkeys(nodes):
        for user in list(node.users):
            if not user.users:
                graph.erase_node(user)
        attributes = [each for each in node.all_input_nodes if each.op == "get_attr"]
        graph.erase_node(node)
        for each in attributes:
            if not each.users:
                graph.erase_node(each)
