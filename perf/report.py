"""What a run of a benchmark keeps: every figure and every failure as a row, in a file as soon as it is known."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .table import Key, Log, Row, environment

Quantiles = tuple[float, float, float]
UNKNOWN = (math.nan, math.nan, math.nan)


def to_stderr() -> Callable[[str], None]:
    """Prints what is being done, and the seconds since the start."""
    start = time.monotonic()
    return lambda text: print(f"[{time.monotonic() - start:6.1f} s] {text}", file=sys.stderr, flush=True)


class Report:
    """The rows: to the file as they come, and kept. One that is there is never written a second time, but where what
    was measured before has failed now.

    Args:
        log: the file; None for none.
        device: the name of the device, for the rows.
        status: of a figure, see `Row`.
        say: is told what is being done.
        resume: whether what the file held before, measured with the same device, versions and commit, counts as if it
            were of this run.
    """

    def __init__(
        self,
        log: Log | None,
        device: str,
        status: str = "ok",
        say: Callable[[str], None] = lambda _text: None,
        resume: bool = False,
    ) -> None:
        self.say = say
        self._log, self._status = log, status
        self._where = environment(device)
        earlier = [row for row in (log.earlier if log and resume else []) if row.where == self._where]
        self._rows = {(row.key, row.metric): row for row in earlier}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def row(self, key: Key, metric: str) -> Row | None:
        return self._rows.get((key, metric))

    def _add(self, key: Key, metric: str, unit: str, values: Quantiles, status: str, error: str) -> None:
        there = self._rows.get((key, metric))
        if there is not None and (there.status == "failed" or status != "failed"):
            return
        row = Row(*key, metric, unit, *values, status, " ".join(error.split()), *self._where)
        self._rows[key, metric] = row
        if self._log is not None:
            self._log.append(row)
        if status == "failed":
            self.say(f"failed: {' '.join(filter(None, map(str, key)))} {metric}: {row.error[:200]}")

    def measured(self, key: Key, metric: str, unit: str, values: Quantiles | float) -> None:
        values = values if isinstance(values, tuple) else (values, values, values)
        self._add(key, metric, unit, values, self._status, "")

    def checked(self, key: Key, metric: str, unit: str, value: float, limit: float, what: str = "") -> None:
        """A value that may be as large as `limit`. NaN is not small, and infinity never is."""
        if value <= limit and value < math.inf:
            self.measured(key, metric, unit, value)
        else:
            error = f"{what}{': ' if what else ''}{value:.4g} {unit}, {limit:.4g} allowed"
            self._add(key, metric, unit, (value, value, value), "failed", error)

    def skipped(self, key: Key, metric: str, unit: str, why: str) -> None:
        self._add(key, metric, unit, UNKNOWN, "skipped", why)

    @contextmanager
    def keeping(self, key: Key, metric: str, unit: str = "") -> Iterator[None]:
        """An exception becomes a row, and the run goes on. Ctrl-C is none."""
        try:
            yield
        except Exception as error:
            self._add(key, metric, unit, UNKNOWN, "failed", f"{type(error).__name__}: {error}"[:2000])

    @property
    def failures(self) -> int:
        return sum(row.status == "failed" for row in self._rows.values())
