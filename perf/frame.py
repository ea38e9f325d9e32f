"""The benchmark's CSV as a DataFrame, and the row that counts for every key."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from triton_convbn.errors import UsageError

from .table import COLUMNS, OTHER_KINDS, Key, Row, parse, to_row

LINE = Key._fields
"""What was run: the columns that all metrics of one run share."""

KEY = (*LINE, "metric")
ENVIRONMENT = ("device", "torch", "triton")
"""The columns that tell measurements of one key apart. A later commit replaces an earlier one."""


def to_stderr(text: str) -> None:
    """Print a message of the program."""
    print(f"triton-convbn: {text}", file=sys.stderr)


def read(paths: Iterable[Path], say: Callable[[str], None] = to_stderr) -> pd.DataFrame:
    """Read the rows of all files, in their order, as `to_frame` returns them.

    A last line that an interrupted run has cut short is left out, and `say` is called with a message.

    Raises: UsageError if no file is given, or a file cannot be read, has no row, or has a line that is no row.
    """
    frames = [to_frame(_rows(Path(path), say)) for path in paths]
    if not frames:
        raise UsageError("no CSV file is given")
    return pd.concat(frames, ignore_index=True)


def to_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Return the rows with a column `kind`: measured, or one of `OTHER_KINDS`.

    Failed and skipped rows have no number, and a row without a number has failed. Never show rows of two kinds
    together.
    """
    frame = pd.DataFrame(map(asdict, rows), columns=list(COLUMNS))
    numbers = ["p50", "p20", "p80"]
    frame[numbers] = frame[numbers].astype(float).where(frame[numbers].abs() != float("inf"))
    frame["kind"] = [_kind(*row) for row in zip(frame["status"], frame["device"], strict=True)]
    lost = frame["status"].isin(("failed", "skipped"))
    no_number = frame["p50"].isna() & ~lost
    frame.loc[no_number, "error"] = "no finite number"
    frame.loc[no_number, "status"] = "failed"
    frame.loc[lost, numbers] = float("nan")  # an error above its limit fails and has a number
    return frame


def latest(frame: pd.DataFrame, where: tuple[str, ...] = ENVIRONMENT) -> pd.DataFrame:
    """Return the last row of every key, kind and environment, in the order of the first; `where` is the environment.

    The rows `<metric>_low` and `<metric>_high` become the columns `low` and `high` of the row `<metric>` of the same
    commit: the 95 % confidence interval of its median, NaN if there is none.
    """
    line = [*LINE, "kind", *where]
    frame = frame.assign(at=range(len(frame)))
    # A failure at a later commit invalidates the earlier figures of the same run, its ratios for example.
    failures = frame[frame["status"] == "failed"].drop_duplicates(line, keep="last")[[*line, "at", "commit"]]
    both = frame.merge(failures, on=line, how="left", suffixes=("", "_failed"))
    outdated = (both["at"] < both["at_failed"]) & (both["commit"] != both["commit_failed"])
    frame = frame[~outdated.to_numpy()]
    first = frame.drop_duplicates([*line, "metric"])[[*line, "metric", "at"]]
    frame = frame.drop(columns="at").drop_duplicates([*line, "metric"], keep="last")
    frame = frame.merge(first, on=[*line, "metric"]).sort_values("at", kind="stable").drop(columns="at")
    bound = frame["metric"].str.extract(r"^(?P<metric>time_over_.+)_(?P<end>low|high)$")
    rows, keys = frame[bound["end"].isna()], [*KEY, "kind", *ENVIRONMENT, "commit"]
    for end in ("low", "high"):
        side = frame[bound["end"] == end].assign(metric=bound["metric"])[[*keys, "p50"]]
        rows = rows.merge(side.rename(columns={"p50": end}), on=keys, how="left")
    return rows.reset_index(drop=True)


def check_metrics(frame: pd.DataFrame, metrics: Iterable[str]) -> None:
    """Raise UsageError for a metric that no row has."""
    known = sorted(set(frame["metric"]))
    for metric in metrics:
        if metric not in known:
            raise UsageError(f"no row has the metric {metric!r}; there are {', '.join(known)}")


def _rows(path: Path, say: Callable[[str], None]) -> list[Row]:
    try:
        # A line may be cut inside a character, and a binary file must not raise.
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
        lines, complete = parse(text, path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(str(error) if text else f"{path} is empty") from error
    if complete != text:
        say(f"{path}: the last line is cut off and left out")
    if not lines:
        raise UsageError(f"{path} holds no row")
    rows = []
    for number, cells in enumerate(lines, 2):
        try:
            rows.append(to_row(cells))
        except ValueError as error:
            raise UsageError(f"{path}: row {number} {error}") from error
    return rows


def _kind(status: str, device: str) -> str:
    """Return the kind of a row. The device decides too: a failed plan is not a failed measurement."""
    return next((kind for kind in OTHER_KINDS if status == kind or device.endswith(f"({kind})")), "measured")
