"""Define programs: what the fuzz draws. A program is a short list of calls on tensors.

Its `repr` is Python that makes it again. A program is independent of the dialect: `render` writes it as a graph.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from subclasses import SUBCLASSES
from torch import Tensor

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16", "int64")}


@dataclass(frozen=True)
class V:
    """The result of a step."""

    index: int

    def __repr__(self) -> str:
        return f"V({self.index})"


@dataclass(frozen=True)
class P:
    """A tensor that the program gets: an input, a parameter or a buffer."""

    name: str

    def __repr__(self) -> str:
        return f"P({self.name!r})"


class T(NamedTuple):
    """The description of such a tensor.

    trains: It requires a gradient. variance: Its values are positive. subclass: A name of `SUBCLASSES`, or none.
    """

    shape: tuple[int, ...]
    dtype: str = "float64"
    trains: bool = False
    variance: bool = False
    subclass: str = ""


@dataclass(frozen=True)
class Conv:
    """A convolution with `dims` spatial dimensions. A Linear has 0.

    positional: The number of arguments by position; the others are keywords. general: Call `torch.convolution`.
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
    """A BatchNorm. positional: As in `Conv`. general: Call `torch.batch_norm`."""

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
    """Any other call: of a function by its name in `FUNCTIONS`, or of a method, whose name starts with a dot."""

    function: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def is_random(self) -> bool:
        """Return whether the result depends on the generator, whose numbers differ in another dtype."""
        return "normal_" in self.function or (self.function == "F.dropout" and len(self.args) == 2)


@dataclass(frozen=True)
class Block:
    """Steps in a function of their own, which is called through a higher-order operator or a transform.

    Attributes:
        how: What calls the function, a name of `blocks.HOWS`.
        reads: The values that the function gets. Its steps call them ``P("a0")``, ``P("a1")`` and so on.
        steps: The body. ``V(0)`` is the result of its first step.
        output: What the function returns.
        over: The index of the argument that a transform acts on.
        fixed: The indices of statistics.
    """

    how: str
    reads: tuple[Any, ...]
    steps: tuple[Any, ...]
    output: V
    over: int = 0
    fixed: tuple[int, ...] = ()


Step = Conv | Norm | Call | Block


class Later(NamedTuple):
    """A write to one of the program's tensors after the forward and before the backward."""

    name: str
    how: str


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        tensors: What it gets, by name.
        steps: The calls in order.
        outputs: What it returns.
        seed: The seed of the tensors' values.
        use: How its results are differentiated, a name of `uses.USES`.
        later: Writes between the forward and the backward.
    """

    tensors: dict[str, T]
    steps: tuple[Step, ...]
    outputs: tuple[V, ...]
    seed: int = 0
    use: str = "backward"
    later: tuple[Later, ...] = ()

    def given(self) -> dict[str, Tensor]:
        """Return new tensors with the values of the seed. A fresh BatchNorm's values would hide every fold error."""
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for name, spec in self.tensors.items():
            value = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
            if spec.variance:
                value = value.abs() * 2 + 0.05
            found[name] = value_of(spec, value)
        return found

    def in_fp64(self) -> "Program":
        """Return the program without narrow dtypes. Autocast does not change fp64."""
        tensors = {
            k: spec if spec.dtype == "int64" else spec._replace(dtype="float64") for k, spec in self.tensors.items()
        }
        return replace(self, tensors=tensors, steps=tuple(map(_in_fp64, self.steps)))

    def every_step(self) -> Iterator[Step]:
        """Yield all steps, those of blocks included."""
        for step in self.steps:
            yield step
            if isinstance(step, Block):
                yield from Program({}, step.steps, ()).every_step()


def value_of(spec: T, value: Tensor) -> Tensor:
    """Return the values as the tensor that `spec` describes."""
    value = value.to(DTYPES[spec.dtype])
    return (SUBCLASSES[spec.subclass](value) if spec.subclass else value).requires_grad_(spec.trains)


def _in_fp64(step: Step) -> Step:
    if isinstance(step, Block):
        return replace(step, steps=tuple(map(_in_fp64, step.steps)))
    if not isinstance(step, Call) or step.function not in (".float", ".to"):
        return step
    args = tuple(torch.float64 if isinstance(each, torch.dtype) else each for each in step.args)
    return replace(step, function=step.function.replace(".float", ".double"), args=args)


def substitute(value: Any, found: Callable[[Any], Any]) -> Any:
    """Return the value, a step or an argument, with every V and P replaced."""
    if isinstance(value, V | P):
        return found(value)
    if type(value) in (list, tuple):
        return type(value)(substitute(each, found) for each in value)
    if isinstance(value, dict):
        return {key: substitute(each, found) for key, each in value.items()}
    if isinstance(value, Block):
        return replace(value, reads=substitute(value.reads, found))
    if isinstance(value, Conv | Norm | Call):
        return type(value)(**{key: substitute(each, found) for key, each in vars(value).items()})
    return value


def used(value: Any) -> Iterator[Any]:
    """Yield every V and P in a step or an argument."""
    if isinstance(value, V | P):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from used(each)
    elif isinstance(value, dict):
        yield from used(list(value.values()))
    elif isinstance(value, Block):
        yield from used(value.reads)
    elif isinstance(value, Conv | Norm | Call):
        yield from used(list(vars(value).values()))
