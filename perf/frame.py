"""The benchmark's CSV as a DataFrame: read files, select rows, keep the row that counts for every key."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from triton_convbn.errors import UsageError, choose

from .labels import RATIO
from .results import COLUMNS, OTHER_KINDS, Key, Row, read_rows

LINE = Key._fields
"""The columns that all metrics of one run share."""

KEY = (*LINE, "metric")
NUMBERS = ["p50", "p20", "p80"]
LOST = ("failed", "skipped")
ENVIRONMENT = ("device", "torch", "triton")
"""The columns that tell measurements of one key apart. A later commit replaces an earlier one."""


def read(paths: Iterable[Path]) -> pd.DataFrame:
    """Read the rows of all files, in their order, as `to_frame` returns them.

    Raises:
        UsageError: If a file cannot be read, or has no row.
    """
    rows: list[Row] = []
    for path in paths:
        found = read_rows(path)
        if not found:
            raise UsageError(f"{path} holds no row")
        rows += found
    return to_frame(rows)


def to_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Return the rows with a column `kind`: measured, or one of `OTHER_KINDS`.

    Failed and skipped rows have no number, and a row without a number has failed. Never show rows of two kinds
    together.
    """
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame[NUMBERS] = frame[NUMBERS].astype(float).where(frame[NUMBERS].abs() != float("inf"))
    # The device decides too: a failed plan is not a failed measurement.
    frame["kind"] = "measured"
    for kind in OTHER_KINDS:
        frame.loc[(frame["status"] == kind) | frame["device"].str.endswith(f"({kind})"), "kind"] = kind
    lost = frame["status"].isin(LOST)
    frame.loc[frame["p50"].isna() & ~lost, ["status", "error"]] = "failed", "no finite number"
    frame.loc[lost, NUMBERS] = float("nan")  # an error above its limit fails and has a number
    return frame


def select(frame: pd.DataFrame, filters: Iterable[str]) -> pd.DataFrame:
    """Return the rows that pass all filters, such as `case=resnet18,resnet50`. Raises: UsageError if there are none."""
    filters = list(filters)
    found = frame
    for each in filters:
        column, _, values = each.partition("=")
        choose("column", [column], COLUMNS)
        found = found[found[column].astype(str).isin(values.split(","))]
    if found.empty:
        raise UsageError(f"no row has {' '.join(filters)}")
    return found


def latest(frame: pd.DataFrame, where: tuple[str, ...] = ENVIRONMENT) -> pd.DataFrame:
    """Return the last row of every key, kind and environment, in the order of the first; `where` is the environment.

    The rows `<metric>_low` and `<metric>_high` become the columns `low` and `high` of the row `<metric>` of the same
    commit: the 95 % confidence interval of its median, NaN if there is none.
    """
    line = [*LINE, "kind", *where]
    frame = frame.reset_index(drop=True)
    # A failure at a later commit invalidates the earlier figures of the same run, its ratios for example.
    failures = frame.index.to_series().where(frame["status"] == "failed")
    last = failures.groupby([frame[column] for column in line]).transform("max")
    frame = frame[~((frame.index < last) & (frame["commit"] != last.map(frame["commit"])))]
    first = frame.index.to_series().groupby([frame[column] for column in (*line, "metric")]).transform("min")
    frame = frame.assign(first=first).drop_duplicates([*line, "metric"], keep="last").sort_values("first")
    bound = frame["metric"].str.extract(rf"^(?P<metric>{RATIO}.+)_(?P<end>low|high)$")
    rows, keys = frame[bound["end"].isna()].drop(columns="first"), [*KEY, "kind", *ENVIRONMENT, "commit"]
    for end in ("low", "high"):
        side = frame[bound["end"] == end].assign(metric=bound["metric"])[[*keys, "p50"]]
        rows = rows.merge(side.rename(columns={"p50": end}), on=keys, how="left")
    return rows
