"""Run stages: a process for each task, a time limit for each stage, one process at a time while it is timed.

The function of a task is called with the device, the report and the task's arguments. It may be a generator: it
prepares up to its first `yield`, and each further `yield` ends a turn. A process that is lost leaves a failed row. The
rows that it wrote stay.
"""

import asyncio
import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..results import Key, Report


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
    """Return the task that calls a function of `perf.gpu`, given as ``"module.function"``."""
    return Task(name, f"triton_convbn.perf.gpu.{function}", arguments)


def command_of(task: Task, common: Mapping[str, Any]) -> list[str]:
    """Return the command of a task. common: dry, and csv, the file for its rows."""
    return [sys.executable, "-m", "triton_convbn.perf.gpu.processes", json.dumps({**common, **task._asdict()})]


def run_task(given: Mapping[str, Any]) -> None:
    """Run a task in this process. At each `yield` it writes a byte to stdout, and waits for one on stdin."""
    from .device import device_of, report_of

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    reply = os.dup(1)
    os.dup2(2, 1)
    sys.argv[:] = ["gpu_check", given["name"]]  # for the record of the environment
    device = device_of(given["dry"])
    report = report_of(device, Path(given["csv"]))
    with report.keeping(Key(given["name"]), "run"):
        module, _, name = given["function"].partition(":")
        for _ in getattr(importlib.import_module(module), name)(device, report, **given["arguments"]) or ():
            os.write(reply, b".")
            if not os.read(0, 1):
                break


@dataclass(eq=False)
class Child:
    """The process of a task, in a session of its own."""

    name: str
    command: list[str]
    log: Path
    killed: str = ""
    process: Process | None = None

    async def prepare(self, environment: Mapping[str, str], slots: asyncio.Semaphore, starting: asyncio.Lock) -> None:
        """Start the process once there is a slot, under the lock, and wait until it is prepared or ends."""
        async with slots:
            async with starting:
                with self.log.open("wb") as out:
                    streams: dict[str, Any] = {"stdin": PIPE, "stdout": PIPE, "stderr": out, "env": environment}
                    process = await asyncio.create_subprocess_exec(*self.command, **streams, start_new_session=True)
                self.process = process
            await self._reply(process)

    async def turn(self, seconds: float) -> None:
        """Give the process a turn. Kill it if the turn takes longer."""
        if self.process and self.process.stdin:
            self.process.stdin.write(b".")
            try:
                await asyncio.wait_for(self._reply(self.process), seconds)
            except TimeoutError:
                await self.kill("it had its turn and did not end it in time")

    async def _reply(self, process: Process) -> None:
        """Wait for a reply or for the end of the process."""
        if process.stdout and not await process.stdout.read(1):
            await process.wait()

    def runs(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def send(self, number: int) -> None:
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    async def kill(self, why: str) -> None:
        """Kill the process if it runs, and wait until it has ended."""
        if self.process is None or self.runs():
            self.killed = why
            self.send(signal.SIGKILL)
        if self.process:
            await self.process.wait()

    def lost(self) -> str:
        """Return why the process ended before its task did, or an empty string."""
        if self.killed or self.process is None:
            return self.killed or "it could not be started"
        code = self.process.returncode or 0
        if code <= 0:
            return f"killed by {signal.Signals(-code).name}" if code else ""
        return f"exit code {code}: {self.log.read_text(errors='replace').rstrip().rpartition(chr(10))[2]}"


async def run(
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
    slots, starting, end = asyncio.Semaphore(max(2, os.cpu_count() or 1)), asyncio.Lock(), begun
    tasks = [task for stage in stages for task in stage.tasks]
    every = [Child(task.name, command_of(task, common), scratch / f"{task.name}.log") for task in tasks]
    prepared = {child: asyncio.create_task(child.prepare(environment, slots, starting)) for child in every}
    remaining = iter(every)
    try:
        for stage in stages:
            end += scale * stage.seconds
            report.say(f"stage {stage.name}: ends at {end - begun:.0f} s at the latest")
            mine = list(islice(remaining, len(stage.tasks)))
            # Half of the time is for turns, so that a task that never gets ready leaves time for the others.
            until = end - (scale * stage.seconds / 2 if stage.timed else 0)
            await asyncio.wait([prepared[child] for child in mine], timeout=max(0.0, until - time.monotonic()))
            for child in mine:
                if not prepared[child].done():
                    prepared[child].cancel()
                    await child.kill("it was not ready in time" if stage.timed else "it did not end in time")
            async with starting:
                await _take_turns(mine, every, end)
            # A stopped process may hold the lock of the file, so rows are written when none is stopped.
            for child in mine:
                if why := child.lost():
                    report.failed(Key(child.name), "run", "", f"Lost: {why}")
    finally:
        for child in every:
            prepared[child].cancel()
            await child.kill("the run ended")


async def _take_turns(mine: Sequence[Child], every: Sequence[Child], end: float) -> None:
    """Give some processes turns, one after the other, while all others are stopped."""
    others = [child for child in every if child not in mine and child.runs()]
    for child in others:
        child.send(signal.SIGSTOP)
    try:
        while running := [child for child in mine if child.runs()]:
            for child in running:
                await child.turn(max(0.001, end - time.monotonic()) / min(2, len(running)))
    finally:
        for child in others:
            child.send(signal.SIGCONT)


if __name__ == "__main__":
    run_task(json.loads(sys.argv[1]))
