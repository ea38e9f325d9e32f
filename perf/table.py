"""The CSV that every benchmark writes: its columns, where a row was measured, and how rows get into a file."""

import csv
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measurement. A percentile that is not known is NaN, and empty in the file."""

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


COLUMNS = tuple(field.name for field in fields(Row))


def record(row: Row) -> dict[str, Any]:
    """The row for a file or for JSON, which has no NaN and no infinity."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(row).items()
    }


def write(path: Path, rows: Iterable[Row]) -> None:
    """All rows, in the place of what the file held."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(record, rows))


class Log:
    """A CSV file that grows row by row: whenever the run ends, what was measured so far is on the disk.

    Raises: ValueError, where the file is there already and has other columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+", newline="")
        self._file.seek(0)
        header = next(csv.reader(self._file), None)
        if header is not None and tuple(header) != COLUMNS:
            self._file.close()
            raise ValueError(f"{path} has other columns than {', '.join(COLUMNS)}")
        self._file.seek(0, os.SEEK_END)
        self._writer = csv.DictWriter(self._file, COLUMNS)
        if header is None:
            self._writer.writeheader()
            self._file.flush()

    def append(self, row: Row) -> None:
        self._writer.writerow(record(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


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


def package_version(package: str) -> str:
    """Of an installed package, under whatever name it was built; empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        pass
    try:
        return str(getattr(importlib.import_module(package), "__version__", ""))
    except ImportError:
        return ""


def commit() -> str:
    """The commit of the checkout that this file lies in; empty where it is installed as a wheel."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
