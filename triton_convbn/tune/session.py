"""One run of `triton-convbn tune`, or the part that one rank has in it: store, search, winners, report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ..errors import UsageError
from ..kernels.tuned import user_dir, user_file, write
from ..perf.show import stdout
from ..perf.table import commit
from .bar import errors, progress
from .outcome import Evaluator
from .problem import Problem
from .ranks import Ranks
from .report import entries_of, how, rows_of, show, summary, write_csv
from .run import Preset, Result, settle_starts, tune
from .store import Header, Store, set_aside
from .target import Target


@dataclass(frozen=True)
class Session:
    """What a run needs beside its problems.

    store, csv, tuned: files; None: the default store, no CSV, the user's tuned file. begun: from when its seconds
    count, of `time.monotonic`; None: when it searches.
    """

    target: Target
    preset: Preset
    ranks: Ranks
    seed: int = 0
    store: Path | None = None
    csv: Path | None = None
    tuned: Path | None = None
    json: bool = False
    begun: float | None = None

    def run(self, problems: Sequence[Problem], evaluator: Evaluator, resume: bool = True) -> None:
        """Tune, record, put the winners in force, and report. Closes the evaluator.

        Raises: UsageError for a store of another device or version; Exit(1) where a problem has nothing that can win,
        and where the winners cannot be written.
        """
        header = self.target.header()
        path = self.store or _default_store(header)
        try:
            store = self._opened(path, header, problems, resume)
            try:
                results = self._searched(problems, evaluator, store)
            except KeyboardInterrupt:
                words = f"{store.content.records} records are in {path}" if store.complete else "nothing is recorded"
                _say(f"interrupted: {words}; the same command goes on")
                raise
            finally:
                store.close()
        finally:
            evaluator.close()
        if self.ranks.rank == 0:
            self._report(results, store, path, header)

    def _opened(self, path: Path, header: Header, problems: Sequence[Problem], resume: bool) -> Store:
        """The store; where the searches begin is settled by the first rank, for all."""
        store = None
        if self.ranks.rank == 0:
            if not resume and (old := set_aside(path)) is not None:
                _say(f"{path} is set aside as {old.name}")
            store = Store(path, header, say=_say)
            settle_starts(problems, store, self.target.gpu)
        starts = self.ranks.from_first(store.content.starts if store else {})
        if store is None:
            store = Store(path, header, say=_say)
            store.content.starts.update(starts)
        return store

    def _searched(self, problems: Sequence[Problem], evaluator: Evaluator, store: Store) -> list[Result]:
        """Every problem's result, on the first rank. What a rank could not write into the first one's file, as on
        another machine, is added to it."""
        keys = set(self.ranks.share(list(dict.fromkeys(problem.tuned_key for problem in problems))))
        mine = [problem for problem in problems if problem.tuned_key in keys]
        with progress(mine, self.preset, quiet=self.ranks.rank > 0) as bar:
            gathered = self.ranks.gather(tune(mine, evaluator, store, self.preset, bar, self.seed, self.begun))
        results = {result.problem.key: result for each in gathered for result in each}
        if self.ranks.world > 1:
            store.refresh()
        for result in results.values():
            for config, outcome in result.outcomes.items():
                if store.get(result.problem, config) != outcome:
                    store.add(result.problem, config, outcome)
        return [results[problem.key] for problem in problems if problem.key in results]

    def _report(self, results: Sequence[Result], store: Store, path: Path, header: Header) -> None:
        entries, failed = entries_of(results, header), ""
        target = self.tuned
        try:
            target = target or user_file(header.arch)
            if entries:
                write(target, header.arch, entries)
        except (OSError, ImportError) as error:
            failed = f"the winners are not in force, for {target or 'their file'} cannot be written: {error}"
        more: dict[str, Any] = {"store": str(path), "recorded": store.complete, "tuned": str(target or "")}
        more |= {"unreadable_lines": store.content.garbage}
        output(results, header, self.csv, self.json, more)
        if failed:
            _say(failed)
        elif not self.json:
            print(f"winners of {len(entries)} keys are in {target}; records are in {path}")
        if failed or any(each.ended and each.winner is None and not each.checks for each in results):
            raise typer.Exit(1)


def output(results: Sequence[Result], header: Header, csv: Path | None, json_: bool, more: dict[str, Any]) -> None:
    """Write the CSV, print tables or JSON. Raises: UsageError where the CSV cannot be written."""
    rows = rows_of(results, header, commit())
    if csv is not None:
        try:
            write_csv(csv, rows)
        except OSError as error:
            raise UsageError(f"--csv {csv}: {error.strerror or error}") from error
    evaluated, known = sum(r.evaluated for r in results), sum(r.known for r in results)
    if json_:
        more |= {"device": header.device or header.arch, "how": how(header), "csv": None if csv is None else str(csv)}
        more |= {"evaluated": evaluated, "from_store": known, "problems": list(map(summary, results)), "rows": rows}
        print(json.dumps(more, allow_nan=False))
        return
    console = stdout()
    show(results, header, console)
    if more["unreadable_lines"]:
        console.print(f"{more['unreadable_lines']} lines of the store could not be read", highlight=False)
    print(f"{evaluated} candidates evaluated, {known} known from the store; costs: {how(header)}")


def _default_store(header: Header) -> Path:
    try:
        return user_dir() / "tune" / f"{header.name}.jsonl"
    except ImportError as error:
        raise UsageError("no one knows the cache directory without platformdirs: give --store FILE") from error


def _say(text: str) -> None:
    errors.print(text, soft_wrap=True, markup=False)
