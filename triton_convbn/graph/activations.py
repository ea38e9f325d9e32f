"""Let the convolutions after an activation save its input instead of its output, in graphs that run in eager mode."""

from torch import fx

from ..ops.activation import ACTIVATIONS, CONVOLUTIONS, COPYING, conv_of_activation, name_of
from .calls import may_train
from .dialects import read_batch_norm, read_sum


def save_activation_inputs(graph: fx.Graph) -> None:
    """Rewrite every convolution of an activation's output as `conv_of_activation`, where that saves memory.

    It does if nothing else that reads the output saves it: a sum does not. An activation in place that would save a
    copy of its input is first made one that is not.
    """
    for node in list(graph.nodes):
        if not _is(node, ACTIVATIONS) or not isinstance(node.args[0], fx.Node):
            continue
        if not may_train(node, graph):
            continue
        convs = [user for user in node.users if _reads_first(user, node)]
        if not convs or not all(user in convs or read_sum(user) is not None for user in node.users):
            continue
        if not _is_in_place(node) or _make_copying(node):
            for conv in convs:
                what = name_of(conv.target), name_of(node.target), node.args, node.kwargs
                conv.args, conv.target = (*what, *conv.args), conv_of_activation


def _is(node: fx.Node, functions: object) -> bool:
    """Return whether a node calls one of the functions, with a positional argument."""
    if node.op != "call_function" or not node.args or "out" in node.kwargs:
        return False
    return isinstance(functions, dict) and functions.get(name_of(node.target)) is node.target


def _reads_first(user: fx.Node, node: fx.Node) -> bool:
    """Return whether a convolution convolves the node, and reads it as nothing else."""
    others = [*user.args[1:], *user.kwargs.values()]
    return _is(user, CONVOLUTIONS) and user.args[0] is node and node not in others


def _is_in_place(node: fx.Node) -> bool:
    return any(value is True for value in (*node.args[1:], node.kwargs.get("inplace")))


def _make_copying(node: fx.Node) -> bool:
    """Let an activation return a new tensor if nothing else sees its input. Return whether it does."""
    before = node.args[0]
    assert isinstance(before, fx.Node)
    made_here = _is(before, CONVOLUTIONS) or before.target is conv_of_activation or read_batch_norm(before) is not None
    if node.target not in COPYING or not made_here or len(before.users) > 1:
        return False
    if node.args[-1] is True:  # the last parameter of each of these
        node.args = node.args[:-1]
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
    return True
