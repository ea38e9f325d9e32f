"""What the evaluation of a candidate results in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """The result of an evaluation. Only OK has a cost and can win."""

    OK = "ok"
    SPILLS = "spills"
    OVER_LIMIT = "over_limit"
    WRONG_VALUES = "wrong_values"
    FAILED = "failed"
    CRASHED = "crashed"
    HUNG = "hung"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one candidate: a configuration of a problem.

    Attributes:
        cost: Of the whole call: registers a thread if compiled, microseconds if measured. None unless status is OK.
        facts: Numbers by name.
        message: Why the candidate cannot win.
        seconds: The duration of the evaluation.
    """

    status: Status
    cost: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""
    seconds: float = 0.0


def in_a_line(error: BaseException) -> str:
    """Return the type, and the first and last line of the message: Triton's messages quote the kernel in between."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip(" \t^")]
    return " ".join([f"{type(error).__name__}:", *dict.fromkeys([*lines[:1], *lines[-1:]])]).removesuffix(":")
