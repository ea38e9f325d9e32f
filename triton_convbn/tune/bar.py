"""How far a tuning run is: a bar with the time that is left."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .outcome import Outcome
from .problem import Problem
from .run import Preset, Result
from .search import local_limit

errors = Console(stderr=True, highlight=False)


class Bar:
    """The progress of a run, as a bar with the time that is left; lines where stderr is no terminal."""

    def __init__(self, bar: Progress | None, totals: dict[Problem, int]) -> None:
        self._bar, self._left = bar, totals
        self._task = None if bar is None else bar.add_task("starting", total=sum(totals.values()))

    def begin(self, problem: Problem, at_most: int) -> None:
        self._expect(problem, at_most)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=problem.tuned_key)

    def advance(self, outcome: Outcome, fresh: bool) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1 if fresh else 0)

    def end(self, result: Result) -> None:
        self._expect(result.problem, result.evaluated)  # what the store knew took no time, and will take none
        if self._bar is not None and not errors.is_terminal:
            winner, problem = result.winner, result.problem
            said = "nothing can win" if winner is None else f"{winner.describe()}, {result.gain(winner) or 1:.3f} x"
            self._bar.console.print(
                f"{problem.tuned_key}: {result.evaluated} evaluated, {result.known} known: {said}",
                markup=False,
                soft_wrap=True,
            )

    def _expect(self, problem: Problem, count: int) -> None:
        self._left[problem] = count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=sum(self._left.values()))


@contextmanager
def progress(problems: Sequence[Problem], preset: Preset, quiet: bool) -> Iterator[Bar]:
    totals = {}
    searched = set()
    for problem in problems:
        if problem.tuned_key in searched:
            totals[problem] = 2
            continue
        searched.add(problem.tuned_key)
        every = len(preset.space.configurations(problem))
        asked = local_limit(every) if preset.search == "local" else every
        totals[problem] = int(min(asked, preset.configs or math.inf))
    if quiet:
        yield Bar(None, totals)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=errors, transient=True) as bar:
        yield Bar(bar, totals)
