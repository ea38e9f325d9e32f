"""Add nodes to a graph after autograd, where every node has an example of its result."""

from typing import Any

from torch import fx

_ORIGIN = ("stack_trace", "nn_module_stack")


def call(graph: fx.Graph, like: fx.Node, target: Any, *arguments: Any, **keywords: Any) -> fx.Node:
    """Add a call and its example. Tracebacks and kernel names attribute it to the origin of `like`."""
    node = graph.call_function(target, arguments, keywords)
    node.meta |= {key: like.meta[key] for key in _ORIGIN if key in like.meta}
    examples = [each.meta["val"] if isinstance(each, fx.Node) else each for each in arguments]
    node.meta["val"] = target(*examples, **keywords)
    return node
