"""Made-up rows of the benchmark."""

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from triton_convbn.perf.frame import read
from triton_convbn.perf.results import Row, append, start

UNITS = {
    "time": "ms",
    "time_min": "ms",
    "compile_time": "s",
    "saved_for_backward": "bytes",
    "peak_memory": "bytes",
    "pairs_folded": "pairs",
    "launches_forward": "launches",
}


def row(metric: str, *figures: float, **columns: Any) -> Row:
    """Return a row of ResNet-50's training step: p50, p20 and p80 as given, or one figure for all three."""
    p50, p20, p80 = figures if len(figures) == 3 else figures * 3
    case = {"case": "resnet50", "provider": "triton_convbn", "mode": "train", "dtype": "float32"}
    rest = {"layout": "contiguous", "batch": 8, "status": "ok", "error": ""}
    where = {"device": "a CPU", "torch": "2.14.1", "triton": "3.8.0", "commit": "c0ffee0"}
    known = {"metric": metric, "unit": UNITS.get(metric, "1"), "p50": p50, "p20": p20, "p80": p80}
    return Row(**{**case, **rest, **where, **known, **columns})


def failed(metric: str, error: str = "RuntimeError: boom", **columns: Any) -> Row:
    return row(metric, math.nan, **{"status": "failed", "error": error, **columns})


def planned(metric: str, figure: float, **columns: Any) -> Row:
    return row(metric, figure, **{"status": "planned", "device": "NVIDIA H100 (planned)", **columns})


def ratio(value: float, low: float, high: float, spread: float = 0.0, **columns: Any) -> list[Row]:
    """Return a paired ratio, the confidence interval of its median, with `spread` around the median."""
    figures = {"": (value, value - spread, value + spread), "_low": (low,), "_high": (high,)}
    return [row(f"time_over_inductor{end}", *values, **columns) for end, values in figures.items()]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of these rows."""
    path.unlink(missing_ok=True)
    start(path)
    for each in rows:
        append(path, each)


def frame(*rows: Row) -> pd.DataFrame:
    """Return the rows as `read` returns them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        write(path, rows)
        return read([path])
