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

    What else both frames have is the same. A missing row is only in `before`, a new one only in `after`. The last row
    of a key counts. Rows of two kinds are never compared. `before` and `after` are in `unit`, NaN without a number;
    `change` is their quotient.

    Raises:
        UsageError: If the tolerance is not a finite share.
    """
    if not 0 <= tolerance < math.inf:
        raise UsageError(f"a tolerance of {tolerance} is no share such as {TOLERANCE}")
    common = before.merge(after, on=["kind", "device"])["kind"]  # the devices of other kinds are ignored
    sides = [frame.assign(device=frame["device"].where(frame["kind"].isin(common), "")) for frame in (before, after)]
    one, two = (latest(side, ("device",)) for side in sides)
    rows = one.merge(two, "outer", [*_RUN, "metric"], suffixes=("_before", "_after"), indicator="side")
    rows["unit"] = rows["unit_before"].replace("", np.nan).fillna(rows["unit_after"]).fillna("")
    lost, recovered = _lost(rows, "before", "after"), _lost(rows, "after", "before")
    # The others have no better direction, and a minimum has no spread.
    judged = rows["unit"].isin(("us", "ms", "s", "bytes", "launches", "pairs")) & (rows["metric"] != "time_min")
    judged |= rows["metric"].str.endswith("_error") | rows["metric"].str.startswith(RATIO) | lost | recovered
    rows, lost, recovered = rows[judged], lost[judged], recovered[judged]
    one, two = rows["p50_before"], rows["p50_after"]
    cases = [
        (lost, "regression", "failed: " + rows["error_after"]),
        (recovered, "improvement", "failed before: " + rows["error_before"]),
        (rows["side"] == "right_only", "new", "only after"),
        (rows["side"] == "left_only", "missing", "only before"),
        (one.isna() & two.isna(), "same", rows["status_after"] + ": " + rows["error_after"]),
        (two.isna(), "missing", rows["status_after"] + ": " + rows["error_after"]),
        (one.isna(), "new", rows["status_before"] + " before"),
        (_grew(rows, "before", "after", tolerance), "regression", ""),
        (_grew(rows, "after", "before", tolerance), "improvement", ""),
    ]
    conditions, verdicts, reasons = zip(*cases, strict=True)
    verdict, why = np.select(conditions, verdicts, "same"), np.select(conditions, reasons, "")
    return rows.assign(before=one, after=two, change=two / one.replace(0, np.nan), verdict=verdict, why=why)[COLUMNS]


def _lost(rows: pd.DataFrame, before: str, after: str) -> pd.Series:
    """Return which rows fail after, of runs that have lost a number.

    A run that fails as a whole has one row, of a metric that it did not have before.
    """
    status, now = rows[f"status_{before}"], rows[f"status_{after}"]
    failed = now == "failed"
    gone = status.notna() & ~status.isin(LOST) & (failed | now.isna())
    return failed & (status != "failed") & gone.groupby([rows[column] for column in _RUN]).transform("any")


def _grew(rows: pd.DataFrame, before: str, after: str, tolerance: float) -> pd.Series:
    """Return which figures are worse after than before: larger, or for pairs smaller."""
    error, pairs = rows["metric"].str.endswith("_error"), rows["unit"] == "pairs"
    one, two = rows[f"p50_{before}"], rows[f"p50_{after}"]
    one, two = one.mask(pairs, two), two.mask(pairs, one)
    # A comparison with NaN is false: unknown bounds do not overlap.
    overlap = (rows[f"p20_{after}"] <= rows[f"p80_{before}"]) | (rows[f"low_{after}"] <= rows[f"high_{before}"])
    grew = (two > one * (1 + tolerance)) & ~overlap
    grew = grew.mask(rows["unit"].isin(("bytes", "launches", "pairs")), two > one * (1 + COUNT_TOLERANCE))
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
