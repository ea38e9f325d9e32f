"""Compare two CSVs of the benchmark, one from before a change and one from after it."""

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
from .labels import RATIO, label, number, scale

TOLERANCE = 0.05
"""The share by which a time may change and still be the same."""

COUNT_TOLERANCE = 0.005
ERROR_FACTOR = 2.0
SMALLEST_ERROR = 1e-15
"""The least that an error counts as: fp64 rounds by about that much, and zero has no factor."""

COLUMNS = (*KEY, "kind", "device", "unit", "before", "after", "change", "verdict", "why")
VERDICTS = ("regression", "improvement", "same", "missing", "new")
_JOIN = (*KEY, "kind", "device")
_FIGURES = {"us": "timing", "ms": "timing", "s": "timing", "bytes": "count", "launches": "count", "pairs": "count"}

Cells = dict[str, Any]
Rows = dict[tuple[Any, ...], Cells]


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

    Raises: UsageError if the tolerance is not a finite share.
    """
    if not 0 <= tolerance < math.inf:
        raise UsageError(f"a tolerance of {tolerance} is no share such as {TOLERANCE}")
    before, after = before.copy(), after.copy()
    for kind in set(before["kind"]) & set(after["kind"]):  # ignore the device of a kind without a common one
        if not _devices(before, kind) & _devices(after, kind):
            for side in (before, after):
                side.loc[side["kind"] == kind, "device"] = ""
    old, new = _by_key(before), _by_key(after)
    lost, recovered = _failures(old, new), _failures(new, old)
    found = []
    for key in dict.fromkeys((*old, *new)):
        one, two = old.get(key), new.get(key)
        unit = next((side["unit"] for side in (one, two) if side and side["unit"]), "")  # a failure may have none
        how = _how(key[len(LINE)], unit)
        if key in lost:
            verdict, why = "regression", f"failed: {lost[key]}"
        elif key in recovered:
            verdict, why = "improvement", f"failed before: {recovered[key]}"
        elif not how:
            continue
        elif one is None or two is None:
            verdict, why = ("new", "only after") if one is None else ("missing", "only before")
        elif math.isnan(two["p50"]):
            verdict, why = ("same" if math.isnan(one["p50"]) else "missing"), f"{two['status']}: {two['error']}"
        elif math.isnan(one["p50"]):
            verdict, why = "new", f"{one['status']} before"
        else:
            worse, better = (two, one) if unit == "pairs" else (one, two), (one, two) if unit == "pairs" else (two, one)
            verdict = "regression" if _grew(how, *worse, tolerance) else "same"
            verdict = "improvement" if _grew(how, *better, tolerance) else verdict
            why = ""
        figures = [math.nan if side is None else side["p50"] for side in (one, two)]
        change = figures[1] / figures[0] if figures[0] else math.nan
        found.append((*key, unit, *figures, change, verdict, why))
    return pd.DataFrame(found, columns=list(COLUMNS))


def report(before: Path, after: Path, tolerance: float, json_: bool, console: Console) -> int:
    """Print what `compare` finds in two files, as a table or as one JSON object, and return the exit code.

    Returns: 1 if there is a regression, else 0. A missing key is counted and is no regression.

    Raises: UsageError for files that cannot be read or have no key in common.
    """
    one, two = read([before]), read([after])
    result, note = compare(one, two, tolerance), _differences(one, two)
    counts = Counter(result["verdict"])
    same = counts["same"] + counts["regression"] + counts["improvement"]
    if not same:
        raise UsageError(f"{before} and {after} have no figure in common")
    shown = result[result["verdict"].isin(("regression", "improvement", "missing"))]
    if json_:
        rows = shown.astype(object).where(shown.notna() & (shown != math.inf), None).to_dict("records")
        summary: dict[str, Any] = {verdict: counts[verdict] for verdict in VERDICTS}
        text = json.dumps({**summary, "tolerance": tolerance, "note": note, "rows": rows}, allow_nan=False)
        print(text, file=console.file)
        return int(counts["regression"] > 0)
    if len(shown):
        console.print(_table(shown, escape(f"{before} and {after}")))
    if note:
        console.print(note, markup=False, soft_wrap=True)
    console.print(
        f"{same} compared: {counts['regression']} worse, {counts['improvement']} better;"
        f" {counts['missing']} missing after, {counts['new']} new",
        soft_wrap=True,
    )
    return int(counts["regression"] > 0)


def _devices(frame: pd.DataFrame, kind: str) -> set[str]:
    return set(frame.loc[frame["kind"] == kind, "device"])


def _by_key(frame: pd.DataFrame) -> Rows:
    return {tuple(row[column] for column in _JOIN): row for row in latest(frame, ("device",)).to_dict("records")}


def _failures(before: Rows, after: Rows) -> dict[tuple[Any, ...], str]:
    """Return the keys that fail after, with their errors, of runs that have lost a number.

    A run that fails as a whole has one row, of a metric that it did not have before.
    """

    def failed(rows: Rows, key: tuple[Any, ...]) -> bool:
        return key in rows and rows[key]["status"] == "failed"

    def line(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*key[: len(LINE)], *key[len(KEY) :])

    numbers = [key for key, row in before.items() if row["status"] not in ("failed", "skipped")]
    gone = {line(key) for key in numbers if key not in after or failed(after, key)}
    keys = [key for key in after if failed(after, key) and not failed(before, key) and line(key) in gone]
    return {key: after[key]["error"] for key in keys}


def _how(metric: str, unit: str) -> str:
    """Return how to judge a figure; empty if no direction is better, or for a minimum, which has no spread."""
    if metric.endswith("_error"):
        return "error"
    if metric.startswith(RATIO):
        return "timing"
    return "" if metric == "time_min" else _FIGURES.get(unit, "")


def _grew(how: str, before: Cells, after: Cells, tolerance: float) -> bool:
    one, two = before["p50"], after["p50"]
    if how == "error":
        return bool(max(two, SMALLEST_ERROR) > ERROR_FACTOR * max(one, SMALLEST_ERROR))
    if how == "count":
        return bool(two > one * (1 + COUNT_TOLERANCE))
    # A comparison with NaN is false: unknown bounds do not overlap.
    overlap = after["p20"] <= before["p80"] or after["low"] <= before["high"]
    return bool(two > one * (1 + tolerance) and not overlap)


def _differences(before: pd.DataFrame, after: pd.DataFrame) -> str:
    """Return one sentence if the two come from different devices or versions."""
    found = []
    for column in ("device", "torch", "triton"):
        one, two = (" and ".join(sorted({text or "none" for text in side[column]})) for side in (before, after))
        if one != two:
            found.append(f"{column} {one} before, {two} after")
    return f"Compared across environments: {'; '.join(found)}." if found else ""


def _table(rows: pd.DataFrame, title: str) -> Table:
    table = Table(title=title)
    for column in ("", "what", "metric", "before", "after", "change", "why"):
        justify = "right" if column in ("before", "after", "change") else "left"
        table.add_column(column, overflow="fold", justify=justify)  # type: ignore[arg-type]
    for row in rows.sort_values("verdict", key=lambda c: c.map(VERDICTS.index), kind="stable").to_dict("records"):
        values = [row["before"], row["after"]]
        divisor, unit = scale(pd.DataFrame({"p50": values, "unit": row["unit"]}))
        figures = ["" if math.isnan(value) else f"{number(value / divisor)} {unit}".strip() for value in values]
        change = "" if math.isnan(row["change"]) else f"x {row['change']:.3g}"
        what = " ".join(str(row[column]) for column in LINE if row[column] not in ("", 0))
        what += "" if row["kind"] == "measured" else f" ({row['kind']})"
        table.add_row(row["verdict"], escape(what), label(row["metric"]), *figures, change, escape(row["why"]))
    return table
