"""Two CSVs of the benchmark, one before a change and one after it: what became worse, and what better."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from triton_convbn.errors import UsageError

from .frame import KEY, LINE, latest, read
from .labels import label, number, scale

TOLERANCE = 0.05
"""By what part a timing may change before it is worse or better."""

COUNT_TOLERANCE = 0.005
ERROR_FACTOR = 2.0
SMALLEST_ERROR = 1e-15
"""What an error counts as at least: of nothing there is no factor, and fp64 rounds by about that much."""

COLUMNS = (*KEY, "kind", "device", "unit", "before", "after", "change", "verdict", "why")
VERDICTS = ("regression", "improvement", "same", "missing", "new")
_JOIN = (*KEY, "kind", "device")
_FIGURES = {"us": "timing", "ms": "timing", "s": "timing", "bytes": "count", "launches": "count", "pairs": "count"}

Cells = dict[str, Any]


def compare(before: pd.DataFrame, after: pd.DataFrame, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """One row for each key of either frame (both as `frame.read` returns them), with a verdict and why.

    regression, improvement: a timing that differs by more than `tolerance` and of which the 20 % to 80 % spreads do not
        overlap, of a ratio not the confidence intervals either, where there are any; bytes, launches and pairs by more
        than 0.5 %; an error by more than a factor of 2; what ran and fails, or the other way round.
    same: everything else that is in both. missing, new: only before, only after.

    Of a key that a frame holds several times the last row counts. A planned row is compared with a planned one, never
    with a measured one. `before` and `after` are in `unit`, NaN where there is no number; `change` is their quotient.

    Raises: UsageError for a tolerance that is no part.
    """
    if not 0 <= tolerance < math.inf:
        raise UsageError(f"a tolerance of {tolerance} is no part such as {TOLERANCE}")
    old, new = (_by_key(side) for side in _on_same_devices(before, after))
    lost, recovered = _failures(old, new), _failures(new, old)
    found = []
    for key in dict.fromkeys((*old, *new)):
        one, two = old.get(key), new.get(key)
        unit = next((side["unit"] for side in (one, two) if side and side["unit"]), "")  # what failed may have none
        if key in lost:
            verdict, why = "regression", f"failed: {lost[key]}"
        elif key in recovered:
            verdict, why = "improvement", f"failed before: {recovered[key]}"
        elif not _judged(dict(zip(_JOIN, key, strict=True))["metric"], unit):
            continue
        elif one is None or two is None:
            verdict, why = ("new", "only after") if one is None else ("missing", "only before")
        elif math.isnan(one["p50"]) or math.isnan(two["p50"]):
            verdict, why = _without_number(one, two)
        else:
            verdict, why = _verdict(one, two, tolerance)
        figures = [math.nan if side is None else side["p50"] for side in (one, two)]
        change = figures[1] / figures[0] if figures[0] else math.nan
        found.append((*key, unit, *figures, change, verdict, why))
    return pd.DataFrame(found, columns=list(COLUMNS))


def differences(before: pd.DataFrame, after: pd.DataFrame) -> str:
    """One sentence where the two come from other devices or versions; empty where they do not."""
    found = []
    for column in ("device", "torch", "triton"):
        one, two = (" and ".join(sorted({text or "none" for text in side[column]})) for side in (before, after))
        if one != two:
            found.append(f"{column} {one} before, {two} after")
    return f"Compared across environments: {'; '.join(found)}." if found else ""


def report(before: Path, after: Path, tolerance: float, json_: bool, console: Console) -> int:
    """Print what `compare` finds in two files, as a table or as one JSON object, and return the exit code.

    Returns: 1 where there is a regression, else 0. A key that is missing after is counted and no regression.

    Raises: UsageError for files that cannot be read and for two that have no key in common.
    """
    one, two = read([before]), read([after])
    result, note = compare(one, two, tolerance), differences(one, two)
    counts = Counter(result["verdict"])
    if not len(result) - counts["missing"] - counts["new"]:
        raise UsageError(f"{before} and {after} have no figure in common")
    shown = result[result["verdict"].isin(("regression", "improvement", "missing"))]
    if json_:
        rows = [{k: _finite(v) for k, v in row.items()} for row in shown.to_dict("records")]
        summary: dict[str, Any] = {verdict: counts[verdict] for verdict in VERDICTS}
        text = json.dumps({**summary, "tolerance": tolerance, "note": note, "rows": rows}, allow_nan=False)
        print(text, file=console.file)
        return int(counts["regression"] > 0)
    if len(shown):
        console.print(_table(shown, escape(f"{before} and {after}")))
    if note:
        console.print(note, markup=False, soft_wrap=True)
    same = counts["same"] + counts["regression"] + counts["improvement"]
    console.print(
        f"{same} compared: {counts['regression']} worse, {counts['improvement']} better;"
        f" {counts['missing']} missing after, {counts['new']} new",
        soft_wrap=True,
    )
    return int(counts["regression"] > 0)


def _on_same_devices(before: pd.DataFrame, after: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A kind of rows for which the two have no device in common is compared without looking at the device."""
    before, after = before.copy(), after.copy()
    for kind in set(before["kind"]) & set(after["kind"]):
        devices = [set(side.loc[side["kind"] == kind, "device"]) for side in (before, after)]
        if not devices[0] & devices[1]:
            for side in (before, after):
                side.loc[side["kind"] == kind, "device"] = ""
    return before, after


