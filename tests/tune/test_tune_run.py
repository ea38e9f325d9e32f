"""Whole runs on a landscape that costs nothing: searched, resumed, killed, shared by ranks, out of budget."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from triton_convbn.kernels.config import DEFAULT_CONFIG, KernelConfig
from triton_convbn.kernels.tuned_files import read as read_tuned
from tune_cases import HEADER, Landscape, pairs, problems

from triton_convbn.tune import run as run_module
from triton_convbn.tune.cli import run as run_and_report
from triton_convbn.tune.outcome import Outcome, Status
from triton_convbn.tune.problem import FULL, QUICK, Problem, configurations, largest_first, neighbours
from triton_convbn.tune.run import Preset, Search, Strategy, search
from triton_convbn.tune.store import Header, Store

EXHAUSTIVE = Preset(FULL, "exhaustive")
LOCAL = Preset(FULL, "local")


def run(
    folder: Path, bench: Landscape | None = None, preset: Preset = LOCAL, given: Sequence[Problem] | None = None
) -> Landscape:
    bench, store = bench or Landscape(), Store.open(folder / "store", HEADER)
    tuned = folder / "tuned.json"
    run_and_report(given or problems(), bench, store, preset, time.monotonic(), tuned=tuned, json_=True)
    assert bench.closed
    return bench


def outcomes(folder: Path) -> dict[str, dict[KernelConfig, Outcome]]:
    return Store.read(folder / "store").outcomes


def records(folder: Path) -> int:
    return sum(map(len, outcomes(folder).values()))


def winners(folder: Path) -> dict[str, tuple[KernelConfig, float | None]]:
    return {entry.key: (entry.config, entry.cost) for entry in read_tuned(folder / "tuned.json")}


@pytest.mark.parametrize("preset", [LOCAL, EXHAUSTIVE], ids=["local", "exhaustive"])
def test_a_second_run_evaluates_nothing(preset: Preset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path, preset=preset)
    found, size = winners(tmp_path), (tmp_path / "store").stat().st_size
    said = json.loads(capsys.readouterr().out)
    assert said["evaluated"] == len(first.evaluated) > 0
    assert said["from_store"] == 0
    again = run(tmp_path, preset=preset)
    said = json.loads(capsys.readouterr().out)
    assert again.evaluated == []
    assert (said["evaluated"], said["from_store"]) == (0, len(first.evaluated))
    assert winners(tmp_path) == found
    assert len(found) == 4
    assert (tmp_path / "store").stat().st_size == size


def test_another_search_uses_what_is_recorded(tmp_path: Path) -> None:
    local = run(tmp_path)
    rest = run(tmp_path, preset=EXHAUSTIVE)
    every = [(problem.key, config) for problem in problems() for config in configurations(FULL, problem)]
    assert Counter(local.evaluated + rest.evaluated) == Counter(every)


def test_one_more_value_retunes_nothing_else(tmp_path: Path) -> None:
    """The space is not in the header: another value adds candidates."""
    quick = run(tmp_path, preset=Preset(QUICK, "exhaustive"))
    more = run(tmp_path, preset=Preset(FULL, "exhaustive"))
    assert not set(quick.evaluated) & set(more.evaluated)


def _killed(folder: str, log: str) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        run(Path(folder), Landscape(seconds=0.002, log=Path(log)))


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    """20 SIGKILLs at random moments lose no record and do not change the winners."""
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole")
    fork, moments, log = get_context("fork"), random.Random(1), tmp_path / "log"
    folder = tmp_path / "killed"
    folder.mkdir()
    killed = 0
    for _ in range(20):
        process = fork.Process(target=_killed, args=(str(folder), str(log)))
        process.start()
        time.sleep(moments.uniform(0.005, 0.06))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 10, "the runs were over before they could be killed"
    last = run(folder)
    assert winners(folder) == winners(tmp_path / "whole")
    assert outcomes(folder) == outcomes(tmp_path / "whole")  # every outcome of the whole run, and no other
    acknowledged = log.read_text().splitlines()  # the records of killed runs
    assert len(set(acknowledged)) == len(acknowledged), "what was recorded was evaluated again"
    assert len(acknowledged) + len(last.evaluated) >= len(whole.evaluated) - killed
    assert Store.read(folder / "store").unreadable <= killed


def test_an_interruption_keeps_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(Landscape):
        def evaluate(self, *arguments: Any, **more: Any) -> Iterator[tuple[KernelConfig, Outcome]]:
            for each in super().evaluate(*arguments, **more):
                if len(self.evaluated) == 12:
                    raise KeyboardInterrupt
                yield each

    bench = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, bench)
    assert bench.closed
    assert records(tmp_path) == 11
    assert "interrupted: 11 records are in" in capsys.readouterr().err
    rest = run(tmp_path)
    assert bench.evaluated[:11] + rest.evaluated == run(tmp_path / "other").evaluated


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    run(tmp_path)
    folder = tmp_path / "ranks"
    folder.mkdir()
    child = Path(__file__).with_name("tune_child.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(child), str(folder / "store"), str(folder / "tuned.json")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(child.parent), *sys.path]), "OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert winners(folder) == winners(tmp_path)
    assert outcomes(folder) == outcomes(tmp_path)
    said = [json.loads(line) for line in done.stdout.splitlines()]  # each rank reports its keys
    assert sum(each["evaluated"] for each in said) == records(folder)
    found = {problem["problem"] for each in said for problem in each["problems"]}
    assert found == {problem.key for problem in problems()}


# ---- budgets --------------------------------------------------------------------------------------------------------


def test_a_budget_of_configurations_counts_those_recorded(tmp_path: Path) -> None:
    few = Preset(FULL, "shuffled", configs=5)
    assert len(run(tmp_path, preset=few).evaluated) == 20
    assert run(tmp_path, preset=few).evaluated == []
    assert len(run(tmp_path, preset=Preset(FULL, "shuffled", configs=7)).evaluated) == 8


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock by one that only the test moves."""
    at = [0.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: at[0])
    return at


