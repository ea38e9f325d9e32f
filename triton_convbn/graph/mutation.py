"""Find which calls write to which tensors.

The folded convolution replaces the BatchNorm, so x, W and b are read later than before. The result is the same only if
no call between the two writes to them or changes how calls behave (grad mode, autocast). `writes` says what one call
writes to.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from .calls import Attribute, Value, attribute, tensor_of
from .dialects import read_batch_norm, read_conv
from .reasons import Reason
from .writes import Effect, effect_of, flatten, is_in_place


class Mutations:
    """All effects of a graph, read once. A thousand pairs then cost a thousand look-ups instead of a million."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.effects = [effect for node in graph.nodes if (effect := _effect(node)) is not None]
        self.memory: dict[fx.Node | Attribute, frozenset[Any]] = {}
        self.positions = [self.order[effect.node] for effect in self.effects]

    def between(self, first: fx.Node, last: fx.Node) -> Iterator[Effect]:
        """Yield the effects of the nodes after `first` and before `last`."""
        start = bisect_left(self.positions, self.order[first] + 1)
        stop = bisect_left(self.positions, self.order[last])
        yield from self.effects[start:stop]

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

    def written_after(self, last: fx.Node, kept: tuple[Value, ...]) -> fx.Node | None:
        """Return the first node after `last` that may write to a tensor of `kept`, or None.

        Unknown memory counts as other memory: this prevents an error of autograd, not a wrong result.
        """
        memory = frozenset[Any]().union(*(self._memory(value) for value in kept if value is not None)) - {None}
        return self._writer(self.effects[bisect_left(self.positions, self.order[last] + 1) :], memory)

    def written_input(self, last: fx.Node, kept: tuple[Value, ...]) -> fx.Node | None:
        """Return the first node before `last` that may write to a graph input among `kept`, or None.

        Unknown memory counts as other memory.
        """
        memory = frozenset[Any]().union(*(self._memory(value) for value in kept if value is not None))
        memory &= self._outside.union(*(self._memory(value) for value in kept if isinstance(value, Attribute)))
        return self._writer(self.effects[: bisect_left(self.positions, self.order[last])], memory - {None})

    @cached_property
    def _outside(self) -> frozenset[Any]:
        """Identities of the memory of the graph's inputs."""
        inputs = [node for node in self.graph.nodes if node.op in ("placeholder", "get_attr")]
        return frozenset[Any]().union(*map(self._memory, inputs))

    def _writer(self, effects: Sequence[Effect], memory: frozenset[Any]) -> fx.Node | None:
        """Return the first node that may write to the memory."""
        for effect in effects if memory else ():
            if any(value is not None and not memory.isdisjoint(self._memory(value)) for value in effect.reached):
                return effect.node
        return None

    def writes_to(self, value: fx.Node) -> bool:
        """Return whether any node of the graph may write to the value, before or after it is read."""
        return any(
            self._may_alias(one, value)
            for effect in self.effects
            for one in effect.reached
            if effect.written is not None or (isinstance(one, fx.Node) and _may_be_tensor(one))
        )

    def _may_alias(self, one: Value, other: Value) -> bool:
        if one is None or other is None:
            return False
        a, b = self._memory(one), self._memory(other)
        return None in a or None in b or not a.isdisjoint(b)

    def _memory(self, value: fx.Node | Attribute) -> frozenset[Any]:
        """Return identities of the memory that a value may be in, with None among them if there may be others.

        The storage of its (fake) tensor is one. In graphs of make_fx on real tensors, and in loaded programs, a view
        and its base have different storages. So the nodes that the value is a view of are others.
        """
        waiting = [] if value in self.memory else [value]
        while waiting:  # a recursion would not survive a thousand views of one tensor
            bases = self._viewed(waiting[-1])
            missing = [base for base in bases if base not in self.memory]
            if missing:
                waiting += missing
            else:
                current = waiting.pop()
                own = self._identities(current)
                self.memory[current] = frozenset(own).union(*(self.memory[base] for base in bases))
        return self.memory[value]

    def _identities(self, value: fx.Node | Attribute) -> Iterator[Any]:
        storage = _storage(tensor_of(value, self.graph))
        if storage is not None or isinstance(value, Attribute) or not _is_new(value):
            yield storage
        path = value.path if isinstance(value, Attribute) else value.target if value.op == "get_attr" else None
        if path is not None:
            yield _storage(tensor_of(Attribute(str(path)), self.graph))
        else:
            yield value

    def _viewed(self, value: fx.Node | Attribute) -> list[fx.Node]:
        """Return the nodes that the value may be a view of."""
        return [] if isinstance(value, Attribute) or value.op == "get_attr" else _bases(value)