def _by_key(frame: pd.DataFrame) -> dict[tuple[Any, ...], Cells]:
    return {tuple(row[column] for column in _JOIN): row for row in latest(frame, ("device",)).to_dict("records")}


def _failures(before: dict[tuple[Any, ...], Cells], after: dict[tuple[Any, ...], Cells]) -> dict[tuple[Any, ...], str]:
    """The keys that fail after, and why, of runs that gave a number before which is now gone.

    A run that fails as a whole has one row, of a metric that it did not have before.
    """

    def line(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*key[: len(LINE)], *key[len(KEY) :])

    gone = {
        line(key)
        for key, row in before.items()
        if row["status"] not in ("failed", "skipped") and (key not in after or after[key]["status"] == "failed")
    }
    return {
        key: row["error"]
        for key, row in after.items()
        if row["status"] == "failed" and line(key) in gone and (key not in before or before[key]["status"] != "failed")
    }


def _without_number(before: Cells, after: Cells) -> tuple[str, str]:
    """One of the two was skipped, or both failed."""
    if not math.isnan(before["p50"]):
        return "missing", f"{after['status']}: {after['error']}"
    return ("same", after["status"]) if math.isnan(after["p50"]) else ("new", f"{before['status']} before")


def _judged(metric: str, unit: str) -> str:
    """What kind of figure it is; empty where neither direction is better, or a minimum, which has no spread."""
    if metric.endswith("_error"):
        return "error"
    if metric.startswith("time_over_"):
        return "timing"
    return "" if metric == "time_min" else _FIGURES.get(unit, "")


def _verdict(before: Cells, after: Cells, tolerance: float) -> tuple[str, str]:
    how = _judged(before["metric"], before["unit"])
    if before["unit"] == "pairs":
        before, after = after, before  # to fold fewer is worse
    if _worse(how, before, after, tolerance):
        return "regression", ""
    if _worse(how, after, before, tolerance):
        return "improvement", ""
    return "same", ""


def _worse(how: str, before: Cells, after: Cells, tolerance: float) -> bool:
    one, two = before["p50"], after["p50"]
    if how == "error":
        return bool(max(two, SMALLEST_ERROR) > ERROR_FACTOR * max(one, SMALLEST_ERROR))
    if how == "count":
        return bool(two > one * (1 + COUNT_TOLERANCE))
    # A comparison with NaN is false: bounds that are not known do not overlap.
    overlap = after["p20"] <= before["p80"] or after["low"] <= before["high"]
    return bool(two > one * (1 + tolerance) and not overlap)


def _table(rows: pd.DataFrame, title: str) -> Table:
    table = Table(title=title)
    for column in ("", "what", "metric", "before", "after", "change", "why"):
        table.add_column(column, overflow="fold")
    for figure in table.columns[3:6]:
        figure.justify = "right"
    for row in rows.sort_values("verdict", key=lambda c: c.map(VERDICTS.index), kind="stable").to_dict("records"):
        known = [value for value in (row["before"], row["after"]) if not math.isnan(value)]
        divisor, unit = scale(max(known, default=0.0), row["unit"])
        figures = [
            "" if math.isnan(value) else f"{number(value / divisor)} {unit}".strip()
            for value in (row["before"], row["after"])
        ]
        change = "" if math.isnan(row["change"]) else f"x {row['change']:.3g}"
        what, metric, why = (escape(text) for text in (_what(row), label(row["metric"]), row["why"]))
        table.add_row(row["verdict"], what, metric, *figures, change, why)
    return table


def _what(row: Cells) -> str:
    words = [str(row[column]) for column in LINE if row[column] not in ("", 0)]
    return " ".join(words if row["kind"] == "measured" else [*words, f"({row['kind']})"])


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
