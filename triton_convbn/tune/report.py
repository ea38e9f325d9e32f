"""Reports of a tuning run: rows of all candidates, tables of the best, and the entries of the tuned file."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..kernels.tuned import OFFLINE, Choice, Entry, generator_hash
from .header import Header
from .outcome import Status
from .run import Result

BEST = 3


def how(header: Header) -> str:
    """Return how the costs of a store with that header were obtained, in words."""
    return f"measured on {header.device}" if header.device else OFFLINE


def rows_of(results: Sequence[Result], header: Header, commit: str) -> list[dict[str, Any]]:
    """Return one row a candidate: configuration, outcome, gain over the default, facts, versions."""
    found = []
    for result in results:
        problem, winner = result.problem, None if result.checks else result.winner
        order = [*result.ranked, *(c for c, o in result.outcomes.items() if o.status is not Status.OK)]
        for config in order:
            outcome = result.outcomes[config]
            row = {"problem": problem.key, "key": problem.tuned_key, "pairs": len(problem.specs)}
            row |= {"elements": problem.elements, **config.to_dict()}
            row |= {"status": str(outcome.status), "cost": outcome.cost, "unit": outcome.unit}
            row |= {"gain": result.gain(config), "default": config == result.space.default, "winner": config == winner}
            row |= {**outcome.facts, "message": outcome.message, "seconds": outcome.seconds, "how": how(header)}
            found.append(row | {k: v for k, v in asdict(header).items() if k != "schema"} | {"commit": commit})
    return found


def entries_of(results: Sequence[Result], header: Header) -> list[Entry]:
    """Return the entries of the tuned file: one for each key with a winner."""
    found = []
    for result in results:
        winner = result.winner
        if winner is None or result.checks:
            continue
        outcome, default = result.outcomes[winner], result.outcomes.get(result.space.default)
        found.append(
            Entry(
                key=result.problem.tuned_key,
                config=winner,
                how=how(header),
                device=header.device,
                cost=_rounded(outcome.cost),
                default_cost=None if default is None else _rounded(default.cost),
                unit=outcome.unit,
                problem=result.problem.describe(),
                tried=len(result.outcomes),
                torch=header.torch,
                triton=header.triton,
                sources=generator_hash(),
            )
        )
    return found


def _rounded(cost: float | None) -> float | None:
    return None if cost is None else round(cost, 3)


def summary(result: Result) -> dict[str, Any]:
    """Return the course of a search and its winner, for --json."""
    winner, default = result.winner, result.outcomes.get(result.space.default)
    return {
        "problem": result.problem.key,
        "key": result.problem.tuned_key,
        "describe": result.problem.describe(),
        "space": len(result.space.configurations(result.problem)),
        "tried": len(result.outcomes),
        "evaluated": result.evaluated,
        "from_store": result.known,
        "ended": result.ended,
        "checks": result.checks,
        "overruled": result.overruled,
        "winner": None if winner is None else winner.to_dict(),
        "cost": None if winner is None else result.outcomes[winner].cost,
        "default_cost": None if default is None else default.cost,
        "gain": None if winner is None else result.gain(winner),
        "failures": failures(result),
    }


def failures(result: Result) -> dict[str, int]:
    """Return the number of candidates that cannot win, by status."""
    return dict(sorted(Counter(str(o.status) for o in result.outcomes.values() if o.status is not Status.OK).items()))


def show(results: Sequence[Result], header: Header, console: Console) -> None:
    """Print the best few and the default of each problem, then what cannot win with its first reason."""
    for result in results:
        if not result.checks:
            console.print(_table(result, header))
        for status, count in failures(result).items():
            first = next(o.message for o in result.outcomes.values() if o.status == status)
            console.print(f"{count} {status}: {first[:200]}", markup=False, soft_wrap=True, highlight=False)
        if result.overruled:
            console.print(f"the default stays: {result.overruled}", markup=False, soft_wrap=True, highlight=False)
        if result.winner is None and not result.checks:
            console.print("nothing can win: the default stays in force", highlight=False)
        if not result.ended:
            console.print("the budget ran out: run the same command again to resume", highlight=False)


def _table(result: Result, header: Header) -> Table:
    tried, every = len(result.outcomes), len(result.space.configurations(result.problem))
    title = f"{result.problem.describe()}\n{header.device or header.arch}, {how(header)}; {tried} of {every} tried"
    unit = next((outcome.unit for outcome in result.outcomes.values()), "cost")
    table = Table("configuration", unit, "gain", "bytes", "", title=escape(title))
    ranked, winner = result.ranked, result.winner
    for config in (c for c in ranked if c in ranked[:BEST] or c in (winner, result.space.default)):
        outcome = result.outcomes[config]
        words = [word for word, which in (("winner", winner), ("default", result.space.default)) if config == which]
        cells = [f"{outcome.cost:.2f}", f"{result.gain(config) or math.nan:.3f}", str(outcome.facts.get("bytes", ""))]
        table.add_row(config.describe(), *cells, ", ".join(words))
    return table


def show_choices(choices: Sequence[Choice], where: str, console: Console) -> None:
    """Print the configuration in force for each key, its file, and why."""
    table = Table("key", "configuration", "why", "file", title=escape(f"in force on {where}"))
    for choice in choices:
        table.add_row(*map(escape, (choice.key, choice.config.describe(), choice.why, str(choice.file or ""))))
    console.print(table)
    for choice in choices:
        for words in choice.passed_over:
            console.print(f"{choice.key}: passed over {words}", markup=False, soft_wrap=True, highlight=False)


def choice_row(choice: Choice) -> dict[str, Any]:
    """Return the row of a choice, for --json."""
    return asdict(choice) | {"file": None if choice.file is None else str(choice.file)}
