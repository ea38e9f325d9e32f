"""Describe a branch: a node that is linear in one tensor, and the convolutions that make it so."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from .calls import Attribute, BatchNormCall, ConvCall, Value
from .reasons import Reason

Expression = tuple[Any, ...]
"""A branch as in `ops.branches`, with the values of the graph instead of positions in a list."""


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

    @property
    def padding(self) -> tuple[int, ...]:
        sizes = zip(self.offset, self.dilation, self.kernel, strict=True)
        return tuple((dilation * (size - 1) - offset) // 2 for offset, dilation, size in sizes)


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
    """

    node: fx.Node
    input: fx.Node
    expression: Expression
    convs: tuple[tuple[ConvCall, Grid], ...] = ()
    norms: tuple[BatchNormCall, ...] = ()
    own: tuple[fx.Node, ...] = ()
    sums: int = 0
    reads_input: bool = False

    @property
    def largest(self) -> tuple[ConvCall, Grid]:
        """The convolution whose kernel holds the others, with its grid."""
        return max(self.convs, key=lambda each: each[1].kernel)

    def values(self) -> tuple[Value, ...]:
        """Return every tensor of the expression once, in order."""
        return tuple(dict.fromkeys(_values(self.expression)))


@dataclass(frozen=True)
class SumDecline:
    """A sum of a convolution and something else that is not merged, and why. `detail` names the cause."""

    node: fx.Node
    reason: Reason
    detail: str = ""


def _values(expression: Any) -> Iterator[Value]:
    for each in expression:
        if isinstance(each, tuple):
            yield from _values(each)
        elif isinstance(each, fx.Node | Attribute):
            yield each
