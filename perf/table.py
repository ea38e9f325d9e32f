"""The CSV that every benchmark writes: its columns, and how rows get into a file and out of it."""

import csv
import io
import json
import math
import platform
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from triton_convbn.kernels.files import locked

from triton_convbn.versions import commit, package_version

OTHER_KINDS = ("planned", "interpreted", "compiled", "stubbed")
STATUSES = ("ok", "failed", "skipped", *OTHER_KINDS)


class Key(NamedTuple):
    """What was measured: the first columns of a row."""

    case: str
    provider: str = "triton_convbn"
    mode: str = ""
    dtype: str = ""
    layout: str = "contiguous"
    batch: int = 0


@dataclass(frozen=True)
class Row:
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
        """Return the columns of the row's key."""
        return Key(self.case, self.provider, self.mode, self.dtype, self.layout, self.batch)

    @property
    def where(self) -> tuple[str, str, str, str]:
        """Return the columns that `environment` returns."""
        return self.device, self.torch, self.triton, self.commit


COLUMNS = tuple(field.name for field in fields(Row))


def record(row: Row) -> dict[str, Any]:
    """Return the row for a file or for JSON, which have no NaN and no infinity."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(row).items()
    }


def to_json(rows: Iterable[Row], **more: Any) -> str:
    """Return one JSON object with the rows and the entries of `more`."""
    return json.dumps(more | {"rows": [record(row) for row in rows]}, allow_nan=False)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file by one that holds these rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(record, rows))


def parse(text: str, path: Path) -> tuple[list[list[str]], str]:
    """Split the text of a file into the cells below its header.

    Returns: the cells of every line, and the text without a last line that was cut short. A last line is kept if it
        lacks no more than its end.

    Raises: ValueError if the file is no CSV file or has other columns.
    """
    try:
        header = next(_lines(text), [])
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    if tuple(header) != COLUMNS:
        raise ValueError(f"{path} has other columns than {', '.join(COLUMNS)}")
    complete = text
    while complete and (not complete.endswith("\n") or complete.count('"') % 2):  # a quoted cell may hold a newline
        complete = complete[: complete.rfind("\n", 0, -1) + 1]
    last = text[len(complete) :]
    if last.count('"') % 2 == 0 and len(next(_lines(last), [])) == len(COLUMNS):
        complete = text
    return list(_lines(complete))[1:], complete


def to_row(cells: list[str]) -> Row:
    """Return the row of a line. Raises: ValueError if the line is no row."""
    if len(cells) != len(COLUMNS):
        raise ValueError(f"has {len(cells)} columns, not {len(COLUMNS)}")
    values: dict[str, Any] = dict(zip(COLUMNS, cells, strict=True))
    for column, convert in {"batch": int, "p50": float, "p20": float, "p80": float}.items():
        try:
            values[column] = math.nan if convert is float and not values[column] else convert(values[column])
        except ValueError:
            raise ValueError(f"has {column} {values[column]!r}, which is no number") from None
    if values["status"] not in STATUSES:
        raise ValueError(f"has the status {values['status']!r}; known are {', '.join(STATUSES)}")
    return Row(**values)


def _lines(text: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""))


class Log:
    """A CSV file that grows row by row, so that the disk holds what was measured whenever the run ends.

    Several processes may append to one file. Opening the file removes a last line that a crash has cut short, because
    the next row would be appended to it. `earlier` has the rows that the file held when it was opened.

    Raises: ValueError if the file exists and has other columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.earlier: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        # A line may be cut inside a character, which surrogates preserve.
        self._file = path.open("a+", newline="", encoding="utf-8", errors="surrogateescape")
        try:
            with locked(self._file):  # two processes must not both write a header
                self._file.seek(0)
                self._resume(self._file.read())
        except BaseException:
            self._file.close()
            raise

    def _resume(self, text: str) -> None:
        if not text:
            self._write(dict(zip(COLUMNS, COLUMNS, strict=True)))
            return
        lines, complete = parse(text, self.path)
        for cells in lines:
            try:
                self.earlier.append(to_row(cells))
            except ValueError:
                continue
        if not complete.endswith("\n"):
            self._file.write("\n")
            self._file.flush()
        elif complete != text:
            self._file.truncate(len(complete.encode("utf-8", "surrogateescape")))

    def append(self, row: Row) -> None:
        """Write the row to the file at once."""
        with locked(self._file):  # a process that opens the file now would take half a row for a cut one
            self._write(record(row))

    def _write(self, values: dict[str, Any]) -> None:
        csv.DictWriter(self._file, COLUMNS, lineterminator="\n").writerow(values)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """Return the median, the 20th and the 80th percentile."""
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return statistics.median(ordered), low, high


def environment(device: str) -> tuple[str, str, str, str]:
    """Return the last columns of a row: device, torch, triton, commit."""
    import torch

    return device, torch.__version__, package_version("triton"), commit()


def processor() -> str:
    """Return the name of the CPU, or of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