def test_a_budget_of_seconds_ends_a_run_early(now: list[float], tmp_path: Path) -> None:
    """Every problem gets its share, and the next run resumes."""

    class Slow(Landscape):
        def outcome(self, problem: Problem, config: KernelConfig) -> Outcome:
            now[0] += 1.0
            return super().outcome(problem, config)

    minute = Preset(FULL, "exhaustive", seconds=60.0)
    store = Store.open(tmp_path / "store", HEADER)
    first = search(problems(), Slow(), store, minute, now[0])
    assert [(each.evaluated, each.from_store, each.ended) for each in first] == [(15, 0, False)] * 4
    second = search(problems(), Slow(), store, minute, now[0] - 40)
    assert [(each.evaluated, each.from_store, each.ended) for each in second] == [(5, 15, False)] * 4
    nothing = Store.open(tmp_path / "other", HEADER)
    third = search(problems(), Slow(), nothing, minute, now[0] - 60)
    assert [(each.evaluated, each.ended, each.winner) for each in third] == [(0, False, None)] * 4


def test_a_run_without_time_reads_the_records(tmp_path: Path) -> None:
    run(tmp_path)
    store = Store.open(tmp_path / "store", HEADER)
    searches = search(problems(), Landscape(), store, Preset(FULL, "local", seconds=0.0), 0.0)
    assert all(each.ended for each in searches)


# ---- the order ------------------------------------------------------------------------------------------------------


def order(strategy: Strategy, folder: Path, seed: int = 0) -> list[tuple[str, KernelConfig]]:
    """Return what a strategy tries, in order."""

    class InOrder(Landscape):
        def evaluate(
            self, problem: Problem, configs: Sequence[KernelConfig], together: bool = False
        ) -> Iterator[tuple[KernelConfig, Outcome]]:
            for config in configs:
                yield from super().evaluate(problem, [config])

    bench, store = InOrder(), Store.open(folder / f"{strategy}{seed}", HEADER)
    search(problems(), bench, store, Preset(FULL, strategy, seed=seed), 0.0)
    return bench.evaluated


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_every_strategy_begins_at_the_default_and_stays_in_the_space(strategy: Strategy, tmp_path: Path) -> None:
    tried = order(strategy, tmp_path)
    for problem in problems():
        mine = [config for key, config in tried if key == problem.key]
        assert mine[0] == DEFAULT_CONFIG
        assert len(set(mine)) == len(mine)
        assert set(mine) <= set(configurations(FULL, problem))
        assert strategy == "local" or len(mine) == len(configurations(FULL, problem))
    (tmp_path / "again").mkdir()
    assert order(strategy, tmp_path / "again") == tried
    assert (order(strategy, tmp_path, seed=1) != tried) is (strategy == "shuffled")


