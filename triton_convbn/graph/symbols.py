"""Read the numbers that Dynamo captures as symbols under ``dynamic=True``."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo import config
from torch._guards import CompileContext
from torch.utils._sympy.symbol import SymT, symbol_is_type

_seen: dict[tuple[int, str], float] = {}
"""The first value of each symbol, by the frame that Dynamo compiles and the symbol's source."""


@dataclass(frozen=True)
class Symbol:
    """A number of the graph whose value is not read yet."""

    node: fx.Node

    def value(self) -> float:
        """Return the value. Dynamo then compiles again for another one."""
        return float(self.node.meta["example_value"])


def number(value: Any) -> float | Symbol | None:
    """Return a finite number, or a symbol that stands for one. None for anything else.

    Infinity times a merged weight would be NaN everywhere.
    """
    if isinstance(value, fx.Node):
        return Symbol(value) if _is_constant(value) else None
    return None if value is None or not math.isfinite(value := float(value)) else value


def _is_constant(node: fx.Node) -> bool:
    """Return whether a graph for the symbol's present value alone loses nothing.

    Dynamo makes symbols of all numbers, or else of those that have changed. One that had another value before, such as
    a schedule's, will have others: a graph for each would soon exceed Dynamo's limit of 8.
    """
    example, frame = node.meta.get("example_value"), CompileContext.current_compile_id()
    hint = example.node.hint if isinstance(example, torch.SymFloat) and example.node.has_hint() else None
    if not isinstance(example, torch.SymFloat) or not isinstance(hint, float) or not math.isfinite(hint):
        return False
    expression, shape_env = example.node.expr, example.node.shape_env
    if expression.is_number:
        return True
    if config.assume_static_by_default or not expression.is_Symbol or not symbol_is_type(expression, SymT.FLOAT):
        return False
    if frame is None or frame.frame_id is None or shape_env is None:
        return False
    key = frame.frame_id, str(shape_env.var_to_sources[expression][0])
    if frame.frame_compile_id == 0:  # the frame is new, or Dynamo was reset
        _seen[key] = hint
    return _seen.setdefault(key, hint) == hint


def with_values(expression: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return nested tuples with the values of their symbols."""
    found = (with_values(each) if isinstance(each, tuple) else each for each in expression)
    return tuple(each.value() if isinstance(each, Symbol) else each for each in found)
