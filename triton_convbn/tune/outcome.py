"""The outcome of a candidate, and the interface of what evaluates candidates."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from ..kernels.config import KernelConfig
from .problem import Problem

COMPILED = "registers"
MEASURED = "measured us"


class Status(StrEnum):
    """What happened to a candidate. Only OK has a cost and can win."""

    OK = "ok"
    SPILLS = "spills"
    OVER_LIMIT = "over_limit"
    WRONG_VALUES = "wrong_values"
    FAILED = "failed"
    CRASHED = "crashed"
    HUNG = "hung"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one candidate on one problem.

    cost: of the whole call, in `unit` (MEASURED microseconds, or COMPILED registers a thread); lower is better. None
    unless status is OK. facts: numbers by name. seconds: duration of the evaluation.
    """

    status: Status
    cost: float | None = None
    unit: str = COMPILED
    facts: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    seconds: float = 0.0


class Evaluator(Protocol):
    """Turns configurations into outcomes. It owns processes: close it, also after an interruption.

    margin: the share of the default's cost that another configuration must save to replace it.
    """

    unit: str
    margin: float

    def evaluate(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Yield each configuration once with its outcome, as they finish."""
        ...

    def rerank(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Yield the best few again, interleaved, if costs are noisy; nothing if they are exact."""
        ...

    def close(self) -> None: ...
