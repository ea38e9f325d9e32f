"""A tuning run: problems through a search and an evaluator into a store, and the winners out of it."""

import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..kernels import tuned
from ..kernels.config import DEFAULT_CONFIG, KernelConfig
from .outcome import MEASURED, Evaluator, Outcome, Status
from .problem import Problem
from .search import SEARCHES, cost_of, starts_of
from .space import FULL, QUICK, Space
from .store import Content, Store

RERANKED = "reranked"
BEST_FEW = 4


@dataclass(frozen=True)
class Preset:
    """What a run tries.

    seconds: of the whole run, the tracing of models included. configs: of one problem at most; None: all that the
    search asks for.
    """

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
    """What a run knows of a problem at its end.

    margin: of the default's cost, by which another has to be cheaper to win. evaluated: configurations that the run
    tried itself; known: those that it found in the store; ended: whether the search came to its end, and no budget
    ended it. checks: another problem of the same key was searched, and its winner is tried here. overruled: why the
    default wins though another was cheaper.
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
    def default(self) -> Outcome | None:
        return self.outcomes.get(self.space.default)

    @property
    def ranked(self) -> list[KernelConfig]:
        """Those that can win, the cheapest first; of equals the one that the space has first."""
        order = {config: index for index, config in enumerate(self.space.configurations(self.problem))}
        able = [config for config, outcome in self.outcomes.items() if outcome.status is Status.OK]
        last = len(order)
        return sorted(able, key=lambda config: (cost_of(self.outcomes, config), order.get(config, last), repr(config)))

    @property
    def winner(self) -> KernelConfig | None:
        """The cheapest, or the default where that costs hardly more or the cheapest is overruled; None where nothing
        can win."""
        ranked = self.ranked
        if not ranked:
            return None
        if self.overruled:
            return self.space.default
        default = cost_of(self.outcomes, self.space.default)
        return self.space.default if cost_of(self.outcomes, ranked[0]) >= (1 - self.margin) * default else ranked[0]

    def gain(self, config: KernelConfig) -> float | None:
        """How many times as fast as the default a configuration is; None where one of them is not known."""
        default, cost = cost_of(self.outcomes, self.space.default), cost_of(self.outcomes, config)
        return default / cost if math.isfinite(default) and math.isfinite(cost) and cost > 0 else None


class Progress(Protocol):
    """Is told how a run goes."""

    def begin(self, problem: Problem, at_most: int) -> None:
        """The search of a problem begins; it asks for so many configurations at most."""
        ...

    def advance(self, outcome: Outcome, fresh: bool) -> None:
        """One more of them is known: evaluated just now, or from the store."""
        ...

    def end(self, result: Result) -> None: ...


def nearest(problem: Problem, content: Content) -> KernelConfig | None:
    """What won the problem in the store that is most like this one: of its direction and dtypes if there is one, of the
    nearest size."""
    found: list[tuple[tuple[bool, float, str], KernelConfig]] = []
    for key, other in content.problems.items():
        outcomes = content.outcomes.get(key, {})
        best = min(outcomes, key=lambda config: cost_of(outcomes, config), default=None)
        if key == problem.key or other.direction != problem.direction or best is None or outcomes[best].cost is None:
            continue
        distance = abs(math.log2((1 + problem.elements) / (1 + other.elements)))
        found.append(((_dtypes(problem) != _dtypes(other), distance, key), best))
    return min(found, key=lambda each: each[0])[1] if found else None


def _dtypes(problem: Problem) -> str:
    return problem.tuned_key.split("/")[1]


def settle_starts(problems: Iterable[Problem], store: Store, gpu: tuned.Gpu) -> None:
    """Write down where the search of each problem begins: at the default, at what is in force for its key, at what won
    the nearest problem in the store.

    Once, before anything is evaluated: what a run finds must not lead a run that continues it another way.
    """
    for problem in problems:
        if problem.key not in store.content.starts:
            in_force = tuned.choose(problem.tuned_key, gpu)
            found = [DEFAULT_CONFIG, in_force.config, nearest(problem, store.content)]
            store.add_starts(problem, [config for config in dict.fromkeys(found) if config is not None])


def tune(
    problems: Sequence[Problem],
    evaluator: Evaluator,
    store: Store,
    preset: Preset,
    progress: Progress,
    seed: int = 0,
    begun: float | None = None,
) -> list[Result]:
    """Search every problem, each with its share of the seconds that are left since `begun` (`time.monotonic`; None:
    now). What the store has is not tried again. Of problems with one key the first is searched, and what won it is
    tried on the others.

    The budget of configurations counts those of the store as well, or a run that continues another would go further
    than one that was never interrupted.
    """
    begun = time.monotonic() if begun is None else begun
    until = math.inf if preset.seconds is None else begun + preset.seconds
    results: dict[str, Result] = {}
    by_key: dict[str, Result] = {}
    for index, problem in enumerate(problems):
        now = time.monotonic()
        share = now + (until - now) / (len(problems) - index)
        searched = by_key.get(problem.tuned_key)
        if searched is None:
            result = _search(problem, evaluator, store, preset, progress, seed, share)
            by_key[problem.tuned_key] = result
        else:
            result = _check(problem, searched, evaluator, store, progress, share)
        results[problem.key] = result
        progress.end(result)
    return list(results.values())


def _check(
    problem: Problem, searched: Result, evaluator: Evaluator, store: Store, progress: Progress, until: float
) -> Result:
    """Try what won another problem of the key on this one: it has to be no slower than the default here, too.

    On gfx942 the model's winner of MobileNetV2's small backward, 2.6 % better there, costs ResNet-50's 11 % more.
    """
    result = Result(problem, searched.space, searched.margin, checks=True)
    progress.begin(problem, 2)
    winner, default = searched.winner, searched.space.default
    if winner is None or winner == default:
        result.ended = True
        return result
    result.ended = _evaluate(result, [default, winner], evaluator, store, progress, until)
    gain = result.gain(winner)
    if gain is None or gain < 1:
        what = "is slower" if gain is not None else "fails" if result.ended else "was not checked"
        searched.overruled = f"{winner.describe()} {what} on {problem.describe()}"
    return result


def _search(
    problem: Problem, evaluator: Evaluator, store: Store, preset: Preset, progress: Progress, seed: int, until: float
) -> Result:
    space, most = preset.space, preset.configs or math.inf
    every = space.configurations(problem)
    result = Result(problem, space, evaluator.margin)
    progress.begin(problem, int(min(len(every), most)))
    starts = starts_of(space, problem, store.content.starts.get(problem.key, ()))
    steps = SEARCHES[preset.search](space, problem, starts, random.Random(f"{seed} {problem.key}"))
    asked: dict[KernelConfig, None] = {}
    batch = next(steps, None)
    while batch is not None:
        fresh = [config for config in dict.fromkeys(batch) if config not in asked]
        allowed = fresh[: int(min(len(fresh), most - len(asked)))]
        asked.update(dict.fromkeys(allowed))
        if not _evaluate(result, allowed, evaluator, store, progress, until) or len(allowed) < len(fresh):
            break
        try:
            batch = steps.send(dict(result.outcomes))
        except StopIteration:
            batch = None
    result.ended = batch is None
    if result.ended or time.monotonic() < until:
        _rerank(result, evaluator, store)
    # Others may know of candidates that this search did not ask for: an earlier run, or another search.
    result.outcomes = {**store.content.outcomes.get(problem.key, {}), **result.outcomes}
    return result


def _evaluate(
    result: Result,
    configs: Sequence[KernelConfig],
    evaluator: Evaluator,
    store: Store,
    progress: Progress,
    until: float,
) -> bool:
    """Whether all of them are known now; not so where time has run out."""
    problem, missing = result.problem, []
    for config in configs:
        outcome = store.get(problem, config)
        if outcome is None:
            missing.append(config)
        else:
            result.outcomes[config] = outcome
            result.known += 1
            progress.advance(outcome, fresh=False)
    if not missing:
        return True
    if time.monotonic() >= until:
        return False
    found = evaluator.evaluate(problem, missing)
    for config, outcome in found:
        result.outcomes[config] = store.add(problem, config, outcome)
        result.evaluated += 1
        progress.advance(outcome, fresh=True)
        if time.monotonic() >= until and not set(missing) <= set(result.outcomes):
            close = getattr(found, "close", None)  # ends what still runs
            if close is not None:
                close()
            return False
    return True


def _rerank(result: Result, evaluator: Evaluator, store: Store) -> None:
    """The best few and the default again, side by side, where costs are times; once."""
    if evaluator.unit != MEASURED:
        return
    few = list(dict.fromkeys([*result.ranked[:BEST_FEW], *([result.space.default] if result.default else [])]))
    few = [config for config in few if result.outcomes[config].status is Status.OK]
    if len(few) < 2 or all(result.outcomes[config].facts.get(RERANKED) for config in few):
        return
    for config, outcome in evaluator.rerank(result.problem, few):
        again = replace(outcome, facts={**result.outcomes[config].facts, **outcome.facts, RERANKED: True})
        result.outcomes[config] = store.add(result.problem, config, again)
