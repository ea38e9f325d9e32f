"""What a configuration is worth: `Outcome`, and `Evaluator`, which turns configurations into outcomes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from ..kernels.generate import KernelConfig
from .problem import Problem


class Status(StrEnum):
    """What came of a candidate. Only OK has a cost, and can win."""

    OK = "ok"
    SPILLS = "spills"
    OVER_LIMIT = "over_limit"
    WRONG_VALUES = "wrong_values"
    FAILED = "failed"
    CRASHED = "crashed"
    HUNG = "hung"


MODELLED = "modelled us"
MEASURED = "measured us"


@dataclass(frozen=True)
class Outcome:
    """The result of one candidate on one problem.

    cost: microseconds of the whole call, lower is better; None unless status is OK. unit: whether they are MODELLED or
    MEASURED. facts: what is known besides, numbers and strings by name. seconds: what the evaluation took.
    """

    status: Status
    cost: float | None = None
    unit: str = MODELLED
    facts: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    seconds: float = 0.0


class Evaluator(Protocol):
    """Turns configurations into outcomes. Close it (or use `with`), also after an interruption: it has processes."""

    @property
    def unit(self) -> str: ...

    def evaluate(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Each configuration once, with its outcome, as they finish: in any order."""
        ...

    def rerank(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """The best few again, interleaved, where time is noisy; nothing where costs are exact."""
        ...

    def close(self) -> None: ...