@pytest.mark.parametrize("seed", range(10))
def test_a_climb_ends_where_no_neighbour_is_better(seed: int, tmp_path: Path) -> None:
    problem, bench = problems()[seed % 2], Landscape(seed)
    (found,) = search([problem], bench, Store.open(tmp_path / "store", HEADER), LOCAL, 0.0)
    best = found.ranked[0]
    around = [bench.outcome(problem, config) for config in neighbours(FULL, problem, best)]
    assert all(each.cost is None or each.cost >= bench.cost(problem, best) for each in around)


# ---- winners --------------------------------------------------------------------------------------------------------

CHEAP = KernelConfig(block=512)


def searched(folder: Path, costs: dict[KernelConfig, Outcome], header: Header = HEADER) -> Search:
    return Search(problems()[1], None, Store.open(folder / "store", header), EXHAUSTIVE, outcomes=costs)


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.OK])
def test_a_candidate_that_failed_does_not_win(status: Status, tmp_path: Path) -> None:
    failed = searched(tmp_path, {DEFAULT_CONFIG: Outcome(Status.OK, 9.0), CHEAP: Outcome(status, message="why")})
    assert failed.winner == DEFAULT_CONFIG
    nothing = searched(tmp_path, {CHEAP: Outcome(status), DEFAULT_CONFIG: Outcome(status)})
    assert (nothing.winner, nothing.ranked, nothing.gain(CHEAP)) == (None, [], None)


@pytest.mark.parametrize(("cost", "winner"), [(8.90, CHEAP), (8.92, DEFAULT_CONFIG)])
def test_the_default_stays_where_little_is_gained(cost: float, winner: KernelConfig, tmp_path: Path) -> None:
    found = searched(tmp_path, {DEFAULT_CONFIG: Outcome(Status.OK, 9.0), CHEAP: Outcome(Status.OK, cost)})
    assert found.winner == winner
    assert found.gain(CHEAP) == pytest.approx(9.0 / cost)


def test_compiled_facts_replace_only_a_default_that_fails(tmp_path: Path) -> None:
    compiled = replace(HEADER, device="")
    cheap = Outcome(Status.OK, 16)
    works = searched(tmp_path, {DEFAULT_CONFIG: Outcome(Status.OK, 32), CHEAP: cheap}, compiled)
    spills = searched(tmp_path, {DEFAULT_CONFIG: Outcome(Status.SPILLS), CHEAP: cheap}, compiled)
    assert (works.winner, spills.winner) == (DEFAULT_CONFIG, CHEAP)


def test_of_equals_the_first_of_the_space_wins(tmp_path: Path) -> None:
    first, *others = configurations(FULL, problems()[1])[1:4]
    found = searched(tmp_path, {config: Outcome(Status.OK, 5.0) for config in (*reversed(others), first)})
    assert found.winner == first


def test_a_replay_fails_what_is_not_recorded(tmp_path: Path) -> None:
    run(tmp_path, preset=replace(EXHAUSTIVE, configs=5))
    store = Store.read(tmp_path / "store")
    for found in search(problems(), None, store, EXHAUSTIVE, 0.0):
        missing = [each for each in found.outcomes.values() if each.message == "not in the store"]
        assert {each.status for each in missing} == {Status.FAILED}
        assert (found.from_store, found.evaluated, len(missing)) == (5, 0, len(found.outcomes) - 5)
    assert Store.read(tmp_path / "store") == store


class Checked(Landscape):
    """CHEAP wins on the larger problem of the key. The test sets its outcome on the smaller one."""

    def __init__(self, other: Outcome) -> None:
        super().__init__()
        self._other = other

    def outcome(self, problem: Problem, config: KernelConfig) -> Outcome:
        if config == CHEAP:
            return Outcome(Status.OK, 5.0) if len(problem.specs) == 6 else self._other
        return Outcome(Status.OK, 9.0)


