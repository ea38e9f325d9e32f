"""Puts the folded convolution in the place of each pair, in a graph that stays ordinary Python.

For a pair ``y = conv(x, W, b); z = bn(y)`` the graph then says

    folded = fold(W, b, bn_weight, bn_bias, running_mean, running_var, eps, ...)
    z = conv(x, folded[0], folded[1], ...)

with the fold a node of its own, so that the partitioner of AOTAutograd can be told to compute it again in backward.
"""

import operator
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from .algebra import fold
from .calls import Attribute, Value, tensor_of
from .layout import pinned, would_be_copied
from .match import Pair
from .options import Options

# Regions that are recomputed together carry one number. The partitioner keeps a tensor that crosses into a region of a
# higher number, and nothing crosses out of a fold into another, so that one number serves them all.
_RECOMPUTED = {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": 0}


def replace(graph: fx.Graph, pairs: Iterable[Pair], options: Options) -> None:
    """Replace each pair in the graph by its folded convolution. The caller recompiles the module."""
    replaced: dict[fx.Node, fx.Node] = {}  # what a pair reads may be what an earlier pair has put in place
    for pair in pairs:
        replaced[pair.bn.output] = _replace(graph, pair, replaced, options)


def _replace(graph: fx.Graph, pair: Pair, replaced: dict[fx.Node, fx.Node], options: Options) -> fx.Node:
    conv, bn = pair.conv, pair.bn
    with graph.inserting_before(bn.node):
        values = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        parameters = [_read(graph, value, replaced) for value in values]
        recomputed: list[fx.Node] = []
        if options.recompute and _is_input(conv.weight, graph):
            recomputed.append(graph.call_function(pinned, (parameters[0],)))
            parameters[0] = recomputed[0]
        keywords: dict[str, Any] = {"transposed": True, "groups": conv.groups} if conv.transposed else {}
        if pair.dtype is not None:
            keywords["dtype"] = pair.dtype
        folded = graph.create_node("call_function", fold, (*parameters, bn.eps), keywords, name=f"{bn.node.name}_fold")
        weight = graph.call_function(operator.getitem, (folded, 0))
        bias = graph.call_function(operator.getitem, (folded, 1))
        x = _read(graph, conv.input, replaced)
        if conv.pad is not None:
            x = graph.call_function(F.pad, (x, conv.pad[0]), {"mode": conv.pad[1]})
        output = graph.create_node(
            "call_function", conv.function, (x, weight, bias), dict(conv.options), name=f"{bn.node.name}_conv"
        )
    for node in (*recomputed, folded, weight, bias):
        _describe(node, bn.node)
        if options.recompute:
            node.meta.update(_RECOMPUTED)
    _describe(output, conv.node)
    for key in ("example_value", "val", "tensor_meta"):
        if key in bn.output.meta:
            output.meta[key] = bn.output.meta[key]
    bn.output.replace_all_uses_with(output)
    _erase(graph, bn.output, bn.node, conv.node)
    return output


def _is_input(value: Value, graph: fx.Graph) -> bool:
    """Whether it is a parameter that comes into the graph, and that Inductor would copy to keep it."""
    if not isinstance(value, fx.Node) or value.op != "placeholder":
        return False
    weight = tensor_of(value, graph)
    return weight is not None and would_be_copied(weight)


def _read(graph: fx.Graph, value: Value, replaced: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The node that stands for a value; an attribute of a module gets one, from which it is read on every call."""
    if isinstance(value, Attribute):
        return graph.create_node("get_attr", value.path)  # graph.get_attr warns where the path is through a submodule
    return None if value is None else replaced.get(value, value)


def _describe(node: fx.Node, source: fx.Node) -> None:
    """Where the node comes from, for tracebacks and for the names of generated kernels."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def _erase(graph: fx.Graph, *nodes: fx.Node) -> None:
    """Erase each node, and before it the getitems that nobody uses any more."""
    for node in dict.fromkeys(nodes):
        for user in list(node.users):
            if not user.users:
                graph.erase_node(user)
        graph.erase_node(node)
