"""Markdown tables made from the benchmark's CSV alone."""

import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from .frame import ENVIRONMENT, LINE, check_metrics, latest
from .labels import METRICS, group, label, number, providers, scale, source

_OPTIONAL = ("time_min", "time_rounds")
"""PackedPairs only where they are asked for."""

_LONGEST = 200
"""Characters of an error; a compiler's can have thousands."""

Cells = dict[str, Any]


def tables(frame: pd.DataFrame, metrics: Sequence[str] = ()) -> str:
    """A table for each case, or network of layers, mode and dtype, as far as one environment has measured it.

    Rows are providers, columns metrics: those given, in that order, or all that there are. Bytes are in kB or MB (1000
    and 1,000,000), a ratio has the 95 % confidence interval of its median in brackets. Above a table is where it was
    measured, or that it was not; below it is why something failed or was skipped.

    Args: frame: as `frame.read` returns it. metrics: names as in the CSV.

    Raises: UsageError for a metric that no row has.
    """
    check_metrics(frame, metrics)
    frame = latest(frame)
    frame["subject"] = [f"layers of {group(case)}" if group(case) else case for case in frame["case"]]
    keys = ["kind", *ENVIRONMENT, "subject", "mode", "dtype"]
    found = [_table(rows, metrics) for _, rows in frame.groupby(keys, sort=False)]
    return "\n\n".join(text for text in found if text) + "\n"


def _table(rows: pd.DataFrame, metrics: Sequence[str]) -> str:
    shown = _columns(rows, metrics)
    if not shown:
        return ""
    cells = {(tuple(row[c] for c in LINE), row["metric"]): row for row in rows.to_dict("records")}
    # What all lines share is in the heading, what tells them apart in front.
    varies = [column for column in ("case", "layout", "batch") if rows[column].nunique() > 1]
    fixed = [str(rows[column].iloc[0]) for column in ("mode", "dtype", "layout") if column not in varies]
    batch = [f"batch {rows['batch'].iloc[0]}"] if "batch" not in varies and rows["batch"].iloc[0] else []
    subject = rows["subject" if "case" in varies else "case"].iloc[0]
    heading = ", ".join(text for text in (subject, *fixed, *batch) if text)

    scales = {metric: _scale(rows[rows["metric"] == metric]) for metric in shown}
    titles = [label(metric) + (f" ({unit})" if unit else "") for metric, (_, unit) in scales.items()]
    notes: list[str] = []
    lines = [[*varies, "provider", *titles], [":--"] * (len(varies) + 1) + ["--:"] * len(shown)]
    for line in _lines(rows):
        values = dict(zip(LINE, line, strict=True))
        # A run that failed as a whole has one row, of a metric that is none.
        whole = [row for (of, name), row in cells.items() if of == line and name not in METRICS and _lost(row)]
        default = whole[0] if whole else None
        texts = [_cell(cells.get((line, metric), default), scales[metric][0], notes) for metric in shown]
        names = [_safe(str(values[column])) for column in (*varies, "provider")]
        lines.append([*names, *texts])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    footnotes = "  \n".join(f"({index}) {_safe(note)}" for index, note in enumerate(notes, 1))
    parts = [f"### {_safe(heading)}", _safe(source(rows)) + "." + _explained(rows, shown), table, footnotes]
    return "\n\n".join(part for part in parts if part)


def _columns(rows: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """The metrics to show. One without a number that is not known here is a step that failed, and no column."""
    if metrics:
        return [metric for metric in metrics if (rows["metric"] == metric).any()]
    numbers = set(rows.loc[rows["p50"].notna(), "metric"])
    known = [metric for metric in METRICS if metric not in _OPTIONAL and (rows["metric"] == metric).any()]
    others = [m for m in dict.fromkeys(rows["metric"]) if m not in METRICS and m in numbers]
    return known + others or list(dict.fromkeys(rows["metric"]))


def _lines(rows: pd.DataFrame) -> list[tuple[Any, ...]]:
    """Cases in the order of the file, then layouts, batches and providers in theirs."""
    order = providers(rows["provider"])
    cases = list(dict.fromkeys(rows["case"]))
    found = rows[list(LINE)].drop_duplicates().to_dict("records")
    found.sort(key=lambda r: (cases.index(r["case"]), r["layout"], r["batch"], order.index(r["provider"])))
    return [tuple(row[column] for column in LINE) for row in found]


def _scale(rows: pd.DataFrame) -> tuple[float, str]:
    known = rows[rows["p50"].notna()]  # what failed early may not know its unit
    known = known if len(known) else rows
    return scale(float(known["p50"].abs().fillna(0).max()), known["unit"].iloc[0])


def _lost(row: Cells) -> bool:
    return row["status"] in ("failed", "skipped")


def _cell(row: Cells | None, divisor: float, notes: list[str]) -> str:
    if row is None:
        return ""
    if _lost(row):
        why = " ".join(row["error"].split()) or "no reason given"
        why = why if len(why) <= _LONGEST else why[: _LONGEST - 4] + " ..."
        if why not in notes:
            notes.append(why)
        return f"{row['status']} ({notes.index(why) + 1})"
    if row["metric"].endswith("_error"):
        return f"{row['p50']:.1e}"
    if row["metric"].startswith("time_over_"):
        interval = "" if math.isnan(row["low"] + row["high"]) else f" ({row['low']:.3f} to {row['high']:.3f})"
        return f"{row['p50']:.3f}{interval}"
    return number(row["p50"] / divisor)


def _explained(rows: pd.DataFrame, shown: Sequence[str]) -> str:
    """What the figures are, where a column needs it."""
    found = []
    times = [metric for metric in shown if metric == "time" or metric.startswith("time_over_")]
    count = rows.loc[rows["metric"] == "time_rounds", "p50"].dropna()
    if times:
        low, high = (number(count.min()), number(count.max())) if len(count) else ("", "")
        of = f" of {low if low == high else f'{low} to {high}'} rounds" if len(count) else ""
        found.append(f"Times are medians{of}.")
    if rows.loc[rows["metric"].isin(times), "low"].notna().any():
        found.append("In brackets: the 95 % confidence interval of a ratio's median.")
    if any(metric.endswith("_error") for metric in shown):
        found.append("Errors: against fp64, relative to the largest value.")
    return " " + " ".join(found) if found else ""


def _safe(text: str) -> str:
    """Text that Markdown shows as it is. An underscore inside a word is one already."""
    return re.sub(r"[\\`*\[\]<>|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)
