"""A generator with planted faults, and a clock. The tuner's workers import them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from triton_convbn.kernels.codegen import KernelSource, generate
from triton_convbn.kernels.config import KernelConfig

from triton_convbn.tune.problem import Specs

GOOD = KernelConfig()
POISONED = KernelConfig(threads=32)
UNWRITTEN = KernelConfig(threads=64)
FAILS = KernelConfig(threads=256)
HANGS = KernelConfig(block=256)
EXITS = KernelConfig(block=512)
SEGFAULTS = KernelConfig(block=2048)
CRASHES_WHEN_RUN = KernelConfig(emit="shared")
FAULTY = (POISONED, UNWRITTEN, FAILS, HANGS, EXITS, SEGFAULTS, CRASHES_WHEN_RUN)


def faulty(specs: Specs, config: KernelConfig) -> KernelSource:
    """Generate a kernel, with a fault in each configuration of FAULTY."""
    source = generate(specs, config)
    if config == POISONED:
        return _changed(source, "rounded(w * s,", "rounded(w * s * 1.0001,")
    if config == UNWRITTEN:  # the last block stays as it was
        return _changed(source, "tl.store(out_weight + e, ", "tl.store(out_weight + e % 1024, ")
    if config == FAILS:
        return _changed(source, "pid = tl.program_id(0)", "pid = tl.no_such_function(0)")
    if config == HANGS:
        _note_process()
        time.sleep(3600)
    if config == EXITS:
        print("out of cheese", file=sys.stderr)
        os._exit(3)
    if config == SEGFAULTS:
        os.kill(os.getpid(), signal.SIGSEGV)
    if config == CRASHES_WHEN_RUN and os.environ["TRITON_INTERPRET"] == "1":
        os._exit(4)
    return source


def _changed(source: KernelSource, old: str, new: str) -> KernelSource:
    assert old in source.text
    return replace(source, text=source.text.replace(old, new))


def _note_process() -> None:
    """Note the process, for the test that asserts that it ends."""
    if where := os.environ.get("TUNE_HOOKS_PROCESSES"):
        (Path(where) / str(os.getpid())).touch()


_ticks = 0


def clock(function: Callable[[], object]) -> float:
    """Return a time that grows by a microsecond with each call: a device that slows down."""
    global _ticks
    function()
    _ticks += 1
    return (100 + _ticks) * 1e-6
