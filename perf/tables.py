"""Markdown tables made from the benchmark's rows: for the terminal, for README and for the docs.

A document names a table between two comments, and `dev docs` replaces what stands between them:

    <!-- table perf/results/cpu.csv case=resnet50 mode=train metric=time,saved_for_backward -->
    <!-- end -->

The filters are columns of the CSV, with values separated by commas; `metric` names the columns of the table. Paths are
relative to the working directory.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markdown import Markdown

from triton_convbn.errors import UsageError

from .frame import ENVIRONMENT, LINE, check_metrics, latest, read
from .labels import METRICS, RATIO, group, label, number, providers, scale, source
from .table import COLUMNS

BLOCK = re.compile(r"(<!-- table (\S+)((?: \S+=\S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)
ON_REQUEST = ("time_min", "time_rounds")
LONGEST_ERROR = 200
"""Characters of an error in a footnote; a compiler's can have thousands."""


def fill(text: str) -> str:
    """Return the document with the tables of its CSVs. Raises: UsageError for a filter that finds nothing."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{_block(Path(match[2]), match[3].split())}\n{match[4]}", text)


def show(frame: pd.DataFrame) -> None:
    """Print the tables on stdout: drawn on a terminal, as Markdown in a pipe."""
    console = Console()
    text = tables(frame)
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        print(text, end="")


def tables(frame: pd.DataFrame, metrics: Sequence[str] = ()) -> str:
    """Return a table for each model or network of layers, mode, dtype and environment.

    Rows are providers, columns are metrics. Bytes are in kB or MB (1000 and 1,000,000). A ratio has the 95 % confidence
    interval of its median in brackets. The text above a table says where it was measured, the footnotes say why
    something failed or was skipped.

    Args:
        frame: as `frame.read` returns it.
        metrics: names as in the CSV, in the order of the columns; by default all but `ON_REQUEST`.

    Raises: UsageError for a metric that no row has.
    """
    check_metrics(frame, metrics)
    frame = latest(frame)
    frame["subject"] = [f"layers of {group(case)}" if group(case) else case for case in frame["case"]]
    keys = ["kind", *ENVIRONMENT, "subject", "mode", "dtype"]
    found = [_table(rows, metrics) for _, rows in frame.groupby(keys, sort=False)]
    return "\n\n".join(text for text in found if text) + "\n"


def _block(path: Path, filters: list[str]) -> str:
    frame = read([path])
    metrics: list[str] = []
    for each in filters:
        column, _, values = each.partition("=")
        if column not in COLUMNS:
            raise UsageError(f"no such column of a benchmark: {column}")
        if column == "metric":
            metrics = values.split(",")
        else:
            frame = frame[frame[column].astype(str).isin(values.split(","))]
    if frame.empty:
        raise UsageError(f"{path} has nothing for {' '.join(filters)}")
    return tables(frame, metrics).strip() + "\n"


def _table(rows: pd.DataFrame, metrics: Sequence[str]) -> str:
    shown = _columns(rows, metrics)
    if not shown:
        return ""
    # The heading has the columns that all lines share, the lines begin with the others.
    varies = [column for column in ("case", "layout", "batch") if rows[column].nunique() > 1]
    fixed = [str(rows[column].iloc[0]) for column in ("mode", "dtype", "layout") if column not in varies]
    batch = [f"batch {rows['batch'].iloc[0]}"] if "batch" not in varies and rows["batch"].iloc[0] else []
    heading = ", ".join(filter(None, (rows["subject" if "case" in varies else "case"].iloc[0], *fixed, *batch)))

    scales = {metric: scale(rows[rows["metric"] == metric]) for metric in shown}
    notes: list[str] = []
    lines = [
        [*varies, "provider", *(label(metric, unit) for metric, (_, unit) in scales.items())],
        [":--"] * (len(varies) + 1) + ["--:"] * len(shown),
    ]
    order = {column: list(dict.fromkeys(rows[column])) for column in ("case", "provider")}
    order["provider"] = providers(order["provider"])
    place = rows[list(LINE)].assign(**{column: rows[column].map(names.index) for column, names in order.items()})
    for _, line in rows.loc[place.sort_values(["case", "layout", "batch", "provider"]).index].groupby(
        list(LINE), sort=False
    ):
        cells = {row["metric"]: row for row in line.to_dict("records")}
        # A run that failed as a whole has one row, of a metric that has no column.
        whole = next((row for name, row in cells.items() if name not in METRICS and _lost(row)), None)
        texts = [_cell(cells.get(metric, whole), scales[metric][0], notes) for metric in shown]
        lines.append([*(_escape(str(line[column].iloc[0])) for column in (*varies, "provider")), *texts])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    footnotes = "  \n".join(f"({index}) {_escape(note)}" for index, note in enumerate(notes, 1))
    parts = [f"### {_escape(heading)}", f"{_escape(source(rows))}.{_explanation(rows, shown)}", table, footnotes]
    return "\n\n".join(part for part in parts if part)


def _columns(rows: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """Return the metrics to show. An unknown one without a number is a step that failed, and not a column."""
    found = list(dict.fromkeys(rows["metric"]))
    if metrics:
        return [metric for metric in metrics if metric in found]
    numbers = set(rows.loc[rows["p50"].notna(), "metric"])
    known = [metric for metric in METRICS if metric in found and metric not in ON_REQUEST]
    return known + [metric for metric in found if metric not in METRICS and metric in numbers] or found


def _lost(row: dict[str, Any]) -> bool:
    return row["status"] in ("failed", "skipped")


def _cell(row: dict[str, Any] | None, divisor: float, notes: list[str]) -> str:
    if row is None:
        return ""
    if _lost(row):
        why = " ".join(row["error"].split()) or "no reason given"
        why = why if len(why) <= LONGEST_ERROR else why[: LONGEST_ERROR - 4] + " ..."
        if why not in notes:
            notes.append(why)
        return f"{row['status']} ({notes.index(why) + 1})"
    if row["metric"].endswith("_error"):
        return f"{row['p50']:.1e}"
    if row["metric"].startswith(RATIO):
        interval = "" if math.isnan(row["low"] + row["high"]) else f" ({row['low']:.3f} to {row['high']:.3f})"
        return f"{row['p50']:.3f}{interval}"
    return number(row["p50"] / divisor)


def _explanation(rows: pd.DataFrame, shown: Sequence[str]) -> str:
    """Return what the figures are, for the columns that need it."""
    text = ""
    times = [metric for metric in shown if metric == "time" or metric.startswith(RATIO)]
    if times:
        counts = sorted({*rows.loc[rows["metric"] == "time_rounds", "p50"].dropna()})
        rounds = " to ".join(map(number, dict.fromkeys([counts[0], counts[-1]]))) if counts else ""
        text += f" Times are medians of {rounds} rounds." if rounds else " Times are medians."
    if rows.loc[rows["metric"].isin(times), "low"].notna().any():
        text += " In brackets: the 95 % confidence interval of a ratio's median."
    if any(metric.endswith("_error") for metric in shown):
        text += " Errors: against fp64, relative to the largest value."
    return text


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is; an underscore inside a word needs no escape."""
    return re.sub(r"[\\`*\[\]<>|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)
