"""Find the values whose strides decide what a write reaches.

`contiguous`, `reshape` and some others return a view of their input or a copy of it, as its strides allow. If one of
the two is written to and the other is read afterwards, the graph computes other values from other strides. Under `vmap`
convolutions, products of matrices and other layers keep a view or a copy for backward in the same way, and a write to a
view is an error of autograd.

A fold under `vmap` returns the strides of the convolution, and the BatchNorm may have others. So what such a value is
computed from does not fold.
"""

from typing import TYPE_CHECKING, Any

from torch import fx

from .calls import may_train
from .views import called_name

if TYPE_CHECKING:
    from .mutation import Mutations

_COPYING_AT_TIMES = {"contiguous", "flatten", "ravel", "reshape", "reshape_as"}
_PARTS_OF_KEEPING = ["attention", "bilinear", "conv", "einsum", "grid_sample", "inner", "linear", "matmul", "mm"]
_PARTS_OF_KEEPING += ["norm", "pool", "tensordot"]
"""Parts of the names of what keeps its input for backward, and reshapes it under `vmap`."""


def stride_dependent(graph: fx.Graph, mutations: "Mutations") -> dict[fx.Node, fx.Node]:
    """Return the nodes whose strides decide what a write reaches, each with the call that returns a view or a copy."""
    found: dict[fx.Node, fx.Node] = {}
    last: dict[Any, int] = {}  # the last write to a piece of memory
    for effect in mutations.effects:
        for value in effect.reached:
            if value is not None:
                last.update(dict.fromkeys(mutations.memory(value) - {None}, mutations.order[effect.node]))
    for call in graph.nodes if last else ():
        if _keeps_written(call, graph, mutations, last) or _copies_at_times(call, graph, mutations, last):
            waiting = list(call.all_input_nodes)
            while waiting:
                node = waiting.pop()
                if node not in found:
                    found[node] = call
                    waiting += node.all_input_nodes
    return found


def _is_written_after(call: fx.Node, value: fx.Node, mutations: "Mutations", last: dict[Any, int]) -> bool:
    return any(last.get(each, -1) > mutations.order[call] for each in mutations.memory(value))


def _keeps_written(call: fx.Node, graph: fx.Graph, mutations: "Mutations", last: dict[Any, int]) -> bool:
    """Return whether a call may keep a view of an activation for backward, or a copy, and a later call writes to it."""
    name = called_name(call)
    if not any(part in name for part in _PARTS_OF_KEEPING) or not may_train(call, graph):
        return False
    kept = [node for node in call.all_input_nodes if node.op not in ("placeholder", "get_attr")]
    return any(_is_written_after(call, node, mutations, last) for node in kept)


def _copies_at_times(call: fx.Node, graph: fx.Graph, mutations: "Mutations", last: dict[Any, int]) -> bool:
    """Return whether a call returns a view of its first argument, or a copy, and a write to one is seen in the other.

    The write is seen if it is not to the copy.
    """
    name = called_name(call)
    if name not in _COPYING_AT_TIMES and (name != "to" or "memory_format" not in call.kwargs):
        return False
    if not _is_written_after(call, call, mutations, last):
        return False
    memory = mutations.memory(call) - {None}
    views = {node for node in graph.nodes if call in mutations.memory(node)}
    others = {node for node in graph.nodes if node not in views and not memory.isdisjoint(mutations.memory(node))}
    for effect in mutations.after(call):
        for written in effect.reached:
            if written is None or memory.isdisjoint(mutations.memory(written)):
                continue
            unwritten = others if call in mutations.memory(written) else views
            if any(user > effect.node for node in unwritten for user in node.users):
                return True
    return False
