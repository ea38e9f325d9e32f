"""Evaluate candidates in worker processes, which may hang or crash. pebble kills and replaces those."""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import replace
from pathlib import Path

from ..errors import UsageError, pip_install
from ..kernels.config import KernelConfig
from .outcome import Outcome, Status, in_a_line
from .problem import Problem

Evaluate = Callable[[Problem, Sequence[KernelConfig]], list[Outcome]]
"""Return the outcome of each configuration, in order. A worker calls it, and imports it by name."""
Outcomes = Generator[tuple[KernelConfig, Outcome], None, None]


class Bench:
    """Turns configurations into outcomes. Owns processes: close it, also after an interruption.

    Ctrl-C reaches the parent alone, which kills the workers when it closes the bench. Workers whose parent was killed
    end themselves.

    Args:
        evaluate: Evaluates configurations of a problem.
        workers: The number of processes.
        timeout: Seconds for a candidate. The start of a process does not count.
        noisy: Costs vary from one evaluation to the next.

    Raises:
        UsageError: pebble is not installed.
    """

    def __init__(self, evaluate: Evaluate, workers: int, timeout: float, noisy: bool = False) -> None:
        try:
            from pebble import ProcessPool
        except ImportError as error:
            raise UsageError(f"tuning needs pebble: {pip_install('tune')}") from error
        self._evaluate, self._timeout, self.noisy = evaluate, timeout, noisy
        self._folder = tempfile.TemporaryDirectory(prefix="triton_convbn-tune-")
        self._errors = Path(self._folder.name) / "stderr"
        self._errors.touch()
        self._pool = ProcessPool(
            max_workers=workers,
            initializer=_start_worker,
            initargs=(str(self._errors),),
            context=multiprocessing.get_context("spawn"),
        )

    def evaluate(self, problem: Problem, configs: Sequence[KernelConfig], together: bool = False) -> Outcomes:
        """Yield each configuration once with its outcome, as they finish, or all side by side if `together`.

        Closing the generator kills the rest.
        """
        running: dict[Future[list[Outcome]], Sequence[KernelConfig]] = {}
        try:
            for task in [configs] if together else [[config] for config in configs]:
                timeout = self._timeout * len(task)
                running[self._pool.submit(_timed, timeout, self._evaluate, problem, task)] = task
            for future in as_completed(running):
                task, error = running[future], future.exception()
                outcomes = future.result() if error is None else [self._failure(error)] * len(task)
                yield from zip(task, outcomes, strict=True)
        finally:
            for future in running:
                future.cancel()

    def close(self) -> None:
        """Kill the workers."""
        self._pool.stop()
        self._pool.join()
        self._folder.cleanup()

    def _failure(self, error: BaseException) -> Outcome:
        """Return the outcome of a task that raised or was lost."""
        if isinstance(error, TimeoutError):
            return Outcome(Status.HUNG, message=f"no result after {self._timeout:g} s", seconds=self._timeout)
        code = getattr(error, "exitcode", None)  # of pebble.ProcessExpired
        if code is None:
            return Outcome(Status.FAILED, message=in_a_line(error))
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        last_words = self._errors.read_text(errors="replace").strip().rpartition("\n")[2].strip()
        self._errors.write_text("")
        return Outcome(Status.CRASHED, message=": ".join(filter(None, (how, last_words))))


def _timed(evaluate: Evaluate, problem: Problem, configs: Sequence[KernelConfig]) -> list[Outcome]:
    """Return the outcomes with each candidate's share of the seconds."""
    begun = time.monotonic()
    outcomes = evaluate(problem, configs)
    share = (time.monotonic() - begun) / len(configs)
    return [replace(outcome, seconds=share) for outcome in outcomes]


def _start_worker(errors: str) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the parent's stdout is for results
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), 2)
    # Imported now, so that ten seconds of a busy machine are not a candidate's time.
    import triton  # noqa: F401

    from . import evaluate  # noqa: F401


def _end_with_parent() -> None:
    """End this process and its children (ptxas) when the parent has ended. A task that hangs would not notice."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os.killpg(0, signal.SIGKILL)
