"""Puts the folded convolution in the place of each pair, in a graph that stays ordinary Python.

For a pair ``y = conv(x, W, b); z = bn(y)`` the graph then says

    folded = fold(W, b, bn_weight, bn_bias, running_mean, running_var, eps, ...)
    z = conv(x, folded[0], folded[1], ...)

with the fold a node of its own, so that the partitioner of AOTAutograd can be told to compute it again in backward.
Where a kernel computes it, one node of ``triton_convbn::fold`` serves a group of pairs. Where nothing compiles the
graph (``codegen=False``) there is no partitioner, and fold and convolution are one function that does it (`refold`).
A fold that is rounded to fp16 is over powers of two, which the convolution's output is multiplied by: see
`reference.prescale`.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..compile_context import MARK, compiles_to_cpp, compiling
from ..kernels.inputs import FoldInputs
from ..ops import autograd, library, reference, strides
from ..ops.packed_pairs import PackedPairs
from ..options import Options
from .calls import Attribute, Value, may_train, tensor_of
from .grouping import Group, group, layout_of, needs_prescale
from .match import Pair, removable_nodes

# Regions that are recomputed together carry one number. The partitioner keeps a tensor that crosses into a region of a
# higher number, and nothing crosses out of a fold into another, so that one number serves them all.
_RECOMPUTED = {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": 0}


Folded = tuple[fx.Node, fx.Node, fx.Node | None]
"""The weight and bias to convolve with, and the powers of two that the result is to be multiplied by, if any."""


def replace(graph: fx.Graph, pairs: Sequence[Pair], options: Options, prescale: bool = True) -> None:
    """Replace each pair in the graph by its folded convolution. The caller recompiles the module.

    prescale: keep folds in fp16 in range, see `reference.prescale`; not for folds whose values the caller looks at.
    Raises: OptionError, where ``kernel="triton"`` insists on what cannot run.
    """
    groups = {each.pairs[0].conv.node: each for each in group(graph, pairs, options)}
    folded: dict[fx.Node, Folded] = {}  # by the convolution
    replaced: dict[fx.Node, fx.Node] = {}  # what a pair reads may be what an earlier pair has put in place
    for _, each in itertools.groupby(pairs, lambda pair: pair.bn.node):
        own = list(each)
        for pair in own:
            if options.recompute and not options.codegen:
                convolution = _refolded(graph, pair, replaced, options)
            else:
                if pair.conv.node in groups:
                    folded |= _fold(graph, groups[pair.conv.node], replaced, options, prescale)
                *tensors, power = folded[pair.conv.node]
                convolution = _Convolution(pair.conv.function, tuple(tensors), {}, power)
            replaced[pair.conv.node] = _convolve(graph, pair, replaced, convolution)
        replaced[own[0].bn.output] = _leave_out(graph, own, replaced)


class _Convolution(NamedTuple):
    """What to call with x, these tensors, and the convolution's options and these keywords; power: see `Folded`."""

    function: Any
    tensors: tuple[Any, ...]
    keywords: dict[str, Any]
    power: fx.Node | None = None


def _refolded(graph: fx.Graph, pair: Pair, replaced: dict[fx.Node, fx.Node], options: Options) -> _Convolution:
    """The convolution that folds by itself, in forward and again in backward."""
    with graph.inserting_before(pair.bn.node):
        inputs = _inputs(graph, pair, replaced, graph.call_function)
    keywords: dict[str, Any] = {"transposed": pair.conv.transposed, "groups": pair.conv.groups}
    keywords |= {} if pair.dtype is None else {"dtype": pair.dtype}
    keywords |= {"kernel": False} if options.kernel == "torch" else {}
    return _Convolution(autograd.conv_with_fold, inputs[:7], keywords)


