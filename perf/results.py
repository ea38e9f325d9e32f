"""Rows of a benchmark, the CSV that they are appended to, and the report that collects them.

A row is one line of the file, and is written as soon as it is known. Needs neither pandas nor torch.
"""

import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from triton_convbn.kernels.files import append_line, locked

from triton_convbn.errors import UsageError, usage_error_from

from .environment import environment

OTHER_KINDS = ("planned", "interpreted", "compiled", "stubbed")
STATUSES = ("ok", "failed", "skipped", *OTHER_KINDS)

PROVIDER_ORDER = (
    *("eager", "eager_folded", "frozen_bn"),
    *("inductor", "inductor_efficient_conv_bn", "inductor_freezing"),
    *("inductor_reduce_overhead", "inductor_efficient_conv_bn_reduce_overhead"),
    *("triton_convbn", "triton_convbn_always", "triton_convbn_keep", "triton_convbn_freezing"),
    *("triton_convbn_reduce_overhead", "triton_convbn_eager"),
    *("merged_once", "inductor_merged_once"),
)
"""Names in the order of every table and legend; unknown ones follow."""

Quantiles = tuple[float, float, float]
"""The median, the 20th and the 80th percentile."""


class Key(NamedTuple):
    """What was measured: the first columns of a row."""

    case: str
    provider: str = "triton_convbn"
    mode: str = ""
    dtype: str = ""
    layout: str = "contiguous"
    batch: int = 0


class Row(NamedTuple):
    """One measurement: the columns of a `Key`, the figure, and where it was measured.

    An unknown percentile is NaN, and empty in the file. `status` is ok (measured), failed or skipped (`error` says
    why), or another way to get a figure: interpreted, compiled, planned, or stubbed, which is measured on a CPU under a
    driver that does nothing.
    """

    case: str
    provider: str
    mode: str
    dtype: str
    layout: str
    batch: int
    metric: str
    unit: str
    p50: float
    p20: float
    p80: float
    status: str
    error: str
    device: str
    torch: str
    triton: str
    commit: str

    @property
    def key(self) -> Key:
        return Key(*self[:6])

    def record(self) -> dict[str, Any]:
        """Return the columns by name. NaN and infinity are None, because JSON has neither."""
        values = self._asdict().items()
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values}


COLUMNS = Row._fields


def to_json(rows: Iterable[Row], **more: Any) -> str:
    """Return one JSON object with the rows and the entries of `more`."""
    return json.dumps(more | {"rows": [row.record() for row in rows]}, allow_nan=False)


def percentiles(values: Sequence[float]) -> Quantiles:
    """Return the median, the 20th and the 80th percentile."""
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return statistics.median(ordered), low, high


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file. A line that is no row, as a crash leaves it, is left out with a message on stderr.

    Raises:
        UsageError: If the file cannot be read, or has other columns.
    """
    with usage_error_from(str(path)):
        header, *lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    if header != ",".join(COLUMNS):
        raise UsageError(f"{path} has other columns than {', '.join(COLUMNS)}")
    rows: list[Row] = []
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        try:
            cells = next(csv.reader([line]))
            if len(cells) != len(COLUMNS):
                raise ValueError(f"{len(cells)} columns, not {len(COLUMNS)}")
            p50, p20, p80 = (float(cell or "nan") for cell in cells[8:11])
            row = Row(*cells)._replace(batch=int(cells[5]), p50=p50, p20=p20, p80=p80)  # type: ignore[arg-type]
            if row.status not in STATUSES:
                raise ValueError(f"unknown status {row.status!r}; known are {', '.join(STATUSES)}")
            rows.append(row)
        except (ValueError, csv.Error) as error:
            print(f"triton-convbn: {path}: line {number} is left out: {error}", file=sys.stderr)
    return rows


def start(path: Path) -> list[Row]:
    """Return the rows of a file that rows are appended to. A new one gets a header.

    Raises:
        UsageError: If the file cannot be written, or has other columns.
    """
    with usage_error_from(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file, locked(file):  # two processes must not both write a header
            if path.stat().st_size:
                return read_rows(path)
            file.write(",".join(COLUMNS).encode() + b"\n")
    return []


def append(path: Path, row: Row) -> None:
    """Append a row, on a line of its own even if a crash has cut the last one short. Several processes may do so."""
    line = io.StringIO()
    row = row._replace(error=" ".join(row.error.split()))  # a row is one line
    csv.writer(line, lineterminator="").writerow(row.record().values())
    append_line(path, line.getvalue().encode())


class Report:
    """Collect every figure and every failure as a row, and append each to a file as soon as it is known.

    A row that is already there is not written again, unless what was measured before has failed now.

    Args:
        path: The file, or None.
        device: The name of the device, for the rows.
        status: The status of a figure, see `Row`.
        say: Called with what is being done.
        resume: Count rows that the file held before, if device, versions and commit are the same.

    Raises:
        UsageError: As `start` does.
    """

    def __init__(
        self,
        path: Path | None,
        device: str,
        status: str = "ok",
        say: Callable[[str], None] = lambda _text: None,
        resume: bool = False,
    ) -> None:
        self.device, self.say = device, say
        self._path, self._status = path, status
        self._where = environment(device)
        earlier = [] if path is None else start(path)
        self._rows = {(row.key, row.metric): row for row in earlier if resume and row[13:] == self._where}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    @property
    def failures(self) -> int:
        return sum(row.status == "failed" for row in self.rows)

    def row(self, key: Key, metric: str) -> Row | None:
        return self._rows.get((key, metric))

    def measured(self, key: Key, metric: str, unit: str, values: Quantiles | float) -> None:
        """Add a figure, with its percentiles or the same for all three."""
        self._add(key, metric, unit, values, self._status, "")

    def checked(self, key: Key, metric: str, unit: str, value: float, limit: float, what: str = "") -> None:
        """Add a figure that fails above `limit`. NaN and infinity always fail."""
        if value <= limit and value < math.inf:
            self.measured(key, metric, unit, value)
        else:
            error = f"{what}{': ' if what else ''}{value:.4g} {unit}, {limit:.4g} allowed"
            self._add(key, metric, unit, value, "failed", error)

    def skipped(self, key: Key, metric: str, unit: str, why: str) -> None:
        self._add(key, metric, unit, math.nan, "skipped", why)

    def failed(self, key: Key, metric: str, unit: str, error: str | Exception) -> None:
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self._add(key, metric, unit, math.nan, "failed", text[:2000])

    @contextmanager
    def keeping(self, key: Key, metric: str, unit: str = "") -> Iterator[None]:
        """Turn an exception inside the block into a failed row. Ctrl-C is not caught."""
        try:
            yield
        except Exception as error:
            self.failed(key, metric, unit, error)

    def _add(self, key: Key, metric: str, unit: str, values: Quantiles | float, status: str, error: str) -> None:
        before = self.row(key, metric)
        if before is not None and (before.status == "failed" or status != "failed"):
            return
        values = values if isinstance(values, tuple) else (values, values, values)
        row = Row(*key, metric, unit, *values, status, " ".join(error.split()), *self._where)
        self._rows[key, metric] = row
        if self._path is not None:
            append(self._path, row)
        if status == "failed":
            self.say(f"failed: {' '.join(filter(None, map(str, key)))} {metric}: {row.error[:200]}")
