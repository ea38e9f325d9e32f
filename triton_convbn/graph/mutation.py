"""Find which calls write to which tensors.

The folded convolution replaces the BatchNorm, so x, W and b are read later than before. The result is the same only if
no call between the two writes to them or changes how calls behave (grad mode, autocast). Unknown calls are treated as
mutating.
"""

import inspect
import operator
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.overrides import get_testing_overrides

from .calls import Attribute, Value, attribute, tensor_of
from .dialects import read_batch_norm, read_conv
from .reasons import Reason


@dataclass(frozen=True)
class Effect:
    """What a node may do: write to `written`, or, if that is None, to anything.

    writes: False for a call that writes to no tensor but changes how later calls behave, a torch.func transform say.
    """

    node: fx.Node
    written: tuple[Value, ...] | None
    writes: bool = True

    @property
    def reached(self) -> Iterable[Value]:
        """The tensors among its inputs that it may write to."""
        if not self.writes:
            return ()
        return self.node.all_input_nodes if self.written is None else self.written


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

    def obstacle(self, first: fx.Node, last: fx.Node, read: tuple[Value, ...]) -> tuple[Reason, fx.Node] | None:
        """Return why `read` cannot be read at `last` instead of at `first`, and the node that is the cause, or None."""
        for effect in self.between(first, last):
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
        for effect in self.effects[bisect_left(self.positions, self.order[last] + 1) :] if memory else []:
            if any(value is not None and not memory.isdisjoint(self._memory(value)) for value in effect.reached):
                return effect.node
        return None

    def written_input(self, last: fx.Node, kept: tuple[Value, ...]) -> fx.Node | None:
        """Return the first node before `last` that may write to a graph input among `kept`, or None.

        Unknown memory counts as other memory.
        """
        inputs = {value for value in self.graph.nodes if value.op in ("placeholder", "get_attr")}
        outside = frozenset[Any]().union(*map(self._memory, inputs)) - {None}
        memory = frozenset[Any]().union(*(self._memory(value) for value in kept if value is not None))
        memory = (memory & outside) | {
            each for value in kept if isinstance(value, Attribute) for each in self._memory(value) if each is not None
        }
        for effect in self.effects[: bisect_left(self.positions, self.order[last])] if memory else []:
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
        waiting = [value]
        while waiting:  # a recursion would not survive a thousand views of one tensor
            current = waiting[-1]
            bases = self._viewed(current)
            missing = [base for base in bases if base not in self.memory]
            if current not in self.memory and missing:
                waiting += missing
                continue
            if current not in self.memory:
                own = self._identities(current)
                self.memory[current] = frozenset(own).union(*(self.memory[base] for base in bases))
            waiting.pop()
        return self.memory[value]

    def _identities(self, value: fx.Node | Attribute) -> Iterator[Any]:
        yield _storage(tensor_of(value, self.graph))
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
        "squeeze",
        "swapaxes",
        "swapdims",
        "t",
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
    if read_conv(node) is not None or read_batch_norm(node) is not None:
        return []
    if isinstance(op, OpOverloadPacket):
        return list(dict.fromkeys(each for name in op.overloads() for each in _schema_bases(getattr(op, name), node)))
    if not isinstance(op, OpOverload):
        name = str(op) if node.op != "call_function" else getattr(op, "__name__", "")
        return first if node.op == "call_module" or name in _VIEWS or _is_in_place(name) else []
    return _schema_bases(op, node)


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
    return [value for value in _flatten(values) if isinstance(value, fx.Node)]


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
    if node.op in ("placeholder", "get_attr", "output"):
        return None
    written: list[Any] | None
    if _changes_mode(node):
        return Effect(node, None, writes=False)
    if node.op == "call_function":
        written = _function_writes(node)
    elif node.op == "call_method":
        written = _method_writes(node)
    else:
        written = _module_writes(node)
    if written == []:
        return None
    # A write to something that is no tensor argument of the node (a keyword not looked for) is a write to anything.
    return Effect(node, tuple(_flatten(written or [])) or None)


def _flatten(values: list[Any]) -> Iterator[Value]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flatten(list(value))
        elif isinstance(value, fx.Node | Attribute):
            yield value