def _fold(
    graph: fx.Graph, group: Group, replaced: dict[fx.Node, fx.Node], options: Options, prescale: bool
) -> dict[fx.Node, Folded]:
    """The nodes that fold a group, ahead of its first pair."""
    first = group.pairs[0].bn.node
    added: list[fx.Node] = []

    def call(
        function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None, name: Any = None
    ) -> fx.Node:
        added.append(graph.create_node("call_function", function, arguments, keywords or {}, name=name))
        return added[-1]

    with graph.inserting_before(first):
        inputs = [
            _inputs(graph, pair, replaced, call)._replace(prescale=prescale and needs_prescale(pair, graph))
            for pair in group.pairs
        ]
        inputs = [
            each._replace(weight=call(strides.preserve_strides, (each.weight,)))
            if options.codegen and _is_input(pair.conv.weight, graph)
            else each
            for each, pair in zip(inputs, group.pairs, strict=True)
        ]
        name = f"{first.name}_fold"
        if group.kernel:
            folded = _by_kernel(call, graph, group, inputs, name)
        else:
            cpp = options.codegen and compiles_to_cpp(group.pairs[0].conv.weight, graph)
            folded = [_in_torch(call, strides.fold_vectorized if cpp else reference.fold_reference, inputs[0], name)]
    for node in added:
        _describe(node, first)
        if compiling():
            node.meta["custom"] = node.meta.get("custom", {}) | {MARK: "fold"}
        kept = node.target in (
            reference.prescale,
            reference.divided,
        )  # vectors, and 53 launches in ResNet-50's backward
        if (options.recompute and not kept) or node.target is strides.preserve_strides:  # kept, that would be a copy
            node.meta.update(_RECOMPUTED)
    return {pair.conv.node: each for pair, each in zip(group.pairs, folded, strict=True)}


def _by_kernel(call: Any, graph: fx.Graph, group: Group, inputs: list[FoldInputs], name: str) -> list[Folded]:
    """One operator for the group.

    Autograd takes all that an operator returns for differentiable as soon as something is. So what has no gradient is
    detached: else that of a frozen bias, or of a power of two, would be summed through all that the convolution
    returns, for nobody.
    """
    inputs = [
        each._replace(memory_format=layout_of(pair, graph)) for each, pair in zip(inputs, group.pairs, strict=True)
    ]
    columns = PackedPairs.pack(inputs)
    source = call(library.fold_op, tuple(columns), name=name)
    taken = [call(operator.getitem, (source, index)) for index in range(2 * len(inputs) + sum(columns.prescale))]
    return [
        (
            weight,
            call(torch.detach, (bias,)) if _is_frozen(pair, graph) else bias,
            None if power is None else call(torch.detach, (power,)),
        )
        for pair, (weight, bias, power) in zip(group.pairs, columns.by_pair(taken), strict=True)
    ]


def _in_torch(call: Any, function: Any, inputs: FoldInputs, name: str) -> Folded:
    """One call of this function, which is `reference.fold_reference` or does the same."""
    power: fx.Node | None = None
    if inputs.prescale:
        affine = inputs.bn_weight, inputs.bn_bias
        power = call(reference.prescale, (*affine, inputs.running_var, inputs.eps))
        bn_weight = call(reference.divided, (inputs.bn_weight, power))
        bn_bias = None if inputs.bn_bias is None else call(reference.divided, (inputs.bn_bias, power))
        inputs = inputs._replace(bn_weight=bn_weight, bn_bias=bn_bias)
    keywords: dict[str, Any] = {"transposed": True, "groups": inputs.groups} if inputs.transposed else {}
    keywords |= {} if inputs.out_dtype is None else {"dtype": inputs.out_dtype}
    source = call(function, inputs[:7], keywords, name)
    return call(operator.getitem, (source, 0)), call(operator.getitem, (source, 1)), power


def _inputs(graph: fx.Graph, pair: Pair, replaced: dict[fx.Node, fx.Node], call: Callable[..., fx.Node]) -> FoldInputs:
    """What the pair's fold reads, as nodes: of a BatchNorm of several convolutions, this one's slice."""
    conv = pair.conv
    vectors: list[Any] = [_read(graph, value, replaced) for value in pair.vectors]
    if pair.channels is not None:
        vectors = [None if vector is None else call(torch.narrow, (vector, 0, *pair.channels)) for vector in vectors]
    own: list[Any] = [_read(graph, value, replaced) for value in (conv.weight, conv.bias)]
    eps: Any = pair.bn.eps
    return FoldInputs(*own, *vectors, eps, conv.transposed, conv.groups, pair.dtype)


