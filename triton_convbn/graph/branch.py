"""Describe a branch: a node that is linear in one tensor, and the convolutions that make it so."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from torch import fx

from .calls import Attribute, BatchNormCall, ConvCall, Value
from .reasons import Reason

Expression = tuple[Any, ...]
"""A branch as in `ops.branch_form`, with the values of the graph instead of positions in a list."""


DEEPEST = 50
"""The maximum depth of a branch. A thousand factors in a row would exceed Python's recursion limit."""


@dataclass(frozen=True)
class Grid:
    """Where a convolution reads its input. Each field has one number per spatial dimension.

    Attributes:
        kernel, stride, dilation: The convolution's.
        offset: Twice the distance from the input's first position to the middle of the first window:
            ``dilation * (kernel - 1) - 2 * padding``.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def of(cls, kernel: tuple[Any, ...], stride: Any, padding: Any, dilation: Any) -> "Grid | None":
        """Return the grid of a convolution's arguments. None if one is no number, or "same" pads unevenly."""
        n = len(kernel)
        strides, dilations = _sizes(stride, n), _sizes(dilation, n)
        if strides is None or dilations is None or not all(isinstance(size, int) for size in kernel):
            return None
        spans = [step * (size - 1) for step, size in zip(dilations, kernel, strict=True)]
        if padding == "same":
            return None if any(span % 2 for span in spans) else cls(kernel, strides, dilations, (0,) * n)
        margins = (0,) * n if padding == "valid" else _sizes(padding, n)
        if margins is None:
            return None
        offset = tuple(span - 2 * margin for span, margin in zip(spans, margins, strict=True))
        return cls(kernel, strides, dilations, offset)

    @classmethod
    def of_input(cls, dimensions: int) -> "Grid":
        """Return the grid of the identity."""
        return cls((1,) * dimensions, (1,) * dimensions, (1,) * dimensions, (0,) * dimensions)

    def obstacle_in(self, largest: "Grid") -> Reason | None:
        """Return why this kernel, in the middle of the largest one, would not read the same positions, or None."""
        if any(size > most for size, most in zip(self.kernel, largest.kernel, strict=True)):
            return Reason.KERNEL_GROWS
        if self.stride != largest.stride or self.offset != largest.offset:
            return Reason.OTHER_GRID
        for size, step, most, widest in zip(self.kernel, self.dilation, largest.kernel, largest.dilation, strict=True):
            if (size > 1 and step != widest) or (most - size) % 2:  # an even kernel has its middle between two elements
                return Reason.OTHER_GRID
        return None

    @property
    def padding(self) -> tuple[int, ...]:
        sizes = zip(self.offset, self.dilation, self.kernel, strict=True)
        return tuple((dilation * (size - 1) - offset) // 2 for offset, dilation, size in sizes)


class ConvShape(NamedTuple):
    """What decides whether convolutions merge: C_out, C_in / groups, groups, and where it reads."""

    channels: int
    columns: int
    groups: int
    grid: Grid


Owner = TypeVar("Owner")


def sum_obstacle(
    convs: Sequence[tuple[Owner, ConvShape]], norms: Sequence[tuple[Owner, int]], x: Owner | None
) -> tuple[Reason, Owner] | None:
    """Return why the sum of these is not one convolution, and which of them is the cause, or None.

    Args:
        convs: The convolutions, each with its owner: a node of a graph, or a module.
        norms: The BatchNorms' numbers of channels.
        x: The owner of the input if it is a term by itself, or behind a BatchNorm.
    """
    _, largest = max(convs, key=lambda each: each[1].grid.kernel)
    for owner, conv in convs:
        reason = conv.grid.obstacle_in(largest.grid)
        if reason is not None:
            return reason, owner
        if (conv.groups, conv.columns) != (largest.groups, largest.columns):
            return Reason.OTHER_GROUPS, owner
        if conv.channels != largest.channels:
            return Reason.BROADCAST, owner
    if x is not None:
        reason = Grid.of_input(len(largest.grid.kernel)).obstacle_in(largest.grid)
        if reason is not None or largest.columns * largest.groups != largest.channels:
            return reason or Reason.BROADCAST, x
    return next(((Reason.CHANNELS, owner) for owner, length in norms if length != largest.channels), None)


@dataclass(frozen=True)
class Branch:
    """A node that is linear in one tensor.

    Attributes:
        node: The node of the result.
        input: The tensor that the convolutions read.
        expression: The calls, nested.
        convs: The convolutions, each with its grid.
        norms: The BatchNorms.
        own: The nodes of the branch.
        sums: The number of additions.
        reads_input: The input is a term by itself, or behind a BatchNorm or a factor.
        depth: The number of BatchNorms and factors that are nested in it, at most DEEPEST.
        first_norm: The BatchNorm whose output has the strides of the result, if one does: a sum has those of its first
            operand.
    """

    node: fx.Node
    input: fx.Node
    expression: Expression
    convs: tuple[tuple[ConvCall, Grid], ...] = ()
    norms: tuple[BatchNormCall, ...] = ()
    own: tuple[fx.Node, ...] = ()
    sums: int = 0
    reads_input: bool = False
    depth: int = 0
    first_norm: BatchNormCall | None = None

    @property
    def largest(self) -> tuple[ConvCall, Grid]:
        """Return the convolution whose kernel holds the others, with its grid."""
        return max(self.convs, key=lambda each: each[1].kernel)

    def inside(
        self,
        node: fx.Node,
        expression: Expression,
        own: Sequence[fx.Node],
        norms: tuple[BatchNormCall, ...] = (),
    ) -> "Branch | None":
        """Return this branch inside a BatchNorm or a factor, or None if it is too deep."""
        if self.depth == DEEPEST:
            return None
        own, norms = (*self.own, *own), (*self.norms, *norms)
        return replace(self, node=node, expression=expression, own=own, norms=norms, depth=self.depth + 1)

    @property
    def terms(self) -> int:
        """Return the number of branches that are added up."""
        return self.sums + 1

    def values(self) -> tuple[Value, ...]:
        """Return every tensor of the expression once, in order."""
        return tuple(dict.fromkeys(_values(self.expression)))


@dataclass(frozen=True)
class SumDecline:
    """A sum of a convolution and something else that is not merged, why, and the node that is the cause, if one is."""

    node: fx.Node
    reason: Reason
    cause: fx.Node | None = None

    def __str__(self) -> str:
        return f"{self.node.name}: {self.reason.text}" + (f" ({self.cause.name})" if self.cause is not None else "")


def parts(sign: int, expression: Expression) -> Iterator[tuple[int, Expression]]:
    """Yield the terms of an expression. A sum of sums is one sum, however many there are."""
    if expression[0] != "sum":
        yield sign, expression
        return
    for own, inner in expression[1:]:
        yield sign * own, inner


def _values(expression: Any) -> Iterator[Value]:
    for each in expression:
        if isinstance(each, tuple):
            yield from _values(each)
        elif isinstance(each, fx.Node | Attribute):
            yield each


def _sizes(value: Any, dimensions: int) -> tuple[int, ...] | None:
    """Return one number per spatial dimension, or None if the value has something else."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in values):
        return None
    values = values * dimensions if len(values) == 1 else values
    return tuple(values) if len(values) == dimensions else None
