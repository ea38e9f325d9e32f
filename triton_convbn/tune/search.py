"""Search strategies: which configurations to try, and in which order.

A strategy is a generator. It yields batches of configurations and is sent everything known about the problem so far. It
sees neither clock nor store: the same outcomes and seed give the same steps, so an interrupted run resumes its path.
"""

import math
import random
from collections.abc import Callable, Generator, Mapping

from ..kernels.config import KernelConfig
from .outcome import Outcome
from .problem import Problem
from .space import Space

Known = Mapping[KernelConfig, Outcome]
Steps = Generator[list[KernelConfig], Known, None]
Strategy = Callable[[Space, Problem, random.Random], Steps]


def cost_of(known: Known, config: KernelConfig) -> float:
    """Return the cost of a configuration; infinity if it is unknown or cannot win."""
    outcome = known.get(config)
    return math.inf if outcome is None or outcome.cost is None else outcome.cost


def exhaustive(space: Space, problem: Problem, rng: random.Random) -> Steps:
    """Try every configuration, the default first."""
    yield list(space.configurations(problem))


def shuffled(space: Space, problem: Problem, rng: random.Random) -> Steps:
    """Try the default, then every other configuration in random order: for a budget smaller than the space."""
    default, *rest = space.configurations(problem)
    rng.shuffle(rest)
    yield [default, *rest]


def local(space: Space, problem: Problem, rng: random.Random) -> Steps:
    """Climb from the default to the best neighbour until no neighbour is better."""
    best = space.configurations(problem)[0]
    known = yield [best]
    while True:
        known = yield list(space.neighbours(problem, best))
        better = min(known, key=lambda config: cost_of(known, config))
        if cost_of(known, better) >= cost_of(known, best):
            return
        best = better


SEARCHES: dict[str, Strategy] = {"exhaustive": exhaustive, "shuffled": shuffled, "local": local}
