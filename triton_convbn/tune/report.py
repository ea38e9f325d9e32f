"""What a tuning run found: a table of every candidate, the best few on the terminal, and the tuned file's entries."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..kernels.tuned import OFFLINE, Choice, Entry, generator_hash
from .outcome import Status
from .run import Result
from .store import Header

if TYPE_CHECKING:
    import pandas as pd

BEST = 3
SHARE = "share_of_bandwidth"
SHOWN_FACTS = (("registers", "registers", "{:.0f}"), ("occupancy", "occupancy", "{:.0%}"))
"""Of the facts: the name, the title and the format of those that the terminal shows."""


def how(header: Header) -> str:
    """How the costs of a store with that header were got."""
    return f"measured on {header.device}" if header.device else OFFLINE


def rows_of(results: Sequence[Result], header: Header, commit: str) -> list[dict[str, Any]]:
    """One row a candidate: which, what came of it, how it compares with the default, its facts, where that holds.

    gain: times as fast as the default. share_of_bandwidth: of the bandwidth limit of the device. Facts have columns of
    their own, after these.
    """
    facts = dict.fromkeys(name for each in results for outcome in each.outcomes.values() for name in outcome.facts)
    found = []
    for result in results:
        problem, winner = result.problem, None if result.checks else result.winner
        order = [*result.ranked, *(c for c, o in result.outcomes.items() if o.status is not Status.OK)]
        for config in order:
            outcome = result.outcomes[config]
            row: dict[str, Any] = {"problem": problem.key, "key": problem.tuned_key, "pairs": len(problem.specs)}
            row["elements"] = problem.elements
            row |= config.to_dict()
            row |= {"status": str(outcome.status), "cost": outcome.cost, "unit": outcome.unit}
            row |= {"gain": result.gain(config), SHARE: outcome.facts.get(SHARE)}
            row |= {"default": config == result.space.default, "winner": config == winner}
            row |= {name: outcome.facts.get(name) for name in facts if name not in row}
            row |= {"message": outcome.message, "seconds": outcome.seconds, "how": how(header)}
            found.append(row | {k: v for k, v in asdict(header).items() if k != "schema"} | {"commit": commit})
    return found


def frame(rows: Sequence[dict[str, Any]]) -> "pd.DataFrame":
    """The rows as a table; whole numbers stay whole where some are missing."""
    import pandas as pd

    return pd.DataFrame(list(rows)).convert_dtypes()


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """In the place of what was there. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    try:
        frame(rows).to_csv(draft, index=False)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def entries_of(results: Sequence[Result], header: Header) -> list[Entry]:
    """For the tuned file: one for each key that has a winner."""
    found = []
    for result in results:
        winner = result.winner
        if winner is None or result.checks:
            continue
        outcome, default = result.outcomes[winner], result.default
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
    return None if cost is None or not math.isfinite(cost) else round(cost, 3)


def summary(result: Result) -> dict[str, Any]:
    """For --json: how the search of a problem went, and what won."""
    winner, default = result.winner, result.default
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
    """How many candidates cannot win, by status."""
    counts = Counter(str(o.status) for o in result.outcomes.values() if o.status is not Status.OK)
    return dict(sorted(counts.items()))


def show(results: Sequence[Result], header: Header, console: Console) -> None:
    """A table for each problem: the best few and the default; below it what could not win, and the first reason."""
    for result in results:
        if not result.checks:
            console.print(_table(result, header))
        elif result.outcomes:
            gain = max(
                (result.gain(config) or 0 for config in result.outcomes if config != result.space.default), default=0
            )
            console.print(f"the winner on {result.problem.describe()}: {gain:.3f}", markup=False, highlight=False)
        _notes(result, console)


def _table(result: Result, header: Header) -> Table:
    tried, every = len(result.outcomes), len(result.space.configurations(result.problem))
    title = f"{result.problem.describe()}\n{header.device or header.arch}, {how(header)}; {tried} of {every} tried"
    table = Table(title=escape(title))
    table.add_column("configuration", overflow="fold", min_width=24)
    unit = next((outcome.unit for outcome in result.outcomes.values()), "")
    for name in (unit, "gain", "of bandwidth", *(title for _, title, _ in SHOWN_FACTS)):
        table.add_column(name, justify="right")
    table.add_column("")
    ranked, winner = result.ranked, result.winner
    shown = [c for c in ranked if c in ranked[:BEST] or c in (winner, result.space.default)]
    for config in shown:
        outcome, gain = result.outcomes[config], result.gain(config)
        cells = [config.describe(), f"{outcome.cost:.2f}", "" if gain is None else f"{gain:.3f}"]
        cells += [_fact(outcome.facts, SHARE, "{:.0%}"), *(_fact(outcome.facts, n, f) for n, _, f in SHOWN_FACTS)]
        words = [word for word, which in (("winner", winner), ("default", result.space.default)) if config == which]
        table.add_row(*cells, ", ".join(words))
    return table


def _fact(facts: Any, name: str, form: str) -> str:
    value = facts.get(name)
    return form.format(value) if isinstance(value, int | float) else ""


def _notes(result: Result, console: Console) -> None:
    for status, count in failures(result).items():
        first = next(o.message for o in result.outcomes.values() if o.status == status)
        console.print(f"{count} {status}: {first[:200]}", markup=False, soft_wrap=True, highlight=False)
    if result.overruled:
        console.print(f"the default stays: {result.overruled}", markup=False, soft_wrap=True, highlight=False)
    if result.winner is None and not result.checks:
        console.print("nothing can win: the default stays in force", highlight=False)
    if not result.ended:
        console.print("the budget ran out: run it again to go on", highlight=False)


def show_choices(choices: Sequence[Choice], where: str, console: Console) -> None:
    """Which configuration is in force for each key, from which file, and why."""
    table = Table(title=escape(f"in force on {where}"))
    for column in ("key", "configuration", "why", "file"):
        table.add_column(column, overflow="fold")
    for choice in choices:
        table.add_row(*map(escape, (choice.key, choice.config.describe(), choice.why, str(choice.file or ""))))
    console.print(table)
    for choice in choices:
        for words in choice.passed_over:
            console.print(f"{choice.key}: passed over {words}", markup=False, soft_wrap=True, highlight=False)


def choice_row(choice: Choice) -> dict[str, Any]:
    """For --json."""
    return {
        "key": choice.key,
        "config": choice.config.to_dict(),
        "file": None if choice.file is None else str(choice.file),
        "why": choice.why,
        "entry": None if choice.entry is None else asdict(choice.entry),
        "passed_over": list(choice.passed_over),
    }