def _function_writes(node: fx.Node) -> list[Any] | None:
    """Return the arguments that a function writes to, or None if unknown."""
    target = node.target
    bn = read_batch_norm(node)
    if bn is not None and bn.obstacle is not Reason.UNREADABLE_CALL:
        statistics = (bn.running_mean, bn.running_var) if bn.training is not False else ()
        return [each for each in statistics if each is not None]
    if isinstance(target, OpOverload):
        return _schema_writes(target, node)
    if isinstance(target, OpOverloadPacket):  # which overload it is, the call decides
        overloads = [getattr(target, name) for name in target.overloads()]
        return [each for overload in overloads for each in _schema_writes(overload, node) if each is not None]
    if isinstance(target, HigherOrderOperator):
        return _body_writes(node)
    name = getattr(target, "__name__", "")
    if getattr(target, "__module__", None) == "_operator":
        in_place = name in ("setitem", "delitem") or (name.startswith("i") and hasattr(operator, f"__{name}__"))
        in_place = in_place and name not in ("is_", "is_not", "index", "indexOf", "inv", "invert", "itemgetter")
        return [node.args[0]] if in_place else []
    if target is getattr:
        return []
    if getattr(target, "__module__", "").startswith("triton_convbn."):
        return []
    if not callable(target) or not _takes_tensors(target):
        return None
    if node.kwargs.get("max_norm") is not None or (name.startswith("embedding") and len(node.args) > 3):
        return None  # it renormalizes the rows of its weight
    writes: list[Any] = [node.kwargs.get("out")] if node.kwargs.get("out") is not None else []
    if _is_in_place(name) or _bound(node, "inplace"):
        if name.startswith("_fused"):
            return None  # an optimizer's step, which writes to lists of its arguments
        first = next(iter(node.kwargs.values()), None)  # "input", "self" or "tensor"
        return [*writes, node.args[0] if node.args else first]
    if "norm" in name and name not in ("layer_norm", "group_norm", "norm", "rms_norm", "local_response_norm"):
        return _norm_writes(node)
    return writes


def _schema_writes(op: OpOverload, node: fx.Node) -> list[Any]:
    """Return the arguments that an operator says it writes to; None among them for one that the call leaves out."""
    schema = op._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    return [given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]


def _body_writes(node: fx.Node) -> list[Any] | None:
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


_TRANSFORMS = ("torch._C._functorch", "torch._functorch.", "torch.autograd.forward_ad", "torch._dynamo._trace_wrapped")


def _changes_mode(node: fx.Node) -> bool:
    """Return whether a call begins or ends a transform of torch.func or asks autograd for gradients.

    Such a call writes to none of its arguments.
    """
    if node.op != "call_function":
        return False
    module = getattr(node.target, "__module__", None) or ""
    return node.target is torch.autograd.grad or module.startswith(_TRANSFORMS)


def _is_in_place(name: str) -> bool:
    """Return whether a name is that of a function in place: `add_`, `__setitem__`, `__iadd__`."""
    if name.startswith("__"):
        other = ("__index__", "__invert__", "__int__", "__init__", "__init_subclass__", "__iter__")
        return name == "__setitem__" or (name.startswith("__i") and name not in other)
    return name.endswith("_")


def _norm_writes(node: fx.Node) -> list[Any]:
    """Return all arguments of a norm that trains. instance_norm writes its running statistics then."""
    flag = _bound(node, "training", _bound(node, "use_input_stats", True))
    return [] if flag is False else [value for value in (*node.args[1:], *node.kwargs.values()) if _is_node(value)]


def _is_node(value: object) -> bool:
    return isinstance(value, fx.Node)


def _bound(node: fx.Node, name: str, default: Any = None) -> Any:
    """Return the value of one argument of a call of a Python function, by name."""
    if name in node.kwargs:
        return node.kwargs[name]
    for index, parameter in enumerate(_parameters(node.target)):
        if parameter.name == name:
            return node.args[index] if index < len(node.args) else parameter.default
    return default


@lru_cache(maxsize=256)
def _parameters(function: Any) -> tuple[inspect.Parameter, ...]:
    """Return a function's parameters. Cached: reading signatures took a fifth of the time of the pass."""
    try:
        return tuple(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin, whose in-place forms end in an underscore
        return ()


@cache
def _known() -> frozenset[Any]:
    return frozenset(get_testing_overrides())


def _takes_tensors(function: Any) -> bool:
    """Return whether it is one of torch's functions of tensors, whose names tell what they write to."""
    builtin = getattr(torch._C._VariableFunctions, getattr(function, "__name__", ""), None)
    name = getattr(function, "__name__", "")
    others = (
        getattr(torch._C._nn, name, None),
        getattr(F, name, None),
        getattr(torch._C._autograd, "_get_data_attr", None),
    )
    return function in _known() or function is builtin or any(function is each for each in others)


def _method_writes(node: fx.Node) -> list[Any] | None:
    name = str(node.target)
    if not hasattr(Tensor, name):
        return None
    return [node.args[0]] if _is_in_place(name) else []


def _module_writes(node: fx.Node) -> list[Any] | None:
    """Return what a module writes to, or None if unknown.

    A module of torch.nn without hooks writes to its input if it is in place, and to its statistics in training mode.
    """
    owner = node.graph.owning_module
    module = None if owner is None else attribute(node.graph, str(node.target))
    if not isinstance(module, nn.Module) or not type(module).__module__.startswith("torch.nn.modules."):
        return None
    if any(True for _ in module.children()) or module._forward_hooks or module._forward_pre_hooks:
        return None
    writes: list[Any] = [node.args[0] if node.args else None] if getattr(module, "inplace", False) else []
    if module.training:
        writes += [Attribute(f"{node.target}.{name}") for name, _ in module.named_buffers()]
    return None if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None else writes
