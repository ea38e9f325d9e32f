"""Run the long fuzz: python tests/fuzz/run.py [--examples 10000] [--seed N]

Prints how many examples ran, the folds, the declines by reason, and a table of what was drawn. The exit code is 1 if
the property does not hold. The smallest example that breaks it is printed as Python, for `regressions.py`.
"""

import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from kinds import kinds_of
from property import Invalid, check
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from strategies import examples


@dataclass
class Seen:
    """Counts of a run.

    Attributes:
        totals: Examples, folds and declines.
        drawn, valid, folding: By kind, the examples that contain it, those that test something, those that fold.
    """

    totals: Counter[str] = field(default_factory=Counter)
    drawn: Counter[str] = field(default_factory=Counter)
    valid: Counter[str] = field(default_factory=Counter)
    folding: Counter[str] = field(default_factory=Counter)

    def table(self) -> str:
        lines = [f"{'drawn':>8}{'valid':>8}{'folding':>8}"]
        for kind in sorted(self.drawn):
            lines.append(f"{self.drawn[kind]:8,}{self.valid[kind]:8,}{self.folding[kind]:8,}  {kind}")
        return "\n".join(lines)


def fuzz(count: int, seed: int, step: Any = lambda: None) -> tuple[Seen, str | None]:
    """Return the counts, and the smallest example that failed if one did."""
    seen = Seen()
    failed: list[str] = []

    @seeded(seed)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(examples())
    def once(example: Any) -> None:
        program, dialect, host, options = example
        kinds = kinds_of(program, dialect, host, options)
        seen.totals["examples"] += 1
        seen.drawn.update(kinds)
        step()
        try:
            folded = check(program, dialect, host, seen.totals, **options)
        except Invalid:
            seen.totals["examples that test nothing"] += 1
            return
        except Exception as error:
            failed[:] = [f"{program}\n{dialect}, {host}, {options}\n{type(error).__name__}: {error}"]
            raise
        seen.valid.update(kinds)
        if folded:
            seen.totals["examples that fold"] += 1
            seen.folding.update(kinds)

    try:
        once()
    except Exception as error:  # of an example, or hypothesis's own
        return seen, failed[-1] if failed else f"{type(error).__name__}: {error}"
    return seen, None


def main(
    count: Annotated[int, typer.Option("--examples", min=1, help="How many examples are drawn.")] = 10_000,
    seed: Annotated[int, typer.Option(help="The seed of the examples. 0 draws one.")] = 0,
) -> None:
    """Check the property over many random programs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seed = seed or time.time_ns() % 2**32
    print(f"seed {seed}", flush=True)
    start, cpu = time.perf_counter(), time.process_time()
    with Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=count)
        seen, failed = fuzz(count, seed, lambda: bar.update(task, advance=1))
    seconds = time.perf_counter() - start
    for name, number in seen.totals.most_common():
        print(f"{number:8,} {name}")
    print(seen.table())
    print(f"{seen.totals['examples']:,} examples in {seconds:.0f} s, {time.process_time() - cpu:.0f} s of CPU")
    if failed is not None:
        print(f"The property does not hold:\n{failed}")
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
