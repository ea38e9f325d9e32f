"""A run of `triton-convbn tune`: store, search, winners, report."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ..errors import UsageError
from ..kernels.files import write_atomically
from ..kernels.tuned import user_file, write
from ..progress import errors, progress
from ..versions import commit
from .header import Header
from .outcome import Evaluator
from .problem import Problem
from .report import entries_of, how, rows_of, show, summary
from .run import Preset, Result, Tuning
from .store import Content, Store


@dataclass(frozen=True)
class Session:
    """A run that records and puts its winners in force.

    Under torchrun, each process takes its share of the keys on its own GPU. All share one store and one tuned file.
    Each writes its own CSV, with the rank in the name.
    """

    header: Header
    preset: Preset
    store: Path
    seed: int = 0
    csv: Path | None = None
    tuned: Path | None = None
    json: bool = False
    begun: float | None = None

    def run(self, problems: Sequence[Problem], evaluator: Evaluator) -> None:
        """Tune, record, put the winners in force, report, and close the evaluator.

        Raises:
            UsageError: for a store that cannot be written, or of another device or version.
            typer.Exit: with code 1 if nothing can win a problem, or the winners cannot be written.
        """
        problems, failed = _share(problems), ""
        store = None
        try:
            store = Store(self.store, self.header)
            results = tuned_results(problems, evaluator, store, self.preset, self.seed, self.begun, quiet=False)
            entries = entries_of(results, self.header)
            target: Path | None = None
            try:
                target = self.tuned or user_file(self.header.arch)
                with store.locked():
                    if entries:
                        write(target, self.header.arch, entries)
            except (OSError, ImportError) as error:
                failed = f"the winners are not in force, for {target or 'their file'} cannot be written: {error}"
        except KeyboardInterrupt:
            if store is not None:
                words = f"{store.content.records} records are in {self.store}; the same command resumes"
                errors.print(f"interrupted: {words}", soft_wrap=True, markup=False)
            raise
        finally:
            evaluator.close()
            if store is not None:
                store.close()
        more = {"store": str(self.store), "tuned": str(target or "")}
        output(results, self.header, store.content, self.csv, self.json, more)
        if failed:
            errors.print(failed, soft_wrap=True, markup=False)
        elif not self.json:
            print(f"winners of {len(entries)} keys are in {target}; records are in {self.store}")
        if failed or any(each.ended and each.winner is None and not each.checks for each in results):
            raise typer.Exit(1)


def _share(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems of this process of torchrun. Candidates of a key are compared on one device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    keys = list(dict.fromkeys(problem.tuned_key for problem in problems))[rank::world]
    return [problem for problem in problems if problem.tuned_key in keys]


def tuned_results(
    problems: Sequence[Problem],
    evaluator: Evaluator,
    store: Store,
    preset: Preset,
    seed: int,
    begun: float | None,
    quiet: bool,
) -> list[Result]:
    """Run the search with a progress bar."""
    every = sum(len(preset.space.configurations(problem)) for problem in problems)
    with progress(every, quiet or "RANK" in os.environ) as advance:
        begun = time.monotonic() if begun is None else begun
        return Tuning(evaluator, store, preset, advance, seed, begun).run(problems)


def output(
    results: Sequence[Result], header: Header, content: Content, csv: Path | None, json_: bool, more: dict[str, Any]
) -> None:
    """Write the CSV, and print tables or JSON."""
    rows = rows_of(results, header, commit())
    if csv is not None:
        import pandas as pd

        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            csv = csv.with_stem(f"{csv.stem}-{os.environ['RANK']}")
        try:
            write_atomically(csv, pd.DataFrame(rows).convert_dtypes().to_csv(index=False).encode(), mode=0o644)
        except OSError as error:
            raise UsageError(f"--csv {csv}: {error.strerror or error}") from error
    evaluated, known = sum(r.evaluated for r in results), sum(r.known for r in results)
    if json_:
        more |= {"device": header.device or header.arch, "how": how(header), "csv": None if csv is None else str(csv)}
        more |= {"evaluated": evaluated, "from_store": known, "unreadable_lines": content.garbage}
        print(json.dumps(more | {"problems": list(map(summary, results)), "rows": rows}, allow_nan=False))
        return
    show(results, header, stdout())
    if content.garbage:
        print(f"{content.garbage} lines of the store could not be read")
    print(f"{evaluated} candidates evaluated, {known} known from the store; costs: {how(header)}")


def stdout() -> Console:
    """Return a console wide enough for tables when stdout is a file or a pipe, which have no width."""
    console = Console()
    return console if console.is_terminal else Console(width=max(140, console.width))
