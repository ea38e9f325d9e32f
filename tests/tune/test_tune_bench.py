"""The benches, without a GPU: outcomes of candidates that are good, wrong, hang, crash or do not compile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import tune_hooks
from triton_convbn.kernels.config import DEFAULT_CONFIG, KernelConfig
from triton_convbn.kernels.offline import ARCHS
from triton_convbn.kernels.offline_cases import pair
from triton_convbn.kernels.spec import backward_of

from triton_convbn import measure
from triton_convbn.tune import evaluate
from triton_convbn.tune.bench import Bench
from triton_convbn.tune.outcome import Outcome, Status
from triton_convbn.tune.problem import Problem

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PAIR = pair(32, 64, 1, conv_bias=True)  # two blocks of 1024
FOLD = Problem((PAIR, PAIR))
BACKWARD = Problem(tuple(map(backward_of, (PAIR, PAIR, pair(8, 700, 1)))))


def faulty_bench(timeout: float = 20) -> Bench:
    return Bench(partial(tune_hooks.compile_faulty, arch="sm_90"), 2, timeout)


def left(pid: int) -> bool:
    """Return whether a process still runs; a zombie does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def faults() -> dict[KernelConfig, Outcome]:
    with closing(faulty_bench()) as bench:
        return dict(bench.evaluate(FOLD, [*tune_hooks.FAULTY, tune_hooks.GOOD]))


@pytest.mark.parametrize(
    ("config", "status", "message"),
    [
        (tune_hooks.POISONED, Status.WRONG_VALUES, "out_weight of pair 0: 2048 of 2048 elements are wrong"),
        (tune_hooks.UNWRITTEN, Status.WRONG_VALUES, "out_weight of pair 0"),
        (tune_hooks.FAILS, Status.FAILED, "no_such_function"),
        (tune_hooks.HANGS, Status.HUNG, "no result after 20 s"),
        (tune_hooks.EXITS, Status.CRASHED, "exit code 3: out of cheese"),
        (tune_hooks.SEGFAULTS, Status.CRASHED, "SIGSEGV"),
        (tune_hooks.CRASHES_WHEN_RUN, Status.CRASHED, "exit code 4"),
    ],
)
def test_a_fault_is_recorded(
    faults: dict[KernelConfig, Outcome], config: KernelConfig, status: Status, message: str
) -> None:
    assert faults[config].status is status, faults[config]
    assert message in faults[config].message
    assert faults[config].cost is None


def test_the_run_continues_after_faults(faults: dict[KernelConfig, Outcome]) -> None:
    assert len(faults) == len(tune_hooks.FAULTY) + 1
    good = faults[tune_hooks.GOOD]
    assert good.status is Status.OK
    assert good.cost is not None
    assert good.cost == good.facts["registers"] > 0
    assert good.facts["spills"] == 0
    assert good.facts["load_bits"] == 128


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_every_field_of_a_configuration_compiles_and_is_right(arch: str) -> None:
    configs = [
        DEFAULT_CONFIG,
        KernelConfig(512, 64),
        KernelConfig(emit="shared"),
        KernelConfig(rows=1),
        KernelConfig(evict="loads+stores"),
        KernelConfig(pairs_per_launch=2),
    ]
    with closing(Bench(partial(evaluate.compile_candidate, arch=arch), 1, timeout=60)) as bench:
        found = dict(bench.evaluate(BACKWARD, configs))
        again = dict(bench.evaluate(BACKWARD, configs[:1]))
    assert found.keys() == set(configs)
    for config, outcome in found.items():
        assert outcome.status is Status.OK, (config, outcome)
        assert outcome.facts["launches"] == (2 if config.pairs_per_launch else 1)
    assert again[configs[0]].cost == found[configs[0]].cost


def test_too_much_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real kernels need little. The limit is lowered to less than a backward needs."""
    monkeypatch.setitem(evaluate.SHARED_KB, "sm_90", 0)
    (outcome,) = evaluate.compile_candidate(BACKWARD, [DEFAULT_CONFIG], "sm_90")
    assert (outcome.status, outcome.cost) == (Status.OVER_LIMIT, None)
    assert f"{outcome.facts['shared_bytes']} bytes of shared memory, sm_90 has 0" in outcome.message


def test_every_architecture_that_compiles_has_a_limit() -> None:
    assert set(evaluate.SHARED_KB) == set(ARCHS)


PROGRAM = """
from contextlib import closing
import sys; sys.path[:0] = {folders!r}
from test_tune_bench import FOLD, faulty_bench, tune_hooks
if __name__ == "__main__":
    with closing(faulty_bench(timeout=600)) as bench:
        list(bench.evaluate(FOLD, [tune_hooks.HANGS]))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_tuner(how: signal.Signals, tmp_path: Path) -> None:
    """A hanging worker ends at Ctrl-C, and also after the tuner is killed."""
    env = {**os.environ, "TUNE_HOOKS_PROCESSES": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM.format(folders=[str(HERE), str(HERE.parent)])]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 120
        while not list(tmp_path.iterdir()) and time.monotonic() < until:
            time.sleep(0.1)
        (pid,) = (int(path.name) for path in tmp_path.iterdir())
        assert left(pid)
        process.send_signal(how)
        assert process.wait(120) != 0
    until = time.monotonic() + 120
    while left(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left(pid)


def test_a_device_by_time() -> None:
    """The CPU stands for the device, with a clock that slows down: each alone, then the best in turns."""
    other = KernelConfig(128)
    bench = Bench(tune_hooks.time_faulty, 1, 120, noisy=True)
    with closing(bench):
        found = dict(bench.evaluate(FOLD, [tune_hooks.GOOD, tune_hooks.POISONED, tune_hooks.SEGFAULTS, other]))
        ranked = dict(bench.evaluate(FOLD, [tune_hooks.GOOD, tune_hooks.FAILS, other], together=True))
    good = found[tune_hooks.GOOD]
    assert good.status is Status.OK
    assert good.cost is not None
    assert good.facts["rounds"] == 5
    assert good.facts["p20_us"] < good.cost < good.facts["p80_us"]
    assert good.facts["bytes"] == 2 * 2 * 4 * (32 * 64 + 32) + 2 * 4 * 4 * 32
    assert found[tune_hooks.POISONED].status is Status.WRONG_VALUES
    assert found[tune_hooks.SEGFAULTS].status is Status.CRASHED
    assert ranked[tune_hooks.FAILS].status is Status.FAILED
    assert "no_such_function" in ranked[tune_hooks.FAILS].message
    # Five in a row are five ticks from the next five; in turn they are one or two.
    costs = [ranked[config].cost or 0.0 for config in (tune_hooks.GOOD, other)]
    assert 0 < abs(costs[0] - costs[1]) < 3


def test_a_broken_device_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access, also one while timing, the process ends."""
    ended: list[str] = []

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(evaluate, "_end_if_broken", lambda where, error: ended.append(str(error)))
    monkeypatch.setattr(measure, "rounds", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        evaluate.time_candidates(FOLD, [DEFAULT_CONFIG], "cpu", 1)
    assert ended == ["an illegal memory access was encountered"]
