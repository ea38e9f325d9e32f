"""The benchmark's CSV as a DataFrame: columns checked, numbers as numbers, and of every key the row that counts."""

import csv
import io
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from triton_convbn.errors import UsageError

from .table import COLUMNS

LINE = ("case", "provider", "mode", "dtype", "layout", "batch")
"""What was run: the columns that all metrics of one run share."""

KEY = (*LINE, "metric")
ENVIRONMENT = ("device", "torch", "triton")
"""What tells measurements of one key apart. The commit does not: a later one takes the place of an earlier one."""

_OTHER_KINDS = ("planned", "interpreted", "compiled", "stubbed")
STATUSES = ("ok", "failed", "skipped", *_OTHER_KINDS)
_NUMBERS = ("p50", "p20", "p80")


def to_stderr(text: str) -> None:
    print(f"triton-convbn: {text}", file=sys.stderr)


def read(paths: Iterable[Path], say: Callable[[str], None] = to_stderr) -> pd.DataFrame:
    """Every row of the files, in their order, with a column `kind`: measured, or one of `_OTHER_KINDS`.

    A row of one kind is never to be shown among those of another. What failed or was skipped has no number, and what
    has no number has failed. A last line that is cut off, as a run leaves it that was ended, is left out, and `say` is
    told.

    Raises: UsageError for a file that cannot be read, holds no row, has other columns or something else than a number
    or a known status in one of them.
    """
    frames = [_one(Path(path), say) for path in paths]
    if not frames:
        raise UsageError("no CSV file is given")
    frame = pd.concat(frames, ignore_index=True)
    frame["kind"] = [_kind(*row) for row in zip(frame["status"], frame["device"], strict=True)]
    lost = frame["status"].isin(("failed", "skipped"))
    no_number = frame["p50"].isna() & ~lost
    frame.loc[no_number, "error"] = "no finite number"
    frame.loc[no_number, "status"] = "failed"
    frame.loc[lost, list(_NUMBERS)] = float("nan")  # an error that is too large, say, fails and has a number
    return frame


def latest(frame: pd.DataFrame, where: tuple[str, ...] = ENVIRONMENT) -> pd.DataFrame:
    """The last row of every key, kind and environment, in the order of the first; `where` are the columns of that.

    The rows `<metric>_low` and `<metric>_high` become the columns `low` and `high` of the row `<metric>` of the same
    commit: the 95 % confidence interval of its median, NaN where there is none.
    """
    line = [*LINE, "kind", *where]
    frame = frame.assign(at=range(len(frame)))
    # What failed at a later commit says that the earlier figures of the same run, its ratios for one, hold no more.
    failures = frame[frame["status"] == "failed"].drop_duplicates(line, keep="last")[[*line, "at", "commit"]]
    both = frame.merge(failures, on=line, how="left", suffixes=("", "_failed"))
    outdated = (both["at"] < both["at_failed"]) & (both["commit"] != both["commit_failed"])
    frame = frame[~outdated.to_numpy()]
    first = frame.drop_duplicates([*line, "metric"])[[*line, "metric", "at"]]
    frame = frame.drop(columns="at").drop_duplicates([*line, "metric"], keep="last")
    frame = frame.merge(first, on=[*line, "metric"]).sort_values("at", kind="stable").drop(columns="at")
    return _with_intervals(frame).reset_index(drop=True)


def check_metrics(frame: pd.DataFrame, metrics: Iterable[str]) -> None:
    """Raises: UsageError for a metric that no row has."""
    known = sorted(set(frame["metric"]))
    for metric in metrics:
        if metric not in known:
            raise UsageError(f"no row has the metric {metric!r}; there are {', '.join(known)}")


def _one(path: Path, say: Callable[[str], None]) -> pd.DataFrame:
    try:
        # A cut may go through a character; a file that is no text has no such header.
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    try:
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UsageError(f"{path} is no CSV file: {error}") from error
    if not lines:
        raise UsageError(f"{path} is empty")
    header, *rows = lines
    if tuple(header) != COLUMNS:
        raise UsageError(f"{path} has other columns than {', '.join(COLUMNS)}")
    if rows and (not text.endswith("\n") or len(rows[-1]) != len(COLUMNS)):
        say(f"{path}: the last line is cut off and left out")
        rows.pop()
    if not rows:
        raise UsageError(f"{path} holds no row")
    for number, row in enumerate(rows, 2):
        if len(row) != len(COLUMNS):
            raise UsageError(f"{path}: row {number} has {len(row)} columns, not {len(COLUMNS)}")
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    for column in ("batch", *_NUMBERS):
        frame[column] = _numbers(path, frame[column], whole=column == "batch")
    for number, status in enumerate(frame["status"], 2):
        if status not in STATUSES:
            raise UsageError(f"{path}: row {number} has the status {status!r}; known are {', '.join(STATUSES)}")
    return frame


def _numbers(path: Path, texts: pd.Series, whole: bool) -> pd.Series:
    values = pd.to_numeric(texts, errors="coerce")
    wrong = values.isna() & (texts.str.lower() != "nan") & (whole | (texts != ""))
    if whole:
        wrong |= values.isna() | (values % 1 != 0)
    if wrong.any():
        number = int(wrong.to_numpy().argmax())
        raise UsageError(f"{path}: row {number + 2} has {texts.name} {texts.iloc[number]!r}, which is no number")
    return values.astype(int) if whole else values.astype(float).where(values.abs() != float("inf"))


def _kind(status: str, device: str) -> str:
    """The device decides first: what failed in a plan is no failed measurement."""
    for kind in _OTHER_KINDS:
        if status == kind or device.endswith(f"({kind})"):
            return kind
    return "measured"


def _with_intervals(frame: pd.DataFrame) -> pd.DataFrame:
    bound = frame["metric"].str.extract(r"^(?P<metric>time_over_.+)_(?P<end>low|high)$")
    rows, keys = frame[bound["end"].isna()], [*KEY, "kind", *ENVIRONMENT, "commit"]
    for end in ("low", "high"):
        side = frame[bound["end"] == end].assign(metric=bound["metric"])[[*keys, "p50"]]
        rows = rows.merge(side.rename(columns={"p50": end}), on=keys, how="left")
    return rows
