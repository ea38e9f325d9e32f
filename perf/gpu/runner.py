"""Run stages: a process for each task, a time limit for each stage, one process at a time while it is timed.

The function of a task is called with the bench, the report and the task's arguments. It may be a generator: it prepares
up to its first `yield`, and each further `yield` ends a turn. A process that is lost leaves a failed row. The rows that
it wrote stay.
"""

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import Report, to_stderr
from ..table import Key, Log
from .stages import Stage, Task


class Lost(RuntimeError):
    """Raised when a process ends before its task does."""


def command_of(task: Task, common: Mapping[str, Any]) -> list[str]:
    """Return the command of a task. common: dry, and csv, the file for its rows."""
    return [sys.executable, "-m", "triton_convbn.perf.gpu.runner", json.dumps({**common, **task._asdict()})]


def run_task(given: Mapping[str, Any]) -> None:
    """Run a task in this process. At each `yield` it writes a byte to stdin, a socket, and waits for one."""
    from .bench import Bench

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    sys.argv[:] = ["gpu_check", given["name"]]  # for the record of the environment
    bench = Bench(given["dry"])
    report = Report(Log(Path(given["csv"])), bench.name, "interpreted" if bench.dry else "ok", to_stderr())
    with report.keeping(Key(given["name"]), "run"):
        module, _, name = given["function"].partition(":")
        for _ in getattr(importlib.import_module(module), name)(bench, report, **given["arguments"]) or ():
            os.write(0, b".")
            if not os.read(0, 1):
                break


class Child:
    """The process of a task, in a session of its own."""

    def __init__(self, task: Task, common: Mapping[str, Any], log: Path) -> None:
        self.log, self.prepared, self.killed = log, False, ""
        self._socket, theirs = socket.socketpair()
        with log.open("wb") as out, theirs:
            streams: Any = {"stdin": theirs, "stdout": out, "stderr": out}
            self._process = subprocess.Popen(command_of(task, common), **streams, start_new_session=True)

    def runs(self) -> bool:
        return self._process.poll() is None

    def replies(self, until: float) -> bool:
        """Wait until the process is prepared, its turn ends, or it ends. Return False if `until` comes first."""
        found, _, _ = select.select([self._socket], [], [], max(0.0, until - time.monotonic()))
        if found and not self._socket.recv(1):
            self._process.wait()
        self.prepared |= bool(found)
        return bool(found)

    def turn(self, until: float) -> None:
        """Give the process a turn. Kill it if the turn has not ended by `until`."""
        with contextlib.suppress(BrokenPipeError):
            self._socket.send(b".")
        if not self.replies(until):
            self.kill("it had its turn and did not end it in time")

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill(self, why: str) -> None:
        if self.runs():
            self.killed = why
            self.send(signal.SIGKILL)
            self._process.wait()

    def lost(self) -> str:
        """Return why the process ended before its task did, or an empty string."""
        code = self._process.returncode
        if self.killed or not code:
            return self.killed
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = self.log.read_text(errors="replace").split("\n")
        return f"exit code {code}: {next((line for line in reversed(lines) if line.strip()), '')}"


class Runner:
    """Run stages in order. Tasks of later stages prepare ahead, as many processes at once as there are cores.

    Args:
        common: Arguments of every process, see `command_of`.
        scratch: The folder for the logs of the processes.
    """

    def __init__(self, stages: Sequence[Stage], report: Report, common: Mapping[str, Any], scratch: Path) -> None:
        self.stages, self.report, self.common, self.scratch = stages, report, common, scratch
        self.waiting = [task for stage in stages for task in stage.tasks]
        self.children: dict[str, Child] = {}

    def run(self, begun: float, scale: float) -> None:
        """Run every stage. begun: when the run began, by time.monotonic. scale: factor of the stages' seconds."""
        end = begun
        try:
            for stage in self.stages:
                end += scale * stage.seconds
                self.report.say(f"stage {stage.name}: ends at {end - begun:.0f} s at the latest")
                # Half of the time is for turns, so that a task that never gets ready leaves time for the others.
                self._prepare(stage, end - (scale * stage.seconds / 2 if stage.timed else 0))
                self._take_turns(stage, end)
                self._report_lost(stage)
        finally:
            for child in self.children.values():
                child.kill("the run ended")

    def _of(self, stage: Stage) -> list[Child]:
        return [self.children[task.name] for task in stage.tasks if task.name in self.children]

    def _prepare(self, stage: Stage, until: float) -> None:
        """Start processes until those of the stage are prepared. Kill those of them that are late."""
        while time.monotonic() < until:
            starting = [child for child in self.children.values() if not child.prepared and not child.replies(0)]
            if self.waiting and len(starting) < max(2, os.cpu_count() or 1):
                task = self.waiting.pop(0)
                self.children[task.name] = Child(task, self.common, self.scratch / f"{task.name}.log")
            elif len(mine := self._of(stage)) == len(stage.tasks) and all(child.prepared for child in mine):
                break
            else:
                time.sleep(0.02)
        for child in self._of(stage):
            if not child.prepared:
                child.kill("it was not ready in time" if stage.timed else "it did not end in time")

    def _take_turns(self, stage: Stage, end: float) -> None:
        """Give the processes of the stage turns, one after the other, while all other processes are stopped."""
        mine = self._of(stage)
        others = [child for child in self.children.values() if child not in mine and child.runs()]
        for child in others:
            child.send(signal.SIGSTOP)
        try:
            while running := [child for child in mine if child.runs()]:
                for child in running:
                    now = time.monotonic()
                    child.turn(now + max(0.0, end - now) / min(2, len(running)))
        finally:
            for child in others:
                child.send(signal.SIGCONT)

    def _report_lost(self, stage: Stage) -> None:
        """Report lost processes. A stopped process may hold the lock of the file, so this runs when none is stopped."""
        for task in stage.tasks:
            child = self.children.get(task.name)
            if why := child.lost() if child else "there was no time to start it":
                with self.report.keeping(Key(task.name), "run"):
                    raise Lost(why)
        self.waiting = [task for task in self.waiting if task not in stage.tasks]


if __name__ == "__main__":
    run_task(json.loads(sys.argv[1]))
