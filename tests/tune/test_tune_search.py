"""Strategies, on a landscape that costs nothing: what they try, in which order."""

import random
from collections.abc import Sequence

import pytest
from triton_convbn.kernels.config import DEFAULT_CONFIG, KernelConfig
from tune_cases import HEADER, Landscape, problems

from triton_convbn.tune.outcome import Outcome, Status
from triton_convbn.tune.problem import Problem
from triton_convbn.tune.run import Preset, Replay, Tuning
from triton_convbn.tune.search import SEARCHES
from triton_convbn.tune.space import FULL, QUICK, Space
from triton_convbn.tune.store import Store


def steps(name: str, space: Space, problem: Problem, landscape: Landscape, seed: int = 0) -> list[KernelConfig]:
    """Return what a strategy tries, in order, without a budget."""
    search = SEARCHES[name](space, problem, random.Random(seed))
    tried: dict[KernelConfig, None] = {}
    batch: Sequence[KernelConfig] = next(search)
    while True:
        tried.update(dict.fromkeys(batch))
        try:
            batch = search.send({config: landscape.outcome(problem, config) for config in tried})
        except StopIteration:
            return list(tried)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("space", [QUICK, FULL], ids=["quick", "full"])
def test_every_strategy_begins_at_the_default_and_stays_in_the_space(name: str, space: Space) -> None:
    for problem in problems():
        every = space.configurations(problem)
        tried = steps(name, space, problem, Landscape())
        assert tried[0] == space.default
        assert set(tried) <= set(every)
        assert name == "local" or set(tried) == set(every)
        assert steps(name, space, problem, Landscape()) == tried  # the same seed, the same order


def test_the_seed_orders_the_shuffled_search() -> None:
    problem = problems()[1]
    for name in SEARCHES:
        orders = {tuple(steps(name, FULL, problem, Landscape(), seed)) for seed in range(4)}
        assert (len(orders) > 1) is (name == "shuffled"), name


def test_a_climb_ends_where_no_neighbour_is_better() -> None:
    for seed in range(10):
        problem, bench = problems()[seed % 2], Landscape(seed)
        (result,) = Tuning(bench, Store(None, HEADER), Preset(FULL, "local")).run([problem])
        best = result.ranked[0]
        around = [bench.outcome(problem, config) for config in FULL.neighbours(problem, best)]
        assert all(each.cost is None or each.cost >= bench.cost(problem, best) for each in around)


def test_a_climb_leaves_a_default_that_cannot_win() -> None:
    class Hostile(Landscape):
        def outcome(self, problem: Problem, config: KernelConfig) -> Outcome:
            if config == DEFAULT_CONFIG:
                return Outcome(Status.SPILLS, message="8 spills")
            return Outcome(Status.OK, self.cost(problem, config))

    (result,) = Tuning(Hostile(), Store(None, HEADER), Preset(FULL, "local")).run([problems()[1]])
    assert result.winner not in (None, DEFAULT_CONFIG)
    assert result.gain(result.ranked[0]) is None  # there is no default to compare with


def test_replay_has_no_answer_to_what_was_not_recorded() -> None:
    store = Store(None, HEADER)
    store.add(problems()[0], DEFAULT_CONFIG, Outcome(Status.OK, 2.0))
    other = KernelConfig(block=512)
    found = dict(Replay(store.content, 0.0, "us").evaluate(problems()[0], [DEFAULT_CONFIG, other]))
    assert found[DEFAULT_CONFIG].cost == 2.0
    assert (found[other].status, found[other].message) == (Status.FAILED, "not in the store")
