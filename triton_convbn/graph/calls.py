"""What a convolution and a BatchNorm are, whatever dialect wrote them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor

from .reasons import Reason


@dataclass(frozen=True)
class Attribute:
    """A tensor that a module call reads off the graph's owning module, by its dotted path."""

    path: str


Value = fx.Node | Attribute | None
"""A tensor argument: a node of the graph, an attribute of the owning module, or absent."""


@dataclass(frozen=True)
class ConvCall:
    """A call of a convolution, a transposed convolution or a Linear.

    function: what to call with other parameters, as ``function(input, weight, bias, **options)``.
    options: every further argument by its name in ``function``.
    pad: ``(pad, mode)`` of the ``F.pad`` that the module does first (``padding_mode``), if it does.
    obstacle: why this call cannot be replaced whatever follows it, if so.
    """

    node: fx.Node
    function: Callable[..., Any]
    input: fx.Node
    weight: Value
    bias: Value
    options: Mapping[str, Any] = field(default_factory=dict)
    transposed: bool = False
    groups: int = 1
    linear: bool = False
    pad: tuple[tuple[int, ...], str] | None = None
    obstacle: Reason | None = None


@dataclass(frozen=True)
class BatchNormCall:
    """A call of BatchNorm.

    output: the node that stands for the normalized tensor: the call's own, or the getitem that takes it out of a tuple.
    training: False for eval mode; None where the graph computes it.
    eps: a node where the graph computes it, as Dynamo's first attempt under ``dynamic=True`` does; None if unreadable.
    ranks: how many dimensions the input can have, as far as the call itself says.
    obstacle: why this call cannot be replaced whatever precedes it, if so.
    parts: where it is written as arithmetic, every node of it but the last, which is `node`, in the graph's order.
    promotes: the dtype that the arithmetic promotes its result to, if it does.
    computed: the dtypes that the arithmetic of its vectors rounds to.
    """

    node: fx.Node
    output: fx.Node
    input: fx.Node
    weight: Value
    bias: Value
    running_mean: Value
    running_var: Value
    training: bool | None
    eps: float | fx.Node | None
    ranks: frozenset[int] | None = None
    obstacle: Reason | None = None
    parts: tuple[fx.Node, ...] = ()
    promotes: torch.dtype | None = None
    computed: frozenset[torch.dtype] = frozenset()


@dataclass(frozen=True)
class PassthroughCall:
    """A call that hands its inputs on, no value changed: what a scale and a shift a channel commute with.

    inputs: one tensor, or several that are concatenated.
    dim: along which they are; None: of one input.
    reshapes: whether the result has another shape than the input, its elements in the same order.
    """

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    dim: int | None = None
    reshapes: bool = False


def tensor_of(value: Value, graph: fx.Graph) -> Tensor | None:
    """The (fake) tensor behind a value, where the graph knows it: Dynamo's, export's, or the module's own."""
    if value is None:
        return None
    if isinstance(value, Attribute):
        found = attribute(graph, value.path)
        return found if isinstance(found, torch.Tensor) else None
    found = value.meta.get("example_value", value.meta.get("val"))
    if found is None and value.op == "get_attr":
        found = attribute(graph, str(value.target))
    return found if isinstance(found, torch.Tensor) else None


def is_subclass(tensor: Tensor) -> bool:
    """Return whether the tensor is of a class with operations of its own: quantized, distributed, user-defined."""
    return not isinstance(tensor, FakeTensor) and type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer)


def requires_grad(tensor: Tensor) -> bool:
    """Return whether a gradient is asked of the tensor, or of one that a transform of torch.func has wrapped in it."""
    while not tensor.requires_grad and is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor.requires_grad


def may_train(value: Value, graph: fx.Graph) -> bool:
    """Whether a gradient may be asked of a value. What export and make_fx leave in `val` is detached: it may."""
    if value is None:
        return False
    if isinstance(value, fx.Node) and value.op == "get_attr":
        value = Attribute(str(value.target))
    if isinstance(value, fx.Node) and "example_value" not in value.meta:
        return True
    tensor = tensor_of(value, graph)
    return tensor is None or requires_grad(tensor)


def shape_of(node: fx.Node, graph: fx.Graph) -> tuple[Any, ...] | None:
    """The sizes of the result of a node, symbols among them, where the graph knows it; `ShapeProp` is enough."""
    tensor = tensor_of(node, graph)
    shape = getattr(node.meta.get("tensor_meta"), "shape", None) if tensor is None else tensor.shape
    return None if shape is None else tuple(shape)


def rank_of(node: fx.Node, graph: fx.Graph) -> int | None:
    """How many dimensions the result of a node has, where the graph knows it."""
    shape = shape_of(node, graph)
    return None if shape is None else len(shape)


def attribute(graph: fx.Graph, path: str) -> Any:
    """What the graph's owning module has at a dotted path, or None."""
    found: Any = graph.owning_module
    for atom in path.split("."):
        found = getattr(found, atom, None)
    return found
