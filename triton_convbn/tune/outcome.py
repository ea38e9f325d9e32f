"""What a configuration is worth, and what finds out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from ..kernels.codegen import KernelConfig, KernelSource
from .problem import Problem, Specs

Generate = Callable[[Specs, KernelConfig], KernelSource]
"""What writes the kernel of one launch: `kernels.codegen.generate`."""


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
    """Turns configurations into outcomes. Close it (or use `with`), also after an interruption: it has processes.

    unit: of every cost, MODELLED or MEASURED. margin: by how much of the default's cost another configuration has to be
    better to take its place; less is noise, of the clock or of the model.
    """

    unit: str
    margin: float

    def evaluate(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Each configuration once, with its outcome, as they finish: in any order."""
        ...

    def rerank(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """The best few again, interleaved, where time is noisy; nothing where costs are exact."""
        ...

    def close(self) -> None: ...
