"""The ways to write a convolution and a BatchNorm: one file per dialect, found because it is in this folder.

A dialect is a module of this package with three functions, each of which takes an ``fx.Node`` and returns None where
the node is none of its own:

    conv(node) -> ConvCall | None
    batch_norm(node) -> BatchNormCall | None
    step(node) -> PassthroughCall | None

Sums, factors, pads and calls that move elements are written alike in all of them, so one file reads each: `_sums`,
`_padding`, `_moves`.
"""

import importlib
import pkgutil
from functools import cache
from typing import Protocol

from torch import fx

from ..calls import BatchNormCall, ConvCall, PassthroughCall
from ._moves import read_move
from ._padding import REPEATING, read_padding
from ._sums import read_factor, read_sum

__all__ = [
    "REPEATING",
    "dialects",
    "read_batch_norm",
    "read_conv",
    "read_factor",
    "read_padding",
    "read_passthrough",
    "read_sum",
]


class Dialect(Protocol):
    """A module that reads the calls of one kind of graph."""

    def conv(self, node: fx.Node) -> ConvCall | None:
        """Return the convolution or Linear that `node` calls, or None."""

    def batch_norm(self, node: fx.Node) -> BatchNormCall | None:
        """Return the BatchNorm that `node` calls, or whose arithmetic ends with it, or None."""

    def step(self, node: fx.Node) -> PassthroughCall | None:
        """Return the call that `node` is if it only moves, drops or repeats elements, or None."""


@cache
def dialects() -> tuple[Dialect, ...]:
    """Return every dialect of this package by name. Files that start with an underscore are helpers."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    return tuple(importlib.import_module(f"{__name__}.{name}") for name in names)


def read_conv(node: fx.Node) -> ConvCall | None:
    """Return the convolution that `node` calls in some dialect, or None."""
    return next((call for dialect in dialects() if (call := dialect.conv(node)) is not None), None)


def read_batch_norm(node: fx.Node) -> BatchNormCall | None:
    """Return the BatchNorm that `node` calls in some dialect, or None."""
    return next((call for dialect in dialects() if (call := dialect.batch_norm(node)) is not None), None)


def read_passthrough(node: fx.Node) -> PassthroughCall | None:
    """Return the call that `node` is if it only moves, drops or repeats elements in some dialect, or None."""
    return next((call for dialect in dialects() if (call := dialect.step(node)) is not None), None) or read_move(node)
