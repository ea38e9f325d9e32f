"""Processes that may hang or crash: each task has a time limit, and a process that is lost is replaced.

A lane is a function and the processes that run it. They are started by `subprocess`, not `multiprocessing`, whose
children import the parent's main module again, and torch with it. Each has a session of its own: Ctrl-C reaches the
parent alone, and a process is killed together with what it has started (ptxas).
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import IO, Any, Literal

from ..errors import UsageError

START_SECONDS = 120.0
"""How long a process may take until it is ready: torch and triton on a busy machine need some 10 s."""


@dataclass(frozen=True)
class Lane:
    """function: importable by its module and name; takes a task, returns a result, both picklable."""

    name: str
    function: Callable[[Any], Any]
    workers: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """What came of a task. how: "returned" a value, "raised" (message: what), "hung" or "crashed" (message: how)."""

    lane: str
    task: Any
    how: Literal["returned", "raised", "hung", "crashed"]
    value: Any = None
    message: str = ""
    seconds: float = 0.0


class Pool:
    """Runs tasks in lanes. `close` kills what still runs; so does leaving `results` early, as Ctrl-C does."""

    def __init__(self, lanes: list[Lane], timeout: float) -> None:
        self._timeout = timeout
        self._lanes = {lane.name: lane for lane in lanes}
        self._waiting: dict[str, deque[Any]] = {lane.name: deque() for lane in lanes}
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for waiting in self._waiting.values():
            waiting.clear()
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def submit(self, lane: str, task: Any) -> None:
        self._waiting[lane].append(task)

    def results(self) -> Iterator[Done]:
        """Every task that was submitted, as they finish, until none is left; more may be submitted meanwhile.

        Raises: UsageError, where a process cannot even start.
        """
        try:
            while True:
                self._start()
                busy = [worker for worker in self._workers if worker.busy]
                if not busy:
                    return
                now = time.monotonic()
                soonest = max(0.0, min(worker.deadline for worker in busy) - now)
                ready = wait([worker.connection for worker in busy], min(soonest, 1.0))
                for worker in busy:
                    done = worker.receive() if worker.connection in ready else worker.overdue()
                    if worker.lost:
                        worker.kill()
                        self._workers.remove(worker)
                    if done is not None:
                        yield done
        finally:
            for waiting in self._waiting.values():
                waiting.clear()  # or what was left early would come out of the next call
            if any(worker.busy for worker in self._workers):
                self.close()

    def _start(self) -> None:
        for name, waiting in self._waiting.items():
            lane = self._lanes[name]
            while waiting:
                mine = [worker for worker in self._workers if worker.lane is lane]
                idle = [worker for worker in mine if not worker.busy]
                if not idle and len(mine) == lane.workers:
                    break
                if not idle:
                    idle = [_Worker(lane)]
                    self._workers += idle
                idle[0].send(waiting.popleft(), self._timeout)


class _Worker:
    """One process, and the task that it has."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.lost = False
        self._task: tuple[Any] | None = None
        self._ready = False
        ours, theirs = socket.socketpair()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `kill`
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                env={**os.environ, **lane.environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self._begun = time.monotonic()
        self.deadline = self._begun + START_SECONDS
        self._timeout = 0.0

    @property
    def busy(self) -> bool:
        return self._task is not None

    def send(self, task: Any, timeout: float) -> None:
        self._task, self._timeout = (task,), timeout
        if self._ready:
            self._hand_over()
        # else: once the process says that it is ready, so that its start is not the task's time

    def _hand_over(self) -> None:
        assert self._task is not None
        self._begun = time.monotonic()
        self.deadline = self._begun + self._timeout
        with contextlib.suppress(OSError):  # a process that is gone is noticed when it should answer
            self.connection.send_bytes(pickle.dumps((self.lane.function, self._task[0])))

    def receive(self) -> Done | None:
        try:
            how, value = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.lost = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)  # it may close its end a moment before it is gone
            if not self._ready:
                raise UsageError(f"a process of the tuner does not start: {self._end()}") from None
            return self._done("crashed", message=self._end())
        if not self._ready:
            self._ready = True
            self._hand_over()
            return None
        return self._done(how, **{"value" if how == "returned" else "message": value})

    def overdue(self) -> Done | None:
        if time.monotonic() < self.deadline:
            return None
        self.lost = True
        if not self._ready:
            raise UsageError(f"a process of the tuner was not ready after {START_SECONDS:.0f} s")
        return self._done("hung", message=f"no result after {self._timeout:g} s")

    def _done(self, how: Literal["returned", "raised", "hung", "crashed"], **more: Any) -> Done:
        assert self._task is not None
        (task,), self._task = self._task, None
        return Done(self.lane.name, task, how, seconds=time.monotonic() - self._begun, **more)

    def _end(self) -> str:
        """How the process ended, and the last line that it wrote."""
        code = self._process.poll()
        if code is None:
            return "it closed its connection"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {last}" if last else how

    def kill(self) -> None:
        self._task = None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session's group, so those that it started as well
        self._process.wait()
        self.connection.close()
        self._errors.close()


def serve(descriptor: int) -> None:
    """What a process of the pool does: tasks in, results out, until the parent is gone."""
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    connection = Connection(descriptor)
    connection.send_bytes(pickle.dumps(("ready", None)))
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            function, task = pickle.loads(message)
            answer = pickle.dumps(("returned", function(task)))
        except Exception as error:
            answer = pickle.dumps(("raised", in_a_line(error)))
        connection.send_bytes(answer)


def in_a_line(error: Exception) -> str:
    """Type, first and last line: of Triton's messages, which quote the kernel, where it fails and what is wrong."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip(" \t^")]
    return " ".join([f"{type(error).__name__}:", *dict.fromkeys([*lines[:1], *lines[-1:]])]).removesuffix(":")


def _end_with(parent: int) -> None:
    """A parent that was killed cannot end a task that hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)
