"""Find which calls write to which tensors.

The folded convolution replaces the BatchNorm, so x, W and b are read later than before. The result is the same only if
no call between the two writes to them or changes how calls behave (grad mode, autocast). `writes` says what one call
writes to.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, fx
from torch._ops import HigherOrderOperator

from .calls import Attribute, Value, attribute, tensor_of
from .reasons import Reason
from .view_or_copy import stride_dependent
from .views import bases_of, is_new, may_be_tensor, storage_of
from .writes import Effect, effect_of


class Mutations:
    """All effects of a graph, read once. A thousand pairs then cost a thousand look-ups instead of a million."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.effects = [effect for node in graph.nodes if (effect := _effect(node)) is not None]
        self._known: dict[fx.Node | Attribute, frozenset[Any]] = {}
        self.positions = [self.order[effect.node] for effect in self.effects]

    def between(self, first: fx.Node, last: fx.Node) -> Iterator[Effect]:
        """Yield the effects of the nodes after `first` and before `last`."""
        start = bisect_left(self.positions, self.order[first] + 1)
        stop = bisect_left(self.positions, self.order[last])
        yield from self.effects[start:stop]

    def after(self, node: fx.Node) -> Sequence[Effect]:
        """Return the effects of the nodes after this one."""
        return self.effects[bisect_left(self.positions, self.order[node] + 1) :]

    def obstacle(
        self, first: fx.Node, last: fx.Node, read: tuple[Value, ...], own: frozenset[fx.Node] = frozenset()
    ) -> tuple[Reason, fx.Node] | None:
        """Return why `read` cannot be read at `last` instead of at `first`, and the node that is the cause, or None.

        own: Nodes that write to nothing but results of their own.
        """
        for effect in self.between(first, last):
            if effect.node in own:
                continue
            if effect.written is None:
                return Reason.OPAQUE_BETWEEN, effect.node
            if any(self._may_alias(one, other) for one in effect.written for other in read):
                return Reason.MUTATED, effect.node
        return None

    def written(self, last: fx.Node, kept: tuple[Value, ...], inputs_are_kept: bool) -> fx.Node | None:
        """Return the first node that may write to a tensor of `kept` before backward reads it, or None.

        Args:
            last: The node at which the forward reads the tensors.
            kept: What backward reads.
            inputs_are_kept: Backward reads a graph's input as it was given. Writes before `last` count as well then.
        """
        after = self.written_after(last, kept)
        return self.written_input(last, kept) if after is None and inputs_are_kept else after

    def written_after(self, last: fx.Node, kept: tuple[Value, ...]) -> fx.Node | None:
        """Return the first node after `last` that may write to a tensor of `kept`, or None.

        Unknown memory counts as other memory: this prevents an error of autograd, not a wrong result.
        """
        memory = frozenset[Any]().union(*(self.memory(value) for value in kept if value is not None)) - {None}
        return self._writer(self.after(last), memory)

    def written_input(self, last: fx.Node, kept: tuple[Value, ...]) -> fx.Node | None:
        """Return the first node before `last` that may write to a graph input among `kept`, or None.

        Unknown memory counts as other memory.
        """
        memory = frozenset[Any]().union(*(self.memory(value) for value in kept if value is not None))
        memory &= self._outside.union(*(self.memory(value) for value in kept if isinstance(value, Attribute)))
        return self._writer(self.effects[: bisect_left(self.positions, self.order[last])], memory - {None})

    @cached_property
    def stride_dependent(self) -> dict[fx.Node, fx.Node]:
        """Return the nodes whose strides decide what a write reaches, see `view_or_copy`."""
        return stride_dependent(self.graph, self)

    @cached_property
    def _outside(self) -> frozenset[Any]:
        """Return identities of the memory of the graph's inputs."""
        inputs = [node for node in self.graph.nodes if node.op in ("placeholder", "get_attr")]
        return frozenset[Any]().union(*map(self.memory, inputs))

    def _writer(self, effects: Sequence[Effect], memory: frozenset[Any]) -> fx.Node | None:
        """Return the first node that may write to the memory."""
        for effect in effects if memory else ():
            if any(value is not None and not memory.isdisjoint(self.memory(value)) for value in effect.reached):
                return effect.node
        return None

    def writes_to(self, value: fx.Node) -> bool:
        """Return whether any node of the graph may write to the value, before or after it is read."""
        return any(
            self._may_alias(one, value)
            for effect in self.effects
            for one in effect.reached
            if effect.written is not None or (isinstance(one, fx.Node) and may_be_tensor(one))
        )

    def _may_alias(self, one: Value, other: Value) -> bool:
        if one is None or other is None:
            return False
        a, b = self.memory(one), self.memory(other)
        return None in a or None in b or not a.isdisjoint(b)

    def memory(self, value: fx.Node | Attribute) -> frozenset[Any]:
        """Return identities of the memory that a value may be in, with None among them if there may be others.

        The storage of its (fake) tensor is one. In graphs of make_fx on real tensors, and in loaded programs, a view
        and its base have different storages. So the nodes that the value is a view of are others.
        """
        waiting = [] if value in self._known else [value]
        while waiting:  # a recursion would not survive a thousand views of one tensor
            bases = self._viewed(waiting[-1])
            missing = [base for base in bases if base not in self._known]
            if missing:
                waiting += missing
            else:
                current = waiting.pop()
                own = self._identities(current)
                self._known[current] = frozenset(own).union(*(self._known[base] for base in bases))
        return self._known[value]

    def _identities(self, value: fx.Node | Attribute) -> Iterator[Any]:
        storage = storage_of(tensor_of(value, self.graph))
        if storage is not None or isinstance(value, Attribute) or not is_new(value):
            yield storage
        path = value.path if isinstance(value, Attribute) else value.target if value.op == "get_attr" else None
        if path is not None:
            yield storage_of(tensor_of(Attribute(str(path)), self.graph))
        else:
            yield value

    def _viewed(self, value: fx.Node | Attribute) -> list[fx.Node]:
        """Return the nodes that the value may be a view of."""
        return [] if isinstance(value, Attribute) or value.op == "get_attr" else bases_of(value)


def _effect(node: fx.Node) -> Effect | None:
    """Return the effect of a node, or None if it has none."""
    if not isinstance(node.target, HigherOrderOperator):
        return effect_of(node)
    written = _body_writes(node)
    return None if written == [] else Effect(node, None if written is None else tuple(written))


def _body_writes(node: fx.Node) -> list[fx.Node] | None:
    """Return the arguments of a higher-order operator if one of its graphs writes to its inputs, else an empty list.

    Checkpoints, branches, loops and autograd functions hold such graphs. Return None if one is not known.
    """
    bodies = [each for each in node.all_input_nodes if each.op == "get_attr"]
    bodies = [each for each in bodies if not isinstance(attribute(node.graph, str(each.target)), Tensor)]
    for each in bodies:
        body = attribute(node.graph, str(each.target))
        if not isinstance(body, fx.GraphModule):
            return None
        mutations = Mutations(body.graph)
        inputs = body.graph.find_nodes(op="placeholder")
        if any(effect.written is None and any(effect.reached) for effect in mutations.effects):
            return None
        if any(mutations.writes_to(value) for value in inputs):
            return [value for value in node.all_input_nodes if value not in bodies] or None
    return [] if bodies else None
