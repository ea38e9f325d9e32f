"""Plots made from the benchmark's CSV alone, with matplotlib: no window, no state, the same file for the same rows."""

import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from triton_convbn.errors import UsageError

from .drawing import RATIO, STYLE, by_batch, by_layer
from .frame import ENVIRONMENT, LINE, check_metrics, latest
from .labels import METRICS, group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
_MEMORY = ("saved_for_backward", "peak_memory")


def plots(frame: pd.DataFrame, out: Path, formats: Sequence[str] = FORMATS, metrics: Sequence[str] = ()) -> list[Path]:
    """Draw every plot that the rows give, each in the place of what its file held, and return the files.

    A whole model has each metric against the batch size: by default the ratios of times, the bytes kept for backward
    and the peak. The layers of a network have bars, by default of the ratios. Error bars are the 95 % confidence
    interval of a ratio's median, of other figures the 20 % to 80 % range.

    Args: frame: as `frame.read` returns it. formats: of FORMATS. metrics: names as in the CSV.

    Raises: UsageError where matplotlib is missing, no row has a metric, nothing is to be drawn or `out` not writable.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise UsageError("plots need matplotlib: pip install 'triton_convbn[plot]'") from error
    check_metrics(frame, metrics)
    taken: Counter[str] = Counter()
    written = []
    with style.context(["default", STYLE]):
        for name, figure in figures(latest(frame), metrics):
            taken[name] += 1  # two cases can differ in what a file name cannot hold
            name = name if taken[name] == 1 else f"{name}-{taken[name]}"
            written += [_write(figure, out / f"{name}.{ending}") for ending in formats]
    if not written:
        raise UsageError("nothing to plot: no row has a number of a metric that is drawn; --metric names another")
    return written


def figures(frame: pd.DataFrame, metrics: Sequence[str] = ()) -> Iterator[tuple[str, "Figure"]]:
    """Each plot and the name of its file; rows of two kinds or environments are never in one."""
    frame = frame.assign(group=frame["case"].map(group))
    environments = frame[["kind", *ENVIRONMENT]].drop_duplicates()
    alone = len(environments) == environments["kind"].nunique()
    for environment, rows in frame.groupby(["kind", *ENVIRONMENT], sort=False):
        kind, *where = map(str, environment)
        around = ["" if kind == "measured" else kind, *([] if alone else where)]
        for metric in metrics or [m for m in dict.fromkeys(frame["metric"]) if m.startswith(RATIO) or m in _MEMORY]:
            of = _of(rows, metric)
            models, layers = of[of["group"] == ""], of[of["group"] != ""]
            for key, part in models.groupby(["case", "mode"], sort=False):
                if part["p50"].notna().any():
                    yield _name(*around, *key, metric), by_batch(part)
            if metric in _MEMORY and not metrics:
                continue
            for key, part in layers.groupby(["group", "mode", "dtype", "layout", "batch"], sort=False):
                if part["p50"].notna().any():
                    yield _name(*around, key[0], "layers", *key[1:-1], f"batch{key[-1]}", metric), by_layer(part)


def _of(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of a metric, and those of runs that failed before they could have one: a plot says what is not in it."""
    own = rows[rows["metric"] == metric]
    whole = rows[(rows["status"] == "failed") & ~rows["metric"].isin(METRICS)]
    found = pd.concat([own, whole.assign(metric=metric, unit="")]).drop_duplicates(list(LINE))
    return found[found["provider"] != metric.removeprefix(RATIO)]


def _name(*parts: Any) -> str:
    texts = [re.sub(r"[^A-Za-z0-9._]+", "-", str(part)).strip("-.") for part in parts]
    return "-".join(text for text in texts if text)


def _write(figure: "Figure", path: Path) -> Path:
    """At once or not at all: a reader never sees half a file. Neither the date nor a version is in it."""
    buffer = io.BytesIO()
    metadata = {"Software": None} if path.suffix == ".png" else {"Date": None, "Creator": None}
    figure.savefig(buffer, format=path.suffix[1:], metadata=metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(buffer.getvalue())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    return path
