"""Functions that the tuner's workers run in the tests: kernels with planted faults, and a clock."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import triton
from triton_convbn.kernels import tuned
from triton_convbn.kernels.codegen import generate
from triton_convbn.kernels.config import KernelConfig
from triton_convbn.kernels.kernel_source import KernelSource

from triton_convbn import measure
from triton_convbn.tune.outcome import Outcome
from triton_convbn.tune.problem import Problem, Specs

GOOD = KernelConfig()
POISONED = KernelConfig(rows=1)
UNWRITTEN = KernelConfig(rows=2)
FAILS = KernelConfig(threads=256)
HANGS = KernelConfig(block=256)
EXITS = KernelConfig(block=512)
SEGFAULTS = KernelConfig(block=2048)
CRASHES_WHEN_RUN = KernelConfig(emit="shared")
FAULTY = (POISONED, UNWRITTEN, FAILS, HANGS, EXITS, SEGFAULTS, CRASHES_WHEN_RUN)


def compile_faulty(given: Problem, configs: Sequence[KernelConfig], arch: str) -> list[Outcome]:
    """Compile and check kernels, with a fault in each configuration of FAULTY."""
    from triton_convbn.tune.evaluate import compile_candidate

    tuned.generate = faulty
    return compile_candidate(given, configs, arch)


def time_interpreted(given: Problem, configs: Sequence[KernelConfig], rounds: int = 1) -> list[Outcome]:
    """Time interpreted kernels on the CPU."""
    from triton_convbn.tune.evaluate import time_candidates

    triton.knobs.runtime.interpret = True
    return time_candidates(given, configs, "cpu", rounds)


def time_faulty(given: Problem, configs: Sequence[KernelConfig]) -> list[Outcome]:
    """Time kernels in five rounds, with a fault in each configuration of FAULTY."""
    tuned.generate = faulty
    measure.cold_clock_of = lambda device: clock
    return time_interpreted(given, configs, 5)


def faulty(specs: Specs, config: KernelConfig) -> KernelSource:
    source = generate(specs, config)
    if config == POISONED:
        return _changed(source, "rounded(w * s,", "rounded(w * s * 1.0001,")
    if config == UNWRITTEN:  # the last block is never written
        return _changed(source, "tl.store(out_weight + e, ", "tl.store(out_weight + e % 1024, ")
    if config == FAILS:
        return _changed(source, "pid = tl.program_id(0)", "pid = tl.no_such_function(0)")
    if config == HANGS:
        if where := os.environ.get("TUNE_HOOKS_PROCESSES"):  # for the test that asserts that the process ends
            (Path(where) / str(os.getpid())).touch()
        time.sleep(3600)
    if config == EXITS:
        print("out of cheese", file=sys.stderr)
        os._exit(3)
    if config == SEGFAULTS:
        os.kill(os.getpid(), signal.SIGSEGV)
    if config == CRASHES_WHEN_RUN and triton.knobs.runtime.interpret:
        os._exit(4)
    return source


def _changed(source: KernelSource, old: str, new: str) -> KernelSource:
    assert old in source.text
    return replace(source, text=source.text.replace(old, new))


_ticks = 0


def clock(function: Callable[[], object]) -> float:
    """Return a time that grows by a microsecond with each call: a device that slows down."""
    global _ticks
    function()
    _ticks += 1
    return (100 + _ticks) * 1e-6
