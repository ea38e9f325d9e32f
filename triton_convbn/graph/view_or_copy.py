"""Find the values whose strides decide what a write reaches.

`contiguous`, `reshape` and some others return a view of their input or a copy of it, as its strides allow. If one of
the two is written to and the other is read afterwards, the graph computes other values from other strides. Products of
matrices keep a view or a copy for backward, and a write to a view then is an error of autograd. Under `vmap` a fold
returns the strides of the convolution, and the BatchNorm may have others. So what such a value is computed from does
not fold.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch._ops import OpOverload

from .calls import attribute, may_train

if TYPE_CHECKING:
    from .mutation import Mutations

_NAMES = {"contiguous", "flatten", "ravel", "reshape", "reshape_as"}
_KEEPING = {"__matmul__", "bilinear", "einsum", "inner", "linear", "matmul", "tensordot"}
_MODULES: dict[Any, str] = {nn.Flatten: "flatten", nn.Linear: "linear", nn.Bilinear: "bilinear"}


def stride_dependent(graph: fx.Graph, mutations: "Mutations") -> dict[fx.Node, fx.Node]:
    """Return the nodes whose strides decide what a write reaches, each with the call that returns a view or a copy."""
    found: dict[fx.Node, fx.Node] = {}
    if not mutations.effects:
        return found
    for call in graph.nodes:
        if _copies_at_times(call, graph, mutations) or _keeps_written(call, graph, mutations):
            waiting = list(call.all_input_nodes)
            while waiting:
                node = waiting.pop()
                if node not in found:
                    found[node] = call
                    waiting += node.all_input_nodes
    return found


def _name(node: fx.Node) -> str:
    """Return the name of the function, method or operator that a node calls. A module has that of its function."""
    target: Any = node.target
    if node.op == "call_module":
        module = attribute(node.graph, str(target)) if node.graph.owning_module is not None else None
        return _MODULES.get(type(module), "")
    if isinstance(target, OpOverload):
        target = target.overloadpacket
    return str(target) if node.op == "call_method" else getattr(target, "__name__", "")


def _keeps_written(call: fx.Node, graph: fx.Graph, mutations: "Mutations") -> bool:
    """Return whether a call may keep a view of an activation for backward, or a copy, and a later call writes to it."""
    if _name(call) not in _KEEPING or not may_train(call, graph):
        return False
    kept = [node for node in call.all_input_nodes if node.op not in ("placeholder", "get_attr")]
    written = [value for effect in mutations.after(call) for value in effect.reached]
    return any(mutations.share_memory(value, node) for value in written for node in kept)


def _copies_at_times(call: fx.Node, graph: fx.Graph, mutations: "Mutations") -> bool:
    """Return whether a call returns a view of its first argument, or a copy, and a write to one is seen in the other.

    The write is seen if it is not to the copy.
    """
    name = _name(call)
    if name not in _NAMES and (name != "to" or "memory_format" not in call.kwargs):
        return False
    for effect in mutations.after(call):
        for written in effect.reached:
            in_result = mutations.views(written, call)
            if in_result or mutations.share_memory(written, call):
                others = _others(call, in_result, graph, mutations)
                at = mutations.order[effect.node]
                if any(mutations.order[user] > at for other in others for user in other.users):
                    return True
    return False


def _others(call: fx.Node, in_result: bool, graph: fx.Graph, mutations: "Mutations") -> Iterator[fx.Node]:
    """Yield what shares memory with the call's input if the result is written to, else what views the result."""
    for node in graph.nodes:
        if mutations.views(node, call):
            if not in_result:
                yield node
        elif in_result and mutations.share_memory(node, call):
            yield node
