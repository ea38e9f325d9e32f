"""Stages that succeed or fail in every way, for the tests of the GPU check. Functions run in their own processes."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton_convbn.perf.gpu.processes import Stage, Task
from triton_convbn.perf.results import Key


def good(_device: Any, report: Any) -> None:
    report.measured(Key("good"), "figure", "1", 1.0)


def killed(_device: Any, report: Any) -> None:
    report.measured(Key("killed"), "figure", "1", 2.0)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(_device: Any, report: Any) -> None:
    report.measured(Key("hangs"), "figure", "1", 3.0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def raises(_device: Any, _report: Any) -> None:
    raise RuntimeError("out of\nluck")


def exits(_device: Any, _report: Any) -> None:
    print("last words", flush=True)
    os._exit(7)


def timed(_device: Any, report: Any, name: str, path: str, spun: str, hangs: bool = False) -> Iterator[None]:
    """Take two turns. Write begin and end of each, with the size of the file that `spins` writes."""
    while not Path(spun).exists():
        time.sleep(0.1)
    yield
    for turn in (1, 2):
        for word in ("begin", "end"):
            with Path(path).open("a") as file:
                file.write(f"{name} {turn} {word} {Path(spun).stat().st_size}\n")
            time.sleep(600 if hangs else 0.2)
        report.measured(Key(name), f"turn_{turn}", "1", turn)
        yield


def spins(_device: Any, _report: Any, path: str, turns: str, until: str) -> Iterator[None]:
    """Prepare until the turn named by `until` has ended, and append to a file meanwhile."""
    while until not in (Path(turns).read_text() if Path(turns).exists() else ""):
        with Path(path).open("a") as file:
            file.write("spin\n")
        time.sleep(0.02)
    yield


def stage(name: str, seconds: float, **arguments: Any) -> Stage:
    return Stage(name, seconds, (Task(name, f"{__name__}:{name}", arguments),), timed=False)