def _convolve(graph: fx.Graph, pair: Pair, replaced: dict[fx.Node, fx.Node], convolution: _Convolution) -> fx.Node:
    """The convolution with folded parameters, ahead of the BatchNorm. It takes the place of the other."""
    conv, bn = pair.conv, pair.bn
    with graph.inserting_before(bn.node):
        x = _read(graph, conv.input, replaced)
        if conv.pad is not None:
            x = graph.call_function(F.pad, (x, conv.pad[0]), {"mode": conv.pad[1]})
            _describe(x, conv.node)
        name = f"{bn.node.name}_conv"
        function, tensors, keywords, _ = convolution
        output = graph.create_node("call_function", function, (x, *tensors), {**conv.options, **keywords}, name=name)
        outputs = [output]
        if convolution.power is not None:
            linear: dict[str, Any] = {"linear": True} if conv.linear else {}
            outputs.append(graph.call_function(reference.scaled_back, (output, convolution.power), linear))
    for output in outputs:
        _describe(output, conv.node)
        _copy_values(output, conv.node)
    conv.node.replace_all_uses_with(output)
    _erase(graph, conv.node)
    return output


def _leave_out(graph: fx.Graph, pairs: Sequence[Pair], replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    """Take out a BatchNorm that its convolutions have taken over. Returns what stands for its output."""
    bn, steps = pairs[0].bn, pairs[0].steps
    for step in steps:  # which read the folded convolutions, further down than those that they replace
        bn.node.prepend(step)
    last = replaced.get(bn.input, bn.input)
    _copy_values(last, bn.output)
    gone = removable_nodes(bn)
    bn.output.replace_all_uses_with(last)
    _erase(graph, bn.output, bn.node)
    _erase(graph, *[part for part in reversed(bn.parts) if part in gone])
    return last


def _copy_values(node: fx.Node, source: fx.Node) -> None:
    """What is known of the result: the fake tensor that it is."""
    for key in ("example_value", "val", "tensor_meta"):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def _is_frozen(pair: Pair, graph: fx.Graph) -> bool:
    """Whether the folded bias depends on nothing that requires a gradient, now or later: who rewrites a graph by hand
    may let its parameters train afterwards, and only a compiler watches that."""
    return compiling() and not any(may_train(value, graph) for value in (pair.conv.bias, pair.bn.weight, pair.bn.bias))


def _is_input(value: Value, graph: fx.Graph) -> bool:
    """Whether it is a parameter that comes into the graph, and that Inductor would copy to keep it."""
    if not isinstance(value, fx.Node) or value.op != "placeholder":
        return False
    weight = tensor_of(value, graph)
    return weight is not None and strides.would_be_copied(weight)


def _read(graph: fx.Graph, value: Value, replaced: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The node that stands for a value; an attribute of a module gets one, from which it is read on every call."""
    if isinstance(value, fx.Node) and value.op == "get_attr":
        value = Attribute(str(value.target))  # it may stand further down than where it is read
    if isinstance(value, Attribute):
        return graph.create_node("get_attr", value.path)  # graph.get_attr warns where the path is through a submodule
    return None if value is None else replaced.get(value, value)


def _describe(node: fx.Node, source: fx.Node) -> None:
    """Copy where the node comes from, for tracebacks and names of generated kernels, and what the user annotated it with.

    ``meta["custom"]`` holds the annotations of `torch.fx.traceback.annotate` and of activation memory budgets.
    """
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "custom"):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def _erase(graph: fx.Graph, *nodes: fx.Node) -> None:
    """Erase each node, before it the getitems that nobody uses any more, and after it the attributes it alone read."""
    for node in dict.fromkeys(nodes):
        for user in list(node.users):
            if not user.users:
                graph.erase_node(user)
        read = [each for each in node.all_input_nodes if each.op == "get_attr"]
        graph.erase_node(node)
        for each in read:
            if not each.users:
                graph.erase_node(each)
