"""Run stages: a process for each task, a time limit for each stage, one process at a time while it is timed.

A process that is lost leaves a failed row. The rows that it wrote stay.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..results import Key, Report
from .plan import Stage, Task


class Lost(RuntimeError):
    """Raised when a process ends before its task does."""


class Child:
    """The process of a task. It replies when it is prepared, and after each of its turns."""

    def __init__(self, task: Task, common: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.log, self.replies, self.killed = task.name, log, 0, ""
        given = json.dumps({**common, **task._asdict()})
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "triton_convbn.perf.gpu.child", given],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=environment, start_new_session=True,
            )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._turns, self._replies = self._process.stdin, self._process.stdout
        os.set_blocking(self._replies.fileno(), False)

    def runs(self) -> bool:
        """Return True if the process is running. Counts its replies."""
        with contextlib.suppress(BlockingIOError):
            self.replies += len(os.read(self._replies.fileno(), 64))
        return self._process.poll() is None

    def turn(self, until: float) -> None:
        """Give it a turn. Kill it if the turn has not ended by `until`."""
        before = self.replies
        with contextlib.suppress(BrokenPipeError):
            self._turns.write(b".")
            self._turns.flush()
        while self.runs() and self.replies == before:
            if time.monotonic() > until:
                self.kill("it had its turn and did not end it in time")
            time.sleep(0.002)

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

    common: arguments of every process. begun: when the run began, by time.monotonic.
    """

    def __init__(
        self, stages: Sequence[Stage], report: Report, common: Mapping[str, Any], scratch: Path, begun: float
    ) -> None:
        self.stages, self.report, self.common, self.scratch, self.begun = stages, report, common, scratch, begun
        self.waiting = deque(task for stage in stages for task in stage.tasks)
        self.children: dict[str, Child] = {}

    def run(self, scale: float) -> None:
        """Run every stage. scale: factor of their seconds."""
        end = self.begun
        try:
            for stage in self.stages:
                end += scale * stage.seconds
                self.report.say(f"stage {stage.name}: ends at {end - self.begun:.0f} s at the latest")
                self._stage(stage, end, scale)
        finally:
            for child in self.children.values():
                child.kill("the run ended")

    def _stage(self, stage: Stage, end: float, scale: float) -> None:
        names = [task.name for task in stage.tasks]
        # Half of the time is for turns, so that a task that never gets ready does not use up the time of the others.
        ready_by = end - (scale * stage.seconds / 2 if stage.timed else 0)
        while time.monotonic() < ready_by and not self._prepared(names):
            self._start_more()
            time.sleep(0.02)
        mine = [self.children[name] for name in names if name in self.children]
        for child in mine:
            if not stage.timed or not child.replies:
                child.kill("it was not ready in time" if stage.timed else "it did not end in time")
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
        self._settle(names)

    def _prepared(self, names: Sequence[str]) -> bool:
        found = [self.children.get(name) for name in names]
        return all(child is not None and (not child.runs() or child.replies) for child in found)

    def _start_more(self) -> None:
        busy = sum(child.runs() and not child.replies for child in self.children.values())
        while self.waiting and busy < max(2, os.cpu_count() or 1):
            task = self.waiting.popleft()
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
                "TORCHINDUCTOR_COMPILE_THREADS": "1",  # SIGSTOP does not reach compile workers
                "OMP_NUM_THREADS": "2",
            }
            self.children[task.name] = Child(task, self.common, environment, self.scratch / f"{task.name}.log")
            busy += 1

    def _settle(self, names: Sequence[str]) -> None:
        """Report lost processes. A stopped process may hold the lock of the file, so this runs when none is stopped."""
        for name in names:
            why = self.children[name].lost() if name in self.children else "there was no time to start it"
            if why:
                with self.report.keeping(Key(name), "run"):
                    raise Lost(why)
            with contextlib.suppress(ValueError):
                self.waiting.remove(next((task for task in self.waiting if task.name == name), None))  # type: ignore[arg-type]
