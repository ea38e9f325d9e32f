"""Run stages: a process for each task, a time limit for each stage, one process at a time while it is timed.

The function of a task is called with the device, the report and the task's arguments. It may be a generator: it
prepares up to its first `yield`, and each further `yield` ends a turn. A process that is lost leaves a failed row. The
rows that it wrote stay.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..results import Key, Log, Report


class Task(NamedTuple):
    """A process. It calls function, "module:name", with the device, the report and the arguments."""

    name: str
    function: str
    arguments: dict[str, Any]


class Stage(NamedTuple):
    """Tasks that share a time limit.

    seconds: share of the budget. The stage ends when its own seconds and those of earlier stages are over.
    timed: tasks prepare during earlier stages, and are then timed in turn while all other processes are stopped.
    """

    name: str
    seconds: float
    tasks: tuple[Task, ...]
    timed: bool = True


def task(name: str, function: str, **arguments: Any) -> Task:
    return Task(name, f"triton_convbn.perf.gpu.{function}", arguments)


def command_of(task: Task, common: Mapping[str, Any]) -> list[str]:
    """Return the command of a task. common: dry, and csv, the file for its rows."""
    return [sys.executable, "-m", "triton_convbn.perf.gpu.processes", json.dumps({**common, **task._asdict()})]


def run_task(given: Mapping[str, Any]) -> None:
    """Run a task in this process. At each `yield` it writes a byte to stdin, a socket, and waits for one."""
    from .device import device_of, report_of

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    sys.argv[:] = ["gpu_check", given["name"]]  # for the record of the environment
    device = device_of(given["dry"])
    report = report_of(device, Log(Path(given["csv"])))
    with report.keeping(Key(given["name"]), "run"):
        module, _, name = given["function"].partition(":")
        for _ in getattr(importlib.import_module(module), name)(device, report, **given["arguments"]) or ():
            os.write(0, b".")
            if not os.read(0, 1):
                break


@dataclass(eq=False)
class Child:
    """The process of a task, in a session of its own."""

    name: str
    command: list[str]
    log: Path
    killed: str = ""
    process: subprocess.Popen[bytes] | None = None

    def prepare(self, starting: threading.Lock, environment: Mapping[str, str]) -> None:
        """Start the process, and wait until it is prepared or ends. Hold the lock while it starts."""
        with starting:
            if self.killed:
                return
            self._socket, theirs = socket.socketpair()
            with self.log.open("wb") as out, theirs:
                streams: dict[str, Any] = {"stdin": theirs, "stdout": out, "stderr": out}
                self.process = subprocess.Popen(self.command, **streams, env=environment, start_new_session=True)
        if self.killed:  # meanwhile
            self.send(signal.SIGKILL)
        self._wait()

    def turn(self, seconds: float) -> None:
        """Give the process a turn. Kill it if the turn takes longer."""
        self._socket.settimeout(seconds)
        try:
            with contextlib.suppress(ConnectionError):
                self._socket.send(b".")
            self._wait()
        except TimeoutError:
            self.kill("it had its turn and did not end it in time")

    def _wait(self) -> None:
        """Wait for a reply or for the end of the process."""
        with contextlib.suppress(ConnectionError):
            if self._socket.recv(1):
                return
        if self.process:
            self.process.wait()

    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, number: int) -> None:
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def kill(self, why: str) -> None:
        if self.process is None or self.runs():
            self.killed = why
            self.send(signal.SIGKILL)
        if self.process:
            self.process.wait()

    def lost(self) -> str:
        """Return why the process ended before its task did, or an empty string."""
        if self.killed or self.process is None:
            return self.killed or "it could not be started"
        code = self.process.returncode
        if code <= 0:
            return f"killed by {signal.Signals(-code).name}" if code else ""
        lines = self.log.read_text(errors="replace").split("\n")
        return f"exit code {code}: {next((line for line in reversed(lines) if line.strip()), '')}"


def run(
    stages: Sequence[Stage],
    report: Report,
    common: Mapping[str, Any],
    environment: Mapping[str, str],
    scratch: Path,
    begun: float,
    scale: float,
) -> None:
    """Run stages in order. Tasks of later stages prepare ahead, as many processes at once as there are cores.

    Args:
        common: Arguments of every process, see `command_of`.
        environment: The environment variables of every process.
        scratch: The folder for the logs of the processes.
        begun: When the run began, by time.monotonic.
        scale: Factor of the stages' seconds.
    """
    starting, end = threading.Lock(), begun
    tasks = [task for stage in stages for task in stage.tasks]
    every = [Child(task.name, command_of(task, common), scratch / f"{task.name}.log") for task in tasks]
    remaining = iter(every)
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        prepared = {child.name: pool.submit(child.prepare, starting, environment) for child in every}
        try:
            for stage in stages:
                end += scale * stage.seconds
                report.say(f"stage {stage.name}: ends at {end - begun:.0f} s at the latest")
                mine = list(islice(remaining, len(stage.tasks)))
                # Half of the time is for turns, so that a task that never gets ready leaves time for the others.
                until = end - (scale * stage.seconds / 2 if stage.timed else 0)
                wait([prepared[child.name] for child in mine], max(0.0, until - time.monotonic()))
                for child in mine:
                    if not prepared[child.name].done():
                        child.kill("it was not ready in time" if stage.timed else "it did not end in time")
                with starting:
                    _take_turns(mine, every, end)
                # A stopped process may hold the lock of the file, so rows are written when none is stopped.
                for child in mine:
                    if why := child.lost():
                        report.failed(Key(child.name), "run", "", f"Lost: {why}")
        finally:
            for child in every:
                child.kill("the run ended")


def _take_turns(mine: Sequence[Child], every: Sequence[Child], end: float) -> None:
    """Give some processes turns, one after the other, while all others are stopped."""
    others = [child for child in every if child not in mine and child.runs()]
    for child in others:
        child.send(signal.SIGSTOP)
    try:
        while running := [child for child in mine if child.runs()]:
            for child in running:
                child.turn(max(0.001, end - time.monotonic()) / min(2, len(running)))
    finally:
        for child in others:
            child.send(signal.SIGCONT)


if __name__ == "__main__":
    run_task(json.loads(sys.argv[1]))
