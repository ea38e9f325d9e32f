"""A tuning run: search each problem within its budget, record every outcome, find the winners."""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from ..kernels.config import DEFAULT_CONFIG, KernelConfig
from .bench import Bench
from .outcome import Outcome, Status
from .problem import FULL, QUICK, Problem, Space, configurations, neighbours
from .store import Store

BEST_FEW = 4
Strategy = Literal["exhaustive", "shuffled", "local"]


@dataclass(frozen=True)
class Preset:
    """The settings of a run.

    Attributes:
        strategy: The order. "local" climbs to the best neighbour until no neighbour is better.
        seconds: The limit of the whole run. None: no limit.
        configs: The maximum number of configurations of a problem, recorded ones included. None: no limit.
        seed: The seed of the order of "shuffled".
    """

    space: Space
    strategy: Strategy
    seconds: float | None = None
    configs: int | None = None
    seed: int = 0


PRESETS: Mapping[str, Preset] = {"quick": Preset(QUICK, "local", seconds=120.0), "full": Preset(FULL, "exhaustive")}


class BudgetSpent(Exception):
    """The seconds or the configurations of a problem ran out."""


@dataclass
class Search:
    """The search of one problem, and what it found.

    Attributes:
        bench: None searches the records alone: a candidate without one fails.
        until: The time at which its seconds are spent, by `time.monotonic`.
        advance: Called with the tuned key for every candidate whose outcome becomes known.
        first: The search of another problem of the key. If there is one, only its winner is tried here.
        evaluated: The number of candidates that the run tried.
        from_store: The number of candidates that it found recorded.
        ended: The search finished within its budget.
        overruled: Why the default wins though another configuration is cheaper.
    """

    problem: Problem
    bench: Bench | None
    store: Store
    preset: Preset
    until: float = math.inf
    advance: Callable[[str], None] = lambda key: None
    first: "Search | None" = None
    outcomes: dict[KernelConfig, Outcome] = field(default_factory=dict)
    evaluated: int = 0
    from_store: int = 0
    ended: bool = False
    overruled: str = ""

    @property
    def space(self) -> tuple[KernelConfig, ...]:
        """Return the configurations of the problem."""
        return configurations(self.preset.space, self.problem)

    def cost(self, config: KernelConfig | None) -> float | None:
        """Return the cost of a configuration; None if it is unknown or cannot win."""
        return self.outcomes[config].cost if config in self.outcomes else None

    def gain(self, config: KernelConfig | None) -> float | None:
        """Return the default's cost over that of `config`; None if either is unknown."""
        default, cost = self.cost(DEFAULT_CONFIG), self.cost(config)
        return default / cost if default and cost else None

    @property
    def ranked(self) -> list[KernelConfig]:
        """Return the configurations that can win, by cost, then bytes, then the order of the space."""
        outcomes, every = self.outcomes, dict.fromkeys((*self.space, *self.outcomes))
        able = [config for config in every if config in outcomes and outcomes[config].status is Status.OK]
        return sorted(able, key=lambda config: (outcomes[config].cost or 0.0, outcomes[config].facts.get("bytes", 0)))

    @property
    def winner(self) -> KernelConfig | None:
        """Return the cheapest; the default if the gain is too small or was overruled; None if nothing works."""
        if (best := next(iter(self.ranked), None)) is None:
            return None
        default = self.cost(DEFAULT_CONFIG)
        saves_enough = default is None or (self.cost(best) or 0.0) < (1 - self.store.header.margin) * default
        return best if saves_enough and not self.overruled else DEFAULT_CONFIG

    def run(self) -> None:
        """Search within the budget, and time the best again. With `first`, try its winner instead."""
        with suppress(BudgetSpent):
            if self.first is None:
                self._follow_strategy()
            elif self.first.winner not in (None, DEFAULT_CONFIG):
                self._try([DEFAULT_CONFIG, self.first.winner])
            self.ended = True
        if self.first is not None:
            self._overrule(self.first)
        elif self.bench is not None:
            self._rerank(self.bench)

    def _follow_strategy(self) -> None:
        """Try configurations, the default first. The same outcomes and seed give the same order."""
        default, *rest = self.space
        if self.preset.strategy == "local":
            self._try([default])
            best: KernelConfig | None = None
            while best != (better := next(iter(self.ranked), default)):
                best = better
                self._try(neighbours(self.preset.space, self.problem, best))
            return
        if self.preset.strategy == "shuffled":
            random.Random(f"{self.preset.seed} {self.problem.key}").shuffle(rest)
        self._try([default, *rest])

    def _rerank(self, bench: Bench) -> None:
        """Time the best of all that are recorded, and the default, again side by side, once."""
        # An earlier run or another strategy may have recorded more.
        self.outcomes = {**self.store.outcomes.get(self.problem.key, {}), **self.outcomes}
        few = [config for config in self.ranked if config in self.ranked[:BEST_FEW] or config == DEFAULT_CONFIG]
        settled = len(few) < 2 or all(self.outcomes[config].facts.get("reranked") for config in few)
        if bench.noisy and not settled and (self.ended or time.monotonic() < self.until):
            for config, outcome in bench.evaluate(self.problem, few, together=True):
                facts = {**self.outcomes[config].facts, **outcome.facts, "reranked": True}
                self.outcomes[config] = replace(outcome, facts=facts)
                self.store.add(self.problem, config, self.outcomes[config])

    def _overrule(self, first: "Search") -> None:
        """Overrule the winner of `first` if it is slower than the default here, fails, or was not tried."""
        winner, gain = first.winner, self.gain(first.winner)
        if winner not in (None, DEFAULT_CONFIG) and (gain is None or gain < 1):
            what = "is slower" if gain is not None else "fails" if self.ended else "was not checked"
            first.overruled = f"{winner.describe()} {what} on {self.problem.describe()}"

    def _try(self, configs: Sequence[KernelConfig]) -> None:
        """Look up or evaluate configurations. Raise BudgetSpent if the budget does not cover them all.

        Recorded candidates are not evaluated again. They count toward the budget of configurations, so that a resumed
        run ends where an uninterrupted one does.
        """
        recorded = self.store.outcomes.get(self.problem.key, {})
        fresh = [config for config in configs if config not in self.outcomes]
        allowed = fresh if self.preset.configs is None else fresh[: max(0, self.preset.configs - len(self.outcomes))]
        missing = [config for config in allowed if config not in recorded]
        for config in allowed:
            if config in recorded:
                self.outcomes[config] = recorded[config]
                self.from_store += 1
                self.advance(self.problem.tuned_key)
        if self.bench is None:
            self.outcomes |= dict.fromkeys(missing, Outcome(Status.FAILED, message="not in the store"))
        elif missing:
            self._evaluate(self.bench, missing)
        if len(allowed) < len(fresh):
            raise BudgetSpent

    def _evaluate(self, bench: Bench, configs: Sequence[KernelConfig]) -> None:
        if time.monotonic() >= self.until:
            raise BudgetSpent
        with closing(bench.evaluate(self.problem, configs)) as found:
            for number, (config, outcome) in enumerate(found, 1):
                self.store.add(self.problem, config, outcome)
                self.outcomes[config] = outcome
                self.evaluated += 1
                self.advance(self.problem.tuned_key)
                if number < len(configs) and time.monotonic() >= self.until:
                    raise BudgetSpent


def search(
    problems: Sequence[Problem],
    bench: Bench | None,
    store: Store,
    preset: Preset,
    begun: float,
    advance: Callable[[str], None] = lambda key: None,
) -> list[Search]:
    """Search the first problem of each key, and try its winner on the others. Each gets its share of the seconds.

    The seconds count from `begun`, by `time.monotonic`.
    """
    end = begun + (math.inf if preset.seconds is None else preset.seconds)
    searches: list[Search] = []
    for index, problem in enumerate(problems):
        now = time.monotonic()
        until = now + (end - now) / (len(problems) - index)
        first = next((each for each in searches if each.problem.tuned_key == problem.tuned_key), None)
        searches.append(Search(problem, bench, store, preset, until, advance, first))
        searches[-1].run()
    return searches