OTHERS = {
    "no slower": (Outcome(Status.OK, 9.0), ""),
    "slower": (Outcome(Status.OK, 9.1), "is slower on fold/fp32/small: 3 pairs"),
    "fails": (Outcome(Status.SPILLS), "fails on fold/fp32/small: 3 pairs"),
}


@pytest.mark.parametrize(("other", "overruled"), OTHERS.values(), ids=OTHERS)
def test_a_winner_must_not_be_slower_on_other_calls_of_its_key(
    other: Outcome, overruled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [Problem(pairs(64, count)) for count in (3, 6)]
    assert len({problem.tuned_key for problem in same}) == 1
    bench = run(tmp_path, Checked(other), Preset(QUICK, "exhaustive"), largest_first(same))
    said = json.loads(capsys.readouterr().out)["problems"]
    assert [each["checks"] for each in said] == [False, True]
    assert overruled in said[0]["overruled"]
    assert bool(said[0]["overruled"]) is bool(overruled)
    assert [config for key, config in bench.evaluated if key == same[0].key] == [CHEAP, DEFAULT_CONFIG]
    assert winners(tmp_path) == {same[0].tuned_key: (DEFAULT_CONFIG, 9.0) if overruled else (CHEAP, 5.0)}


def test_a_winner_that_was_not_checked_in_time_does_not_win(now: list[float], tmp_path: Path) -> None:
    class Slow(Checked):
        def outcome(self, problem: Problem, config: KernelConfig) -> Outcome:
            now[0] += 100.0 * (len(problem.specs) == 3)
            return super().outcome(problem, config)

    same = [Problem(pairs(64, count)) for count in (6, 3)]
    store, preset = Store.open(tmp_path / "store", HEADER), Preset(QUICK, "exhaustive", seconds=50.0)
    found, check = search(same, Slow(Outcome(Status.OK, 9.0)), store, preset, now[0])
    assert found.ended
    assert not check.ended
    assert found.winner == DEFAULT_CONFIG
    assert "was not checked on" in found.overruled


def test_nothing_can_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Landscape):
        def outcome(self, problem: Problem, config: KernelConfig) -> Outcome:
            return Outcome(Status.FAILED, message="RuntimeError: no compiler")

    with pytest.raises(typer.Exit) as exit_:
        run(tmp_path, Broken(), Preset(QUICK, "exhaustive"))
    assert exit_.value.exit_code == 1
    said = json.loads(capsys.readouterr().out)
    assert [each["winner"] for each in said["problems"]] == [None] * 4
    assert said["problems"][1]["failures"] == {"failed": len(configurations(QUICK, problems()[1]))}
    assert not (tmp_path / "tuned.json").exists()


class Measured(Landscape):
    """The first timing of a candidate is off by up to a third. The second, side by side, is exact."""

    noisy = True

    def __init__(self) -> None:
        super().__init__()
        self.again: list[tuple[str, KernelConfig]] = []

    def outcome(self, problem: Problem, config: KernelConfig) -> Outcome:
        noise = random.Random(repr((problem.key, config))).uniform(1, 1.3)
        return Outcome(Status.OK, self.cost(problem, config) * noise, {"registers": 32})

    def evaluate(
        self, problem: Problem, configs: Sequence[KernelConfig], together: bool = False
    ) -> Iterator[tuple[KernelConfig, Outcome]]:
        if not together:
            yield from super().evaluate(problem, configs)
            return
        for config in configs:
            self.again.append((problem.key, config))
            yield config, Outcome(Status.OK, self.cost(problem, config), {"rounds": 9})


def test_the_best_few_are_measured_again_side_by_side(tmp_path: Path) -> None:
    bench = Measured()
    run(tmp_path, bench, Preset(QUICK, "exhaustive"))
    for problem in problems():
        again = [config for key, config in bench.again if key == problem.key]
        assert DEFAULT_CONFIG in again
        assert 2 <= len(again) <= 5
        for config in again:
            outcome = outcomes(tmp_path)[problem.key][config]
            assert outcome.cost == bench.cost(problem, config)
            assert outcome.facts == {"registers": 32, "rounds": 9, "reranked": True}
    second = Measured()
    run(tmp_path, second, Preset(QUICK, "exhaustive"))
    assert (second.evaluated, second.again) == ([], [])
