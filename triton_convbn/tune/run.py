"""A tuning run: send problems through a search and an evaluator into a store, and find the winners."""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..kernels.config import KernelConfig
from .outcome import MEASURED, Evaluator, Outcome, Status
from .problem import Problem
from .search import SEARCHES, cost_of
from .space import FULL, QUICK, Space
from .store import Content, Store

RERANKED = "reranked"
BEST_FEW = 4


@dataclass(frozen=True)
class Preset:
    """What a run tries. seconds: of the whole run, tracing included. configs: of one problem, those recorded included.
    None: no limit."""

    space: Space
    search: str
    seconds: float | None = None
    configs: int | None = None


PRESETS: Mapping[str, Preset] = {
    "quick": Preset(QUICK, "local", seconds=120.0),
    "full": Preset(FULL, "exhaustive"),
}


@dataclass
class Result:
    """What a run knows about a problem at its end.

    margin: the share of the default's cost that another configuration must save to win. evaluated: candidates that the
    run tried; known: candidates found in the store. ended: the search finished within its budget. checks: another
    problem of the key was searched, and its winner is tried here. overruled: why the default wins though another
    configuration is cheaper.
    """

    problem: Problem
    space: Space
    margin: float = 0.0
    outcomes: dict[KernelConfig, Outcome] = field(default_factory=dict)
    evaluated: int = 0
    known: int = 0
    ended: bool = False
    checks: bool = False
    overruled: str = ""

    @property
    def ranked(self) -> list[KernelConfig]:
        """Return the configurations that can win, by cost, then bytes, then the order of the space."""
        order = {config: index for index, config in enumerate(self.space.configurations(self.problem))}
        able = [(config, each) for config, each in self.outcomes.items() if each.status is Status.OK]
        able.sort(key=lambda pair: (pair[1].cost, pair[1].facts.get("bytes", 0), order.get(pair[0], len(order))))
        return [config for config, _ in able]

    @property
    def winner(self) -> KernelConfig | None:
        """Return the cheapest; the default if that costs hardly more or overrules it; None if nothing can win."""
        ranked, default = self.ranked, cost_of(self.outcomes, self.space.default)
        if not ranked:
            return None
        saves_enough = cost_of(self.outcomes, ranked[0]) < (1 - self.margin) * default
        return ranked[0] if saves_enough and not self.overruled else self.space.default

    def gain(self, config: KernelConfig) -> float | None:
        """Return the default's cost over that of `config`; None if either is unknown."""
        default, cost = cost_of(self.outcomes, self.space.default), cost_of(self.outcomes, config)
        return default / cost if math.isfinite(default) and math.isfinite(cost) and cost > 0 else None


class Replay:
    """An `Evaluator` that answers from a store: any search runs on it, on any machine, in no time."""

    def __init__(self, content: Content, margin: float, unit: str) -> None:
        self._outcomes, self.margin, self.unit = content.outcomes, margin, unit

    def evaluate(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Yield the recorded outcomes. A candidate without one has failed."""
        recorded = self._outcomes.get(problem.key, {})
        missing = Outcome(Status.FAILED, unit=self.unit, message="not in the store")
        for config in configs:
            yield config, recorded.get(config, missing)

    def rerank(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Yield nothing: the newest record holds."""
        return iter(())

    def close(self) -> None:
        """Do nothing."""


@dataclass
class Tuning:
    """One run. advance: called with the tuned key for every candidate whose outcome becomes known."""

    evaluator: Evaluator
    store: Store
    preset: Preset
    advance: Callable[[str], None] = lambda key: None
    seed: int = 0
    begun: float = field(default_factory=time.monotonic)

    def run(self, problems: Sequence[Problem]) -> list[Result]:
        """Search the first problem of each key, and try its winner on the others. Each gets its share of the seconds.

        Recorded candidates are not tried again. They count toward the budget of configurations, so that a resumed run
        ends where an uninterrupted one does.
        """
        until = math.inf if self.preset.seconds is None else self.begun + self.preset.seconds
        results: list[Result] = []
        searched: dict[str, Result] = {}
        for index, problem in enumerate(problems):
            now = time.monotonic()
            share = now + (until - now) / (len(problems) - index)
            first = searched.get(problem.tuned_key)
            result = self._search(problem, share) if first is None else self._check(problem, first, share)
            searched.setdefault(problem.tuned_key, result)
            results.append(result)
        return results

    def _search(self, problem: Problem, until: float) -> Result:
        space, most = self.preset.space, self.preset.configs or math.inf
        result = Result(problem, space, self.evaluator.margin)
        steps = SEARCHES[self.preset.search](space, problem, random.Random(f"{self.seed} {problem.key}"))
        batch: list[KernelConfig] | None = next(steps)
        while batch is not None:
            fresh = [config for config in dict.fromkeys(batch) if config not in result.outcomes]
            allowed = fresh[: int(min(len(fresh), most - len(result.outcomes)))]
            if not self._evaluate(result, allowed, until) or len(allowed) < len(fresh):
                break
            try:
                batch = steps.send(dict(result.outcomes))
            except StopIteration:
                batch = None
        result.ended = batch is None
        # An earlier run or another search may have recorded more.
        result.outcomes = {**self.store.content.outcomes.get(problem.key, {}), **result.outcomes}
        if result.ended or time.monotonic() < until:
            self._rerank(result)
        return result

    def _check(self, problem: Problem, searched: Result, until: float) -> Result:
        """Try the winner of another problem of the key on this one: it must not be slower than the default here."""
        result = Result(problem, searched.space, searched.margin, checks=True)
        winner, default = searched.winner, searched.space.default
        if winner is None or winner == default:
            result.ended = True
            return result
        result.ended = self._evaluate(result, [default, winner], until)
        gain = result.gain(winner)
        if gain is None or gain < 1:
            what = "is slower" if gain is not None else "fails" if result.ended else "was not checked"
            searched.overruled = f"{winner.describe()} {what} on {problem.describe()}"
        return result

    def _evaluate(self, result: Result, configs: Sequence[KernelConfig], until: float) -> bool:
        """Look up or evaluate the configurations. Return False if the time ran out."""
        problem, missing = result.problem, []
        for config in configs:
            if (outcome := self.store.get(problem, config)) is None:
                missing.append(config)
            else:
                result.outcomes[config] = outcome
                result.known += 1
                self.advance(problem.tuned_key)
        if not missing:
            return True
        if time.monotonic() >= until:
            return False
        found = self.evaluator.evaluate(problem, missing)
        for config, outcome in found:
            result.outcomes[config] = self.store.add(problem, config, outcome)
            result.evaluated += 1
            self.advance(problem.tuned_key)
            if time.monotonic() >= until and not set(missing) <= set(result.outcomes):
                found.close()  # type: ignore[attr-defined]  # a generator: kills what still runs
                return False
        return True

    def _rerank(self, result: Result) -> None:
        """Time the best few and the default again, side by side, once."""
        if self.evaluator.unit != MEASURED:
            return
        few = [c for c in result.ranked if c in result.ranked[:BEST_FEW] or c == result.space.default]
        if len(few) < 2 or all(result.outcomes[config].facts.get(RERANKED) for config in few):
            return
        for config, outcome in self.evaluator.rerank(result.problem, few):
            again = replace(outcome, facts={**result.outcomes[config].facts, **outcome.facts, RERANKED: True})
            result.outcomes[config] = self.store.add(result.problem, config, again)
