"""Describe a convolution and a BatchNorm independently of the dialect that wrote them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, fx
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..dispatch import is_plain
from .reasons import Reason


@dataclass(frozen=True)
class Attribute:
    """A tensor that a module call reads from the graph's owning module, by its dotted path."""

    path: str


Value = fx.Node | Attribute | None
"""A tensor argument: a node of the graph, an attribute of the owning module, or absent."""


@dataclass(frozen=True)
class ConvCall:
    """A call of a convolution, a transposed convolution or a Linear.

    Attributes:
        node: The call.
        function: What to call with other parameters, as ``function(input, weight, bias, **options)``.
        options: All further arguments by their names in `function`.
        pad: ``(pad, mode)`` of the ``F.pad`` that the module does first for its `padding_mode`, if any.
        obstacle: Why this call cannot be replaced, whatever follows it.
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

    Attributes:
        node: The call.
        output: The node of the normalized tensor: the call, or the getitem that takes it out of a tuple.
        training: False in eval mode. None if the graph computes it.
        eps: A node if the graph computes it, as Dynamo's first attempt with ``dynamic=True`` does. None if unreadable.
        ranks: The numbers of dimensions that the input can have, as far as the call itself says.
        obstacle: Why this call cannot be replaced, whatever precedes it.
        parts: If it is written as arithmetic, its nodes without the last one, which is `node`, in the graph's order.
        promotes: The dtype that the arithmetic promotes its result to, if it does.
        computed: The dtypes that the arithmetic of its vectors rounds to.
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

    @property
    def vectors(self) -> tuple[Value, Value, Value, Value]:
        """Return the bn_weight, bn_bias, running_mean and running_var."""
        return self.weight, self.bias, self.running_mean, self.running_var


Moves = Literal["same", "reshape", "view", "along", "cat"]
"""How a call moves elements:

same: Not at all. The result has the input's shape.
reshape: The elements keep their order and get another shape.
view: The result is a view of the input, with other sizes and strides.
along: Elements move along `PassthroughCall.dims`, or are dropped or repeated along them.
cat: Several tensors are concatenated along `PassthroughCall.dim`.
"""


@dataclass(frozen=True)
class PassthroughCall:
    """A call that only moves, drops or repeats elements.

    A scale and a shift per channel commute with it if it keeps the channels whole, see `channels`.

    Attributes:
        node: The call.
        inputs: One tensor, or the tensors that are concatenated.
        kind: How it moves the elements.
        dim: The dimension of the concatenation. None for one input.
        dims: The dimensions along which it moves elements, if that is its kind. They may be negative.
        parts: The call that returns a tuple if `node` only takes one of its parts.
    """

    node: fx.Node
    inputs: tuple[fx.Node, ...]
    kind: Moves = "same"
    dim: int | None = None
    dims: tuple[int, ...] = ()
    parts: fx.Node | None = None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Return the nodes of the call, in order."""
        return (self.node,) if self.parts is None else (self.parts, self.node)


@dataclass(frozen=True)
class SumCall:
    """A call that adds or subtracts two values.

    Attributes:
        node: The call.
        terms: The operands, each with its sign. The number 0 is left out.
        writes: The call writes its result to the first operand.
        obstacle: Why the call is not a plain sum.
    """

    node: fx.Node
    terms: tuple[tuple[int, fx.Node], ...]
    writes: bool = False
    obstacle: Reason | None = None


@dataclass(frozen=True)
class FactorCall:
    """A call that multiplies a value by another, or by a number.

    Attributes:
        node: The call.
        operands: The two values, the number first if there is one.
        writes: The call writes its result to the first argument.
    """

    node: fx.Node
    operands: tuple[fx.Node | float, fx.Node]
    writes: bool = False


def tensor_of(value: Value, graph: fx.Graph) -> Tensor | None:
    """Return the (fake) tensor of a value if the graph knows it: from Dynamo, from export, or from the module."""
    if value is None:
        return None
    if isinstance(value, Attribute):
        found = attribute(graph, value.path)
        return found if isinstance(found, torch.Tensor) else None
    found = value.meta.get("example_value", value.meta.get("val"))
    if found is None and value.op == "get_attr":
        found = attribute(graph, str(value.target))
    return found if isinstance(found, torch.Tensor) else None


def captured_tensor(value: Value, graph: fx.Graph) -> Tensor | None:
    """Return the tensor itself that the graph was captured with, or None if the graph knows its shape alone."""
    found = tensor_of(value, graph)
    if isinstance(value, fx.Node) and (argument := value.meta.get("grapharg")) is not None:  # of Dynamo
        found = argument.example
    if not isinstance(found, Tensor) or isinstance(found, FakeTensor) or found.device.type == "meta":
        return None
    return None if is_subclass(found) or is_functorch_wrapped_tensor(found) else found


def is_subclass(tensor: Tensor) -> bool:
    """Return whether the tensor's class has operations of its own: a quantized, distributed or user-defined class."""
    return not isinstance(tensor, FakeTensor) and not is_plain(tensor)


def requires_grad(tensor: Tensor) -> bool:
    """Return whether the tensor requires a gradient, or one that a torch.func transform has wrapped in it."""
    while not tensor.requires_grad and is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor.requires_grad


def is_input(value: Value) -> bool:
    """Return whether the value is there before any call of the graph, or absent."""
    return value is None or isinstance(value, Attribute) or value.op in ("placeholder", "get_attr")


def may_train(value: Value, graph: fx.Graph) -> bool:
    """Return whether a value may require a gradient. Tensors in ``meta['val']`` are detached, so they may."""
    if value is None:
        return False
    if not tells_training(value):
        return True
    tensor = tensor_of(Attribute(str(value.target)) if _is_attribute(value) else value, graph)
    return tensor is None or requires_grad(tensor)


def tells_training(value: Value) -> bool:
    """Return whether the graph says if a value requires a gradient. Graphs of make_fx and export do not."""
    return not isinstance(value, fx.Node) or _is_attribute(value) or "example_value" in value.meta


def _is_attribute(value: Value) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def shape_of(node: fx.Node, graph: fx.Graph) -> tuple[Any, ...] | None:
    """Return the sizes of a node's result, possibly symbols, or None. `ShapeProp` is enough to know them."""
    tensor = tensor_of(node, graph)
    shape = getattr(node.meta.get("tensor_meta"), "shape", None) if tensor is None else tensor.shape
    return None if shape is None else tuple(shape)


def strides_of(node: fx.Node, graph: fx.Graph) -> tuple[Any, ...] | None:
    """Return the strides of a node's result, possibly symbols, or None. `ShapeProp` is enough to know them."""
    tensor = tensor_of(node, graph)
    stride = getattr(node.meta.get("tensor_meta"), "stride", None) if tensor is None else tensor.stride()
    return None if stride is None else tuple(stride)


def dtype_of(node: fx.Node, graph: fx.Graph) -> torch.dtype | None:
    """Return the dtype of a node's result, or None. `ShapeProp` is enough to know it."""
    tensor = tensor_of(node, graph)
    return getattr(node.meta.get("tensor_meta"), "dtype", None) if tensor is None else tensor.dtype


def rank_of(node: fx.Node, graph: fx.Graph) -> int | None:
    """Return the number of dimensions of a node's result, or None."""
    shape = shape_of(node, graph)
    return None if shape is None else len(shape)


def attribute(graph: fx.Graph, path: str) -> Any:
    """Return the attribute of the graph's owning module at a dotted path, or None."""
    found: Any = graph.owning_module
    for atom in path.split("."):
        found = getattr(found, atom, None)
    return found
