"""Worker processes for candidates that may hang or crash: pebble kills on timeout and replaces lost workers."""

import concurrent.futures
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import UsageError
from .outcome import Outcome, Status


class Pool:
    """Processes that run functions with a time limit.

    The start of a process does not count as the task's time. Ctrl-C reaches the parent alone, which kills the workers
    when it closes the pool; workers whose parent was killed end themselves.

    Raises:
        UsageError: if pebble is not installed.
    """

    def __init__(self, workers: int, timeout: float, environment: Mapping[str, str]) -> None:
        try:
            from pebble import ProcessPool
        except ImportError as error:
            raise UsageError("tuning needs pebble: pip install 'triton_convbn[tune]'") from error
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="triton_convbn-tune-")
        self._errors = Path(self._folder.name) / "stderr"
        self._pool = ProcessPool(
            max_workers=workers,
            initializer=_start_worker,
            initargs=(dict(environment), str(self._errors), os.getpid()),
            context=multiprocessing.get_context("spawn"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, function: Callable[[Any], Any], task: Any) -> "concurrent.futures.Future[Any]":
        """Run `function(task)` in a worker. Cancelling the future kills the worker that runs it."""
        return self._pool.submit(_timed, self._timeout, function, task)

    def failure(self, error: BaseException) -> Outcome:
        """Return the outcome of a task whose future raised `error`."""
        if isinstance(error, concurrent.futures.TimeoutError):
            return Outcome(Status.HUNG, message=f"no result after {self._timeout:g} s", seconds=self._timeout)
        code = getattr(error, "exitcode", None)
        if code is None:
            return Outcome(Status.FAILED, message=in_a_line(error))
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Outcome(Status.CRASHED, message=": ".join(filter(None, (how, self._last_words()))))

    def _last_words(self) -> str:
        """Return the last line that a worker wrote to stderr, and forget it."""
        lines = self._errors.read_text(errors="replace").split("\n") if self._errors.exists() else []
        self._errors.unlink(missing_ok=True)
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """Kill the workers."""
        self._pool.stop()
        self._pool.join()
        self._folder.cleanup()


def _timed(function: Callable[[Any], Any], task: Any) -> tuple[Any, float]:
    """Return the result and the seconds that it took."""
    begun = time.monotonic()
    return function(task), time.monotonic() - begun


def _start_worker(environment: Mapping[str, str], errors: str, parent: int) -> None:
    os.environ.update(environment)
    os.setsid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the parent's stdout is for results
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    # Imported now, so that ten seconds of a busy machine are not a candidate's time.
    import triton  # noqa: F401

    from .. import measure  # noqa: F401
    from ..kernels import kernel_call, offline  # noqa: F401


def _end_with(parent: int) -> None:
    """End this process and what it started (ptxas) when the parent is gone: a task that hangs cannot notice."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def in_a_line(error: BaseException) -> str:
    """Return the type, and the first and last line of the message: Triton's messages quote the kernel in between."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip(" \t^")]
    return " ".join([f"{type(error).__name__}:", *dict.fromkeys([*lines[:1], *lines[-1:]])]).removesuffix(":")
