"""Find what one call writes to.

Unknown calls are treated as mutating: they may write to anything.
"""

import inspect
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import get_testing_overrides

from .calls import Attribute, Value, attribute
from .dialects import read_batch_norm
from .reasons import Reason


@dataclass(frozen=True)
class Effect:
    """What a node may do.

    Attributes:
        node: The node.
        written: What it may write to; None if it may write to anything.
        writes: False for a call that writes no tensor but changes how later calls behave, such as a torch.func
            transform.
    """

    node: fx.Node
    written: tuple[Value, ...] | None
    writes: bool = True

    @property
    def reached(self) -> Iterable[Value]:
        """Return the tensors among its inputs that it may write to."""
        if not self.writes:
            return ()
        return self.node.all_input_nodes if self.written is None else self.written


def effect_of(node: fx.Node) -> Effect | None:
    """Return the effect of a node that is not a higher-order operator, or None if it has none."""
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
    return Effect(node, tuple(flatten(written or [])) or None)


def flatten(values: list[Any]) -> Iterator[Value]:
    """Yield the values of nested lists, without what is no value of the graph."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from flatten(list(value))
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
    if isinstance(target, OpOverloadPacket):  # the call decides which overload it is
        overloads = [getattr(target, name) for name in target.overloads()]
        return [each for overload in overloads for each in _schema_writes(overload, node) if each is not None]
    name = getattr(target, "__name__", "")
    if getattr(target, "__module__", None) == "_operator":
        in_place = name in ("setitem", "delitem") or (name.startswith("i") and hasattr(operator, f"__{name}__"))
        in_place = in_place and name not in ("is_", "is_not", "index", "indexOf", "inv", "invert", "itemgetter")
        return [node.args[0]] if in_place else []
    if target is getattr or target in _OF_NUMBERS or getattr(target, "__module__", None) == "math":
        return []
    if (getattr(target, "__module__", None) or "").startswith("triton_convbn."):
        return []
    if not callable(target) or not _takes_tensors(target):
        return None
    if node.kwargs.get("max_norm") is not None or (name.startswith("embedding") and len(node.args) > 3):
        return None  # it renormalizes the rows of its weight
    writes: list[Any] = [node.kwargs.get("out")] if node.kwargs.get("out") is not None else []
    if is_in_place(name) or _bound(node, "inplace"):
        if name.startswith("_fused"):
            return None  # an optimizer's step, which writes to lists of its arguments
        first = next(iter(node.kwargs.values()), None)  # "input", "self" or "tensor"
        return [*writes, node.args[0] if node.args else first]
    if "norm" in name and name not in ("layer_norm", "group_norm", "norm", "rms_norm", "local_response_norm"):
        return _norm_writes(node)
    return writes


_OF_NUMBERS = {abs, bool, float, int, isinstance, len, round, torch.Size, torch.device, torch.finfo, torch.iinfo}
_OF_NUMBERS |= {torch._assert, torch._check, torch._check_is_size, torch._check_value}
_OF_NUMBERS |= {torch._C._log_api_usage_once}  # Dynamo records it for a slice of a Sequential (torch 2.14)
"""Functions that write to no tensor and return no view of one."""


def _schema_writes(op: OpOverload, node: fx.Node) -> list[Any]:
    """Return the arguments that an operator says it writes to; None among them for one that the call leaves out."""
    schema = op._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    return [given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]


_TRANSFORMS = ("torch._C._functorch", "torch._functorch.", "torch.autograd.forward_ad", "torch._dynamo._trace_wrapped")


def _changes_mode(node: fx.Node) -> bool:
    """Return whether a call begins or ends a transform of torch.func or asks autograd for gradients.

    Such a call writes to none of its arguments.
    """
    if node.op != "call_function":
        return False
    module = getattr(node.target, "__module__", None) or ""
    return node.target is torch.autograd.grad or module.startswith(_TRANSFORMS)


def is_in_place(name: str) -> bool:
    """Return whether a name is that of a function in place: `add_`, `__setitem__`, `__iadd__`."""
    if name.startswith("__"):
        other = ("__index__", "__invert__", "__int__", "__init__", "__init_subclass__", "__iter__")
        return name == "__setitem__" or (name.startswith("__i") and name not in other)
    return name.endswith("_")


def _norm_writes(node: fx.Node) -> list[Any]:
    """Return all arguments of a norm that trains. instance_norm writes its running statistics then."""
    flag = _bound(node, "training", _bound(node, "use_input_stats", True))
    values = () if flag is False else (*node.args[1:], *node.kwargs.values())
    return [value for value in values if isinstance(value, fx.Node)]


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
    name = getattr(function, "__name__", "")
    others = (
        getattr(torch._C._VariableFunctions, name, None),
        getattr(torch._C._nn, name, None),
        getattr(F, name, None),
        getattr(torch._C._autograd, "_get_data_attr", None),
    )
    return function in _known() or any(function is each for each in others)


def _method_writes(node: fx.Node) -> list[Any] | None:
    name = str(node.target)
    if not hasattr(Tensor, name):
        return None
    return [node.args[0]] if is_in_place(name) else []


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
