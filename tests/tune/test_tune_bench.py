"""The bench without a GPU: what comes of candidates that are good, wrong, hang, crash or do not compile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest
import tune_hooks
from triton_convbn.kernels.codegen import generate
from triton_convbn.kernels.config import DEFAULT_CONFIG, KernelConfig
from triton_convbn.kernels.offline import ARCHS as OFFLINE_ARCHS
from triton_convbn.kernels.offline import KernelFacts
from triton_convbn.kernels.offline_cases import pair
from triton_convbn.kernels.spec import backward_of

from triton_convbn import measure
from triton_convbn.errors import UsageError
from triton_convbn.tune import device
from triton_convbn.tune.candidate import Candidate
from triton_convbn.tune.device import DeviceBench
from triton_convbn.tune.offline import ARCHS, OfflineBench, over_limit
from triton_convbn.tune.outcome import COMPILED, MEASURED, Outcome, Status
from triton_convbn.tune.problem import Problem

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PAIR = pair(32, 64, 1, conv_bias=True)  # two blocks of 1024
fold_op = Problem("fold", (PAIR, PAIR))
BACKWARD = Problem("fold_backward", tuple(map(backward_of, (PAIR, PAIR, pair(8, 700, 1)))))


def left(pid: int) -> bool:
    """Return whether a process still runs; a zombie does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def faults() -> dict[KernelConfig, Outcome]:
    with closing(OfflineBench("sm_90", workers=2, timeout=20, generate=tune_hooks.faulty)) as bench:
        return dict(bench.evaluate(fold_op, [*tune_hooks.FAULTY, tune_hooks.GOOD]))


@pytest.mark.parametrize(
    ("config", "status", "message"),
    [
        (tune_hooks.POISONED, Status.WRONG_VALUES, "out_weight of pair 0: 2048 of 2048 elements are wrong"),
        (tune_hooks.UNWRITTEN, Status.WRONG_VALUES, "out_weight of pair 0"),
        (tune_hooks.FAILS, Status.FAILED, "no_such_function"),
        (tune_hooks.HANGS, Status.HUNG, "no result after 20 s"),
        (tune_hooks.EXITS, Status.CRASHED, "exit code 3: out of cheese"),
        (tune_hooks.SEGFAULTS, Status.CRASHED, "SIGSEGV"),
        (tune_hooks.CRASHES_WHEN_RUN, Status.CRASHED, "values: exit code 4"),
    ],
)
def test_a_fault_is_recorded(
    faults: dict[KernelConfig, Outcome], config: KernelConfig, status: Status, message: str
) -> None:
    assert faults[config].status is status, faults[config]
    assert message in faults[config].message
    assert faults[config].cost is None


def test_the_sweep_goes_on(faults: dict[KernelConfig, Outcome]) -> None:
    assert len(faults) == len(tune_hooks.FAULTY) + 1
    good = faults[tune_hooks.GOOD]
    assert good.status is Status.OK
    assert good.cost is not None
    assert good.cost == good.facts["registers"] > 0
    assert good.unit == COMPILED
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
        KernelConfig(group=2),
    ]
    with closing(OfflineBench(arch, workers=1)) as bench:
        found = dict(bench.evaluate(BACKWARD, [*configs, *configs]))
        again = dict(bench.evaluate(BACKWARD, configs[:1]))
        assert list(bench.rerank(BACKWARD, configs)) == []
    assert found.keys() == set(configs)
    for config, outcome in found.items():
        assert outcome.status is Status.OK, (config, outcome)
        assert outcome.facts["launches"] == (2 if config.group else 1)
    assert again[configs[0]].cost == found[configs[0]].cost


def facts(**changed: int) -> KernelFacts:
    values = {f.name: 0 for f in fields(KernelFacts)} | {"arch": "sm_90", "registers": 32, "warps": 4} | changed
    return KernelFacts(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"registers": 256}, "256 registers a thread, sm_90 has 255"),
        ({"warps": 64}, "2048 threads a block, sm_90 has 1024"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory"),
        ({"warps": 32, "registers": 255}, "no program fits on a multiprocessor"),
        ({}, None),
    ],
)
def test_limits(changed: dict[str, int], words: str | None) -> None:
    found = over_limit(facts(**changed), ARCHS["sm_90"])
    assert found is None if words is None else words in (found or "")


def test_every_architecture_that_compiles_has_limits() -> None:
    assert set(ARCHS) == set(OFFLINE_ARCHS)


def test_unknown_architecture() -> None:
    with pytest.raises(UsageError, match=r"no architecture 'voodoo2'; known are sm_75, sm_80"):
        OfflineBench("voodoo2")


PROGRAM = """
from contextlib import closing
import sys; sys.path[:0] = {folders!r}
from test_tune_bench import fold_op, tune_hooks
from triton_convbn.tune.offline import OfflineBench
if __name__ == "__main__":
    with closing(OfflineBench("sm_90", timeout=600, generate=tune_hooks.faulty)) as bench:
        list(bench.evaluate(fold_op, [tune_hooks.HANGS]))
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
        assert process.wait(30) != 0
    until = time.monotonic() + 30
    while left(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left(pid)


def test_a_device_by_time() -> None:
    """The CPU stands for the device, with a clock that slows down: each alone, then the best in turns."""
    other = KernelConfig(128)
    bench = DeviceBench("cpu", timeout=120, rounds=5, generate=tune_hooks.faulty, clock=tune_hooks.clock)
    with closing(bench):
        found = dict(bench.evaluate(fold_op, [tune_hooks.GOOD, tune_hooks.POISONED, tune_hooks.SEGFAULTS, other]))
        ranked = dict(bench.rerank(fold_op, [tune_hooks.GOOD, tune_hooks.FAILS, other]))
        assert list(bench.rerank(fold_op, [])) == []
    good = found[tune_hooks.GOOD]
    assert (good.status, good.unit) == (Status.OK, MEASURED)
    assert good.facts["rounds"] == 5
    assert good.facts["p20_us"] < good.cost < good.facts["p80_us"]
    assert good.facts["bytes"] == 2 * 2 * 4 * (32 * 64 + 32) + 2 * 4 * 4 * 32
    assert found[tune_hooks.POISONED].status is Status.WRONG_VALUES
    assert found[tune_hooks.SEGFAULTS].status is Status.CRASHED
    assert ranked[tune_hooks.FAILS].status is Status.FAILED
    assert "no_such_function" in ranked[tune_hooks.FAILS].message
    assert {outcome.unit for outcome in (*found.values(), *ranked.values())} == {MEASURED}
    # Five in a row are five ticks from the next five; in turn they are one or two.
    assert 0 < abs(ranked[tune_hooks.GOOD].cost - ranked[other].cost) < 3


def test_a_broken_device_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access, also one while timing, the process is asked to end."""
    ended: list[str] = []

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(device, "_end_if_broken", lambda where, error: ended.append(str(error)))
    monkeypatch.setattr(measure, "rounds", broken)
    candidate = Candidate(fold_op.specs, DEFAULT_CONFIG, generate)
    with pytest.raises(RuntimeError, match="illegal"):
        device.time_candidates(device.Timing((candidate,), "cpu", 1, False, measure.cpu_clock))
    assert ended == ["an illegal memory access was encountered"]
