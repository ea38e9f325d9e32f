"""Compare two CSVs of the benchmark, one from before a change and one from after it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from triton_convbn.errors import UsageError
from triton_convbn.progress import print_table

from .frame import ENVIRONMENT, KEY, LINE, LOST, RATIO, label, latest, number, read, scale

TOLERANCE = 0.05
"""The share by which a time may change and still be the same."""

COUNT_TOLERANCE = 0.005
ERROR_FACTOR = 2.0
SMALLEST_ERROR = 1e-15
"""The least that an error counts as: fp64 rounds by about that much, and zero has no factor."""

COLUMNS = [*KEY, "kind", "device", "unit", "before", "after", "change", "verdict", "why"]
VERDICTS = ("regression", "improvement", "same", "missing", "new")
_RUN = [*LINE, "kind", "device"]


def compare(before: pd.DataFrame, after: pd.DataFrame, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """Return one row for each key of either frame (both as `frame.read` returns them), with a verdict and why.

    A regression or an improvement is:
    - a time that differs by more than `tolerance`, with disjoint 20 % to 80 % ranges, and for a ratio disjoint
      confidence intervals where both have one;
    - bytes, launches or pairs that differ by more than 0.5 %;
    - an error that differs by more than a factor of 2;
    - a step that ran and fails, or the other way round.

    All other figures that both frames have are the same. A missing row is only in `before`, a new one only in `after`.
    The last row of a key counts. Rows of two kinds are never compared. `before` and `after` are in `unit`, NaN without
    a number; `change` is their quotient.

    Raises:
        UsageError: If the tolerance is not a finite share.
    """
    if not 0 <= tolerance < math.inf:
        raise UsageError(f"a tolerance of {tolerance} is no share such as {TOLERANCE}")
    common = before.merge(after, on=["kind", "device"])["kind"]  # the devices of other kinds are ignored
    sides = [frame.assign(device=frame["device"].where(frame["kind"].isin(common), "")) for frame in (before, after)]
    one, two = (latest(side, ("device",)).set_index([*_RUN, "metric"]).sort_index() for side in sides)
    one, two = one.align(two, axis="index")
    one["unit"] = two["unit"] = one["unit"].replace("", np.nan).fillna(two["unit"]).fillna("")
    lost, recovered = _lost(one, two), _lost(two, one)
    cases = [
        (lost, "regression", "failed: " + two["error"]),
        (recovered, "improvement", "failed before: " + one["error"]),
        (one["status"].isna(), "new", "only after"),
        (two["status"].isna(), "missing", "only before"),
        (one["p50"].isna() & two["p50"].isna(), "same", two["status"] + ": " + two["error"]),
        (two["p50"].isna(), "missing", two["status"] + ": " + two["error"]),
        (one["p50"].isna(), "new", one["status"] + " before"),
        (_grew(one, two, tolerance), "regression", ""),
        (_grew(two, one, tolerance), "improvement", ""),
    ]
    conditions, verdicts, reasons = zip(*cases, strict=True)
    rows = pd.DataFrame({"unit": one["unit"], "before": one["p50"], "after": two["p50"]})
    rows["change"] = rows["after"] / rows["before"].replace(0, np.nan)
    rows["verdict"], rows["why"] = np.select(conditions, verdicts, "same"), np.select(conditions, reasons, "")
    # The others have no better direction, and a minimum has no spread.
    metric = rows.index.get_level_values("metric")
    judged = rows["unit"].isin(("us", "ms", "s", "bytes", "launches", "pairs")) & (metric != "time_min")
    judged |= metric.str.endswith("_error") | metric.str.startswith(RATIO) | lost | recovered
    return rows[judged].reset_index()[COLUMNS]


def _lost(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    """Return which rows fail after, of runs that have lost a number.

    A run that fails as a whole has one row, of a metric that it did not have before.
    """
    status, now = before["status"], after["status"]
    failed = now == "failed"
    gone = status.notna() & ~status.isin(LOST) & (failed | now.isna())
    return failed & (status != "failed") & gone.groupby(level=_RUN).transform("any")


def _grew(before: pd.DataFrame, after: pd.DataFrame, tolerance: float) -> pd.Series:
    """Return which figures are worse after than before: larger, or for pairs smaller."""
    unit, error = before["unit"], before.index.get_level_values("metric").str.endswith("_error")
    one, two = before["p50"].mask(unit == "pairs", after["p50"]), after["p50"].mask(unit == "pairs", before["p50"])
    # A comparison with NaN is false: unknown bounds do not overlap.
    overlap = (after["p20"] <= before["p80"]) | (after["low"] <= before["high"])
    grew = (two > one * (1 + tolerance)) & ~overlap
    grew = grew.mask(unit.isin(("bytes", "launches", "pairs")), two > one * (1 + COUNT_TOLERANCE))
    return grew.mask(error, two.clip(lower=SMALLEST_ERROR) > ERROR_FACTOR * one.clip(lower=SMALLEST_ERROR))


def report(before: Path, after: Path, tolerance: float, json_: bool) -> int:
    """Print what `compare` finds in two files, as a table or as one JSON object, and return the exit code.

    Returns: 1 if there is a regression, else 0. A missing key is counted and is no regression.

    Raises:
        UsageError: If a file cannot be read, or the files have no key in common.
    """
    frames = read([before]), read([after])
    result = compare(*frames, tolerance)
    others = []
    for column in ENVIRONMENT:
        one, two = (" and ".join(sorted({text or "none" for text in frame[column]})) for frame in frames)
        if one != two:
            others.append(f"{column} {one} before, {two} after")
    note = f"Compared across environments: {'; '.join(others)}." if others else ""
    counts = {verdict: int((result["verdict"] == verdict).sum()) for verdict in VERDICTS}
    same = counts["same"] + counts["regression"] + counts["improvement"]
    if not same:
        raise UsageError(f"{before} and {after} have no figure in common")
    shown = result[result["verdict"].isin(("regression", "improvement", "missing"))]
    shown = shown.sort_values("verdict", key=lambda column: column.map(VERDICTS.index), kind="stable")
    if json_:
        rows = shown.astype(object).where(shown.notna() & (shown != math.inf), None).to_dict("records")
        print(json.dumps({**counts, "tolerance": tolerance, "note": note, "rows": rows}, allow_nan=False))
        return int(counts["regression"] > 0)
    if len(shown):
        print_table(pd.DataFrame(map(_described, shown.to_dict("records"))), f"{before} and {after}")
    if note:
        print(note)
    print(
        f"{same} compared: {counts['regression']} worse, {counts['improvement']} better;"
        f" {counts['missing']} missing after, {counts['new']} new"
    )
    return int(counts["regression"] > 0)


def _described(row: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a row of `compare`, in words and readable units."""
    divisor, unit = scale(pd.DataFrame({"p50": [row["before"], row["after"]], "unit": row["unit"]}))
    figures = [
        "" if math.isnan(value) else f"{number(value / divisor)} {unit}".strip()
        for value in (row["before"], row["after"])
    ]
    what = " ".join(str(row[column]) for column in LINE if row[column] not in ("", 0))
    what += "" if row["kind"] == "measured" else f" ({row['kind']})"
    change = "" if math.isnan(row["change"]) else f"x {row['change']:.3g}"
    cells = (row["verdict"], what, label(row["metric"]), *figures, change, row["why"])
    return dict(zip(("", "what", "metric", "before", "after", "change", "why"), cells, strict=True))
