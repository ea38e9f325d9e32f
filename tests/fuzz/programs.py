"""Programs: what the fuzz draws. A program is a short list of calls on tensors, and its `repr` is Python that makes it.

A program says nothing of a dialect. `render.py` writes it as a graph in each of them.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16", "int64")}


@dataclass(frozen=True)
class V:
    """The result of a step."""

    index: int

    def __repr__(self) -> str:
        return f"V({self.index})"


@dataclass(frozen=True)
class P:
    """A tensor that the program is given: an input, a parameter or a buffer."""

    name: str

    def __repr__(self) -> str:
        return f"P({self.name!r})"


class T(NamedTuple):
    """What such a tensor is. trains: it requires a gradient. variance: its values are positive."""

    shape: tuple[int, ...]
    dtype: str = "float64"
    trains: bool = False
    variance: bool = False


@dataclass(frozen=True)
class Conv:
    """A convolution of `dims` spatial dimensions; a Linear where that is 0.

    positional: how many arguments are given by position, the rest by keyword. general: spelled `torch.convolution`.
    """

    x: Any
    weight: Any
    bias: Any = None
    dims: int = 2
    stride: int = 1
    padding: int | str = 0
    dilation: int = 1
    groups: int = 1
    transposed: bool = False
    output_padding: int = 0
    padding_mode: str = "zeros"
    positional: int = 3
    general: bool = False


@dataclass(frozen=True)
class Norm:
    """A BatchNorm. positional: as of `Conv`. general: spelled `torch.batch_norm`."""

    x: Any
    mean: Any
    var: Any
    weight: Any = None
    bias: Any = None
    training: bool = False
    eps: float = 1e-5
    positional: int = 5
    general: bool = False


@dataclass(frozen=True)
class Call:
    """Any other call: of a function by the name that `FUNCTIONS` gives it, or of a method, whose name has a dot."""

    function: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def is_random(self) -> bool:
        """Whether what it returns depends on the generator, whose numbers are others in another dtype."""
        return "normal_" in self.function or (self.function == "F.dropout" and len(self.args) == 2)


Step = Conv | Norm | Call


@dataclass(frozen=True)
class Program:
    """tensors: what it is given, by name. steps: in order. outputs: what it returns. seed: of the tensors' values."""

    tensors: dict[str, T]
    steps: tuple[Step, ...]
    outputs: tuple[V, ...]
    seed: int = 0

    def given(self) -> dict[str, Tensor]:
        """New tensors with the values of the seed: a hostile BatchNorm, for a fresh one hides every fold error."""
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for name, spec in self.tensors.items():
            value = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
            if spec.variance:
                value = value.abs() * 2 + 0.05
            found[name] = value.to(DTYPES[spec.dtype]).requires_grad_(spec.trains)
        return found

    def in_fp64(self) -> "Program":
        """The same without a narrow dtype in it. Autocast leaves fp64 as it is."""
        tensors = {
            k: spec if spec.dtype == "int64" else spec._replace(dtype="float64") for k, spec in self.tensors.items()
        }
        return replace(self, tensors=tensors, steps=tuple(map(_in_fp64, self.steps)))


def _in_fp64(step: Step) -> Step:
    if not isinstance(step, Call) or step.function not in (".float", ".to"):
        return step
    args = tuple(torch.float64 if isinstance(each, torch.dtype) else each for each in step.args)
    return replace(step, function=step.function.replace(".float", ".double"), args=args)


_NAMES = [
    "torch.add",
    "torch.sub",
    "torch.mul",
    "torch.tanh",
    "torch.sigmoid",
    "torch.cos",
    "torch.cat",
    "torch.flatten",
    "torch.relu_",
    "torch.reshape",
    "torch.clone",
    "torch.neg",
    "torch.rsqrt",
    "torch._foreach_add_",
    "F.relu",
    "F.dropout",
    "F.silu",
    "F.hardtanh",
    "F.max_pool2d",
    "nn.init.constant_",
    "nn.init.normal_",
    "operator.add",
    "operator.mul",
    "operator.sub",
    "operator.iadd",
    "operator.imul",
    "operator.setitem",
    "operator.getitem",
    "operator.neg",
    "torch.Tensor.add_",
    "torch.Tensor.mul_",
    "torch.Tensor.normal_",
    "torch.Tensor.renorm_",
    "torch.Tensor.__setitem__",
    "torch.Tensor.__iadd__",
    "torch._C._set_grad_enabled",
    "torch.amp.autocast_mode._enter_autocast",
    "torch.amp.autocast_mode._exit_autocast",
]
_ROOTS = {"torch": torch, "F": F, "nn": nn, "operator": operator}