_VIEWS = frozenset(
    {
        "_add_batch_dim",
        "_get_data_attr",
        "_make_dual",
        "_remove_batch_dim",
        "_unpack_dual",
        "_unwrap_batched",
        "_unwrap_for_grad",
        "_wrap_for_grad",
        "alias",
        "as_strided",
        "broadcast_to",
        "chunk",
        "conj",
        "contiguous",
        "cpu",
        "cuda",
        "data",
        "detach",
        "diagonal",
        "double",
        "dropout",
        "expand",
        "expand_as",
        "flatten",
        "float",
        "getattr",
        "getitem",
        "half",
        "imag",
        "movedim",
        "moveaxis",
        "narrow",
        "permute",
        "ravel",
        "real",
        "reshape",
        "reshape_as",
        "select",
        "split",
        "split_with_sizes",
        "squeeze",
        "swapaxes",
        "swapdims",
        "t",
        "tensor_split",
        "to",
        "transpose",
        "type",
        "type_as",
        "unbind",
        "unflatten",
        "unfold",
        "unsqueeze",
        "view",
        "view_as",
    }
)
"""Functions and methods that return a view of their first argument, or that argument itself, always or at times."""


def _bases(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that the result of a call may be a view of."""
    op, first = node.target, [arg for arg in node.args[:1] if isinstance(arg, fx.Node)]
    if _is_new(node):
        return []
    if isinstance(op, OpOverloadPacket):
        return list(dict.fromkeys(each for name in op.overloads() for each in _schema_bases(getattr(op, name), node)))
    if isinstance(op, HigherOrderOperator):  # a checkpoint may return a view of what it is given
        return [each for each in node.all_input_nodes if _may_be_tensor(each)]
    if not isinstance(op, OpOverload):
        name = str(op) if node.op != "call_function" else getattr(op, "__name__", "")
        return first if node.op == "call_module" or name in _VIEWS or is_in_place(name) else []
    return _schema_bases(op, node)


def _is_new(node: fx.Node) -> bool:
    """Return whether the result of a call is memory of its own. `aten.native_batch_norm` returns a tuple of such."""
    return read_conv(node) is not None or read_batch_norm(node) is not None


def _schema_bases(op: OpOverload, node: fx.Node) -> list[fx.Node]:
    # Composite operators are not annotated: dropout that drops nothing returns its argument.
    if op.has_kernel_for_dispatch_key(torch.DispatchKey.CompositeImplicitAutograd):
        return node.all_input_nodes
    aliased = {
        name for returned in op._schema.returns if returned.alias_info for name in returned.alias_info.before_set
    }
    named = dict(zip((a.name for a in op._schema.arguments), node.args, strict=False)) | node.kwargs
    infos = {a.name: a.alias_info for a in op._schema.arguments if a.alias_info is not None}
    values = [named.get(name) for name, i in infos.items() if i.before_set & aliased or "*" in i.after_set]
    return [value for value in flatten(values) if isinstance(value, fx.Node)]


def _storage(tensor: Tensor | None) -> int | None:
    """Return an identity of the memory behind a tensor, also of a fake one, or None if it has none of its own."""
    if tensor is None:
        return None
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have no storage
        return None


def _may_be_tensor(node: fx.Node) -> bool:
    """Return False for graphs and numbers among a node's arguments."""
    return node.op != "get_attr" if node.meta.get("val") is None else not isinstance(node.meta["val"], _NUMBERS)


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def _effect(node: fx.Node) -> Effect | None:
    """Return the effect of a node, or None if it has none."""
    if not isinstance(node.target, HigherOrderOperator):
        return effect_of(node)
    written = _body_writes(node)
    return None if written == [] else Effect(node, None if written is None else tuple(written))


def _body_writes(node: fx.Node) -> list[fx.Node] | None:
    """Return the arguments of a higher-order operator where one of its graphs writes to what it is given; else none.

    Checkpoints, branches, loops and autograd functions hold such graphs. None where one is not known.
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
