"""Which configurations to try, in which order: one strategy a function, by name in SEARCHES.

A strategy is a generator. It yields batches of configurations and is sent, for each, what is known of the problem by
then. It never sees a clock or a store: the same outcomes and the same seed give the same steps, so that a run that was
killed takes, on the records of its first part, the way that it took before.
"""

import math
import random
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import fields, replace

from ..kernels.config import KernelConfig
from .outcome import Outcome
from .problem import Problem
from .space import Space

Known = Mapping[KernelConfig, Outcome]
Steps = Generator[list[KernelConfig], Known, None]
Strategy = Callable[[Space, Problem, Sequence[KernelConfig], random.Random], Steps]

SEARCHES: dict[str, Strategy] = {}


def strategy(function: Strategy) -> Strategy:
    """Put a strategy into SEARCHES under its name.

    It takes the space, the problem, the configurations to start from (of the space, the default first), and the source
    of its random numbers.
    """
    SEARCHES[function.__name__] = function
    return function


def cost_of(known: Known, config: KernelConfig) -> float:
    """What a configuration costs; infinity where it cannot win or is not known."""
    outcome = known.get(config)
    return math.inf if outcome is None or outcome.cost is None else outcome.cost


@strategy
def exhaustive(space: Space, problem: Problem, starts: Sequence[KernelConfig], rng: random.Random) -> Steps:
    """Every configuration, the starts first."""
    yield list(dict.fromkeys([*starts, *space.configurations(problem)]))


@strategy
def shuffled(space: Space, problem: Problem, starts: Sequence[KernelConfig], rng: random.Random) -> Steps:
    """Every configuration in random order, after the starts: for a budget that is smaller than the space."""
    rest = [config for config in space.configurations(problem) if config not in set(starts)]
    rng.shuffle(rest)
    yield [*starts, *rest]


LOCAL_SHARE = 0.2
LOCAL_LEAST = 6
LOCAL_BATCH = 2
"""Of `local`: the share of the space that it tries, the least number, and how many at once (for two processes)."""


def local_limit(count: int) -> int:
    """How many of `count` configurations `local` tries."""
    return min(count, max(LOCAL_LEAST, math.ceil(LOCAL_SHARE * count)))


@strategy
def local(space: Space, problem: Problem, starts: Sequence[KernelConfig], rng: random.Random) -> Steps:
    """Neighbours of the best so far, until a fifth of the space was tried: first those that a fit expects most of.

    The fit is a small quadratic, see `_expected`, of all that was tried: after the starts, one that differs from them
    in most. Where every neighbour is known, whatever is left is tried in the order of the fit. How often that misses
    the best by more than 2 % is what tests/tune/test_tune_search.py asks: on a synthetic landscape, on recorded facts.
    """
    every = space.configurations(problem)
    limit = local_limit(len(every))
    tried = dict.fromkeys(list(starts or every[:1])[:limit])
    known = yield list(tried)
    step = _farthest(every, tried, rng)[: limit - len(tried)]
    while step:
        tried.update(dict.fromkeys(step))
        known = yield step
        left = [config for config in every if config not in tried]
        expected = _expected(space, known, left)
        left.sort(key=lambda config: expected[config])
        best = min(tried, key=lambda config: cost_of(known, config))
        around = set(space.neighbours(problem, best))
        left.sort(key=lambda config: config not in around)
        step = left[: min(LOCAL_BATCH, limit - len(tried))]


_RIDGE = 0.01


def _expected(space: Space, known: Known, left: Sequence[KernelConfig]) -> dict[KernelConfig, float]:
    """The logarithms of the costs that a fit to those known expects of others; of no use but for their order.

    Linear least squares, with a little ridge for where there are few: of each field, where its value stands among the
    field's values in the space (0 to 1), and its square; and the product of block and threads, whose quotient counts.
    """
    import numpy as np

    able = [config for config in known if math.isfinite(cost_of(known, config))]
    if not able or not left:
        return dict.fromkeys(left, 0.0)
    features = np.array([_features(space, config) for config in able])
    ridge = _RIDGE * np.eye(features.shape[1])
    ridge[0, 0] = 1e-9  # of the constant: costs may be of any size
    costs = np.log([max(cost_of(known, config), 1e-9) for config in able])
    weights = np.linalg.solve(features.T @ features + ridge, features.T @ costs)
    expected = np.array([_features(space, config) for config in left]) @ weights
    return dict(zip(left, map(float, expected), strict=True))


def _features(space: Space, config: KernelConfig) -> list[float]:
    at = {}
    for field in fields(KernelConfig):
        values, value = getattr(space, field.name), getattr(config, field.name)
        if len(values) > 1:
            at[field.name] = values.index(value) / (len(values) - 1) if value in values else 0.5
    return [1.0, *at.values(), *(x * x for x in at.values()), at.get("block", 0.0) * at.get("threads", 0.0)]


def _farthest(every: Sequence[KernelConfig], tried: Iterable[KernelConfig], rng: random.Random) -> list[KernelConfig]:
    """One that differs from all that was tried in the most fields, any of several; none where all were tried."""
    seen = set(tried)
    left = [config for config in every if config not in seen]
    rng.shuffle(left)
    return left and [max(left, key=lambda config: min(_differences(config, other) for other in seen))]


def _differences(one: KernelConfig, other: KernelConfig) -> int:
    return sum(getattr(one, field.name) != getattr(other, field.name) for field in fields(KernelConfig))


def starts_of(space: Space, problem: Problem, candidates: Iterable[KernelConfig | None]) -> list[KernelConfig]:
    """Where to begin: the default, then those of the candidates that the space has for the problem.

    A candidate that splits a call as this problem's cannot be split is taken without the split.
    """
    usable = set(space.configurations(problem))
    found = [space.default]
    for config in candidates:
        if config is not None:
            found += [each for each in (config, replace(config, group=None)) if each in usable][:1]
    return list(dict.fromkeys(found))