def _named(name: str) -> Callable[..., Any]:
    root, *rest = name.split(".")
    return functools.reduce(getattr, rest, _ROOTS[root])


FUNCTIONS: dict[str, Callable[..., Any]] = {"getattr": getattr} | {name: _named(name) for name in _NAMES}


def substitute(value: Any, found: Callable[[Any], Any]) -> Any:
    """The value with every V and P in it replaced."""
    if isinstance(value, V | P):
        return found(value)
    if type(value) in (list, tuple):
        return type(value)(substitute(each, found) for each in value)
    if isinstance(value, dict):
        return {key: substitute(each, found) for key, each in value.items()}
    return value


def used(value: Any) -> Iterator[Any]:
    """Every V and P in a step or an argument."""
    if isinstance(value, V | P):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from used(each)
    elif isinstance(value, dict):
        yield from used(list(value.values()))
    elif isinstance(value, Conv | Norm | Call):
        yield from used(list(vars(value).values()))


# -- a step as a call of a function ------------------------------------------------------------------------------------

_CONVS = {
    (0, False): F.linear,
    (1, False): torch.conv1d,
    (2, False): torch.conv2d,
    (3, False): torch.conv3d,
    (1, True): torch.conv_transpose1d,
    (2, True): torch.conv_transpose2d,
    (3, True): torch.conv_transpose3d,
}

Spelled = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def spell_conv(step: Conv, x: Any, weight: Any, bias: Any) -> Spelled:
    """The function of a convolution, its arguments by position and those by keyword; without its padding mode."""
    padding = 0 if step.padding_mode != "zeros" else step.padding
    if step.general:
        n = step.dims
        sizes = [[step.stride] * n, [padding] * n, [step.dilation] * n, step.transposed, [step.output_padding] * n]
        return torch.convolution, (x, weight, bias, *sizes, step.groups), {}
    named: dict[str, Any] = {"input": x, "weight": weight, "bias": bias}
    if step.dims:
        named |= {"stride": step.stride, "padding": padding}
        if step.transposed:
            named |= {"output_padding": step.output_padding, "groups": step.groups, "dilation": step.dilation}
        else:
            named |= {"dilation": step.dilation, "groups": step.groups}
    return _CONVS[step.dims, step.transposed], *_split(named, step.positional)


def spell_norm(step: Norm, x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Spelled:
    """The same of a BatchNorm."""
    if step.general:
        return torch.batch_norm, (x, weight, bias, mean, var, step.training, 0.1, step.eps, False), {}
    named = {"input": x, "running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    named |= {"training": step.training, "momentum": 0.1, "eps": step.eps}
    return F.batch_norm, *_split(named, step.positional)


def _split(named: dict[str, Any], positional: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first by position. A keyword that is None is left out, as people leave it out."""
    items = list(named.items())
    keywords = {name: value for name, value in items[positional:] if value is not None}
    return tuple(value for _, value in items[:positional]), keywords


def padding_of(step: Conv) -> list[int]:
    """What `F.pad` is told before a convolution whose padding mode is not zeros."""
    return [int(step.padding)] * (2 * step.dims)


def perform(step: Step, found: Callable[[Any], Any]) -> Any:
    """Make the call, on tensors or on graph proxies."""
    if isinstance(step, Conv):
        x, weight, bias = (substitute(value, found) for value in (step.x, step.weight, step.bias))
        if step.padding_mode != "zeros":
            x = F.pad(x, padding_of(step), mode=step.padding_mode)
        function, args, kwargs = spell_conv(step, x, weight, bias)
        return function(*args, **kwargs)
    if isinstance(step, Norm):
        values = (substitute(value, found) for value in (step.x, step.mean, step.var, step.weight, step.bias))
        function, args, kwargs = spell_norm(step, *values)
        return function(*args, **kwargs)
    args, kwargs = substitute(step.args, found), substitute(step.kwargs, found)
    if step.function.startswith("."):
        return getattr(args[0], step.function[1:])(*args[1:], **kwargs)
    return FUNCTIONS[step.function](*args, **kwargs)
