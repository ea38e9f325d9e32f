"""The CSV that every benchmark writes: its columns, where a row was measured, and how rows get into a file."""

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

    A percentile that is not known is NaN, and empty in the file. status: ok (measured), failed or skipped (error says
    why), or how else the figure was got: interpreted, compiled, planned, or stubbed, which is measured on a CPU under a
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
        return Key(self.case, self.provider, self.mode, self.dtype, self.layout, self.batch)

    @property
    def where(self) -> tuple[str, str, str, str]:
        """As `environment` says it."""
        return self.device, self.torch, self.triton, self.commit


COLUMNS = tuple(field.name for field in fields(Row))


def record(row: Row) -> dict[str, Any]:
    """The row for a file or for JSON, which has no NaN and no infinity."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(row).items()
    }


def write(path: Path, rows: Iterable[Row]) -> None:
    """All rows, in the place of what the file held."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(record, rows))


class Log:
    """A CSV file that grows row by row: whenever the run ends, what was measured so far is on the disk.

    Many processes may append to one file: a row is written at once. A last line that a crash has cut short is taken
    out, for nothing could read a file with such a line in its middle. earlier: the rows that the file held when it was
    opened.

    Raises: ValueError, where the file is there already and has other columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # A cut may go through a character, too.
        self._file = path.open("a+", newline="", encoding="utf-8", errors="surrogateescape")
        try:
            with locked(self._file):  # or two processes would write a header each
                self._file.seek(0)
                text = self._file.read()
                self.earlier, complete = _rows(text, path)
                if not text:
                    self._write(dict(zip(COLUMNS, COLUMNS, strict=True)))
                elif not complete.endswith("\n"):
                    self._file.write("\n")
                    self._file.flush()
                elif complete != text:
                    self._file.truncate(len(complete.encode("utf-8", "surrogateescape")))
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Row) -> None:
        with locked(self._file):  # so that who opens the file meanwhile takes no row for one that was cut short
            self._write(record(row))

    def _write(self, values: dict[str, Any]) -> None:
        line = io.StringIO()
        csv.DictWriter(line, COLUMNS, lineterminator="\n").writerow(values)
        self._file.write(line.getvalue())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _rows(text: str, path: Path) -> tuple[list[Row], str]:
    """The rows of a file's text, without those that are no measurement; and the text without a last line that is cut
    short. One that lacks nothing but its end is kept."""
    if not text:
        return [], text
    try:
        if tuple(next(_lines(text))) != COLUMNS:
            raise ValueError(f"{path} has other columns than {', '.join(COLUMNS)}")
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    complete = text
    while complete and (not complete.endswith("\n") or complete.count('"') % 2):  # a line may end within quotes
        complete = complete[: complete.rfind("\n", 0, -1) + 1]
    last = text[len(complete) :]
    if last.count('"') % 2 == 0 and len(next(_lines(last), [])) == len(COLUMNS):
        complete = text
    found = []
    for line in _lines(complete):
        if len(line) == len(COLUMNS):
            try:
                found.append(Row(*[_TYPES[name](cell) for name, cell in zip(COLUMNS, line, strict=True)]))
            except ValueError:
                continue
    return found, complete


def _lines(text: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""))


def _number(cell: str) -> float:
    return float(cell) if cell else math.nan


_TYPES: dict[str, Any] = dict.fromkeys(COLUMNS, str) | dict.fromkeys(("p50", "p20", "p80"), _number) | {"batch": int}


def to_json(rows: Iterable[Row], **more: Any) -> str:
    return json.dumps(more | {"rows": [record(row) for row in rows]}, allow_nan=False)


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The median, then the 20th and the 80th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), _rank(ordered, 0.2), _rank(ordered, 0.8)


def _rank(ordered: list[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def environment(device: str) -> tuple[str, str, str, str]:
    """The last columns of a row: device, torch, triton, commit."""
    import torch

    return device, torch.__version__, package_version("triton"), commit()


def processor() -> str:
    """The name of the CPU, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
