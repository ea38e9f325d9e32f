"""Markdown tables of the benchmark's rows: for the terminal, for README and for the docs."""

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.markdown import Markdown

from triton_convbn.errors import choose, usage_error_from

from .frame import ENVIRONMENT, LINE, LOST, METRICS, RATIO, label, latest, number, providers, read, scale, source

ON_REQUEST = ("time_min", "time_rounds")
SPLIT = ("subject", "mode", "dtype")
TIMES = ("s", "ms", "us")
DASH = "-"
"""In place of a time that other times of its column cannot be compared with."""

BLOCK = re.compile(r"(<!-- table (\S+)((?: \S+=\S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)
"""A table in a document, between two comments. What is between them is replaced:

    <!-- table perf/results/cpu.csv case=resnet50 mode=train metric=time,saved_for_backward -->
    <!-- end -->

The filters are columns of the CSV, with values separated by commas; `metric` names the columns of the table, and
`split` what each table has one value of. Paths are relative to the working directory.
"""


def show(frame: pd.DataFrame, split: Sequence[str] = SPLIT) -> None:
    """Print the tables on stdout: drawn on a terminal, as Markdown in a pipe."""
    console, text = Console(), tables(frame, split=split)
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        print(text, end="")


def tables(frame: pd.DataFrame, metrics: Sequence[str] = (), split: Sequence[str] = SPLIT) -> str:
    """Return a table for each kind and environment, and for each value of the columns `split`.

    Rows are providers, columns are metrics. Bytes are in kB or MB (1000 and 1,000,000). A ratio has the 95 % confidence
    interval of its median in brackets. The text above a table says where it was measured, the footnotes say why
    something failed or was skipped. A column of times that were measured at several commits has dashes, as the machine
    may have been slower in one run than in another. Ratios are taken within a run.

    Args:
        frame: Rows as `frame.read` returns them.
        metrics: Names as in the CSV, in the order of the columns; by default all but `ON_REQUEST`.
        split: Columns of the CSV, or "subject", which is a whole model or all layers of a network.

    Raises:
        UsageError: If no row has a metric.
    """
    choose("metric", metrics, sorted(set(frame["metric"])))
    frame = latest(frame)
    frame["subject"] = ("layers of " + frame["network"]).where(frame["network"] != "", frame["case"])
    found = [_table(rows, metrics) for _, rows in frame.groupby(["kind", *ENVIRONMENT, *split], sort=False)]
    return "\n\n".join(text for text in found if text) + "\n"


def _table(rows: pd.DataFrame, metrics: Sequence[str]) -> str:
    found = list(dict.fromkeys(rows["metric"]))
    shown = [metric for metric in metrics if metric in found]
    if not metrics:  # an unknown metric without a number is a step that failed, and not a column
        numbers = set(rows.loc[rows["p50"].notna(), "metric"])
        known = [metric for metric in METRICS if metric in found and metric not in ON_REQUEST]
        shown = known + [metric for metric in found if metric not in METRICS and metric in numbers] or found
    if not shown:
        return ""
    # The heading has what all lines share, the lines begin with what differs.
    differs = ["case", "mode", "dtype", "layout", "batch"]
    varies = [column for column in differs if rows[column].nunique() > 1]
    shared = rows.iloc[0].drop(varies)
    subject = shared.get("case", shared["subject"] if rows["subject"].nunique() == 1 else "")
    batch = f"batch {shared['batch']}" if shared.get("batch") else ""
    heading = ", ".join(filter(None, (subject, *(shared.get(name, "") for name in differs[1:4]), batch)))

    places = {"case": list(dict.fromkeys(rows["case"])), "provider": providers(rows["provider"])}
    ordered = rows.sort_values(
        [*differs, "provider"],
        key=lambda column: column.map(places[column.name].index) if column.name in places else column,
    )
    scales = {metric: scale(rows[rows["metric"] == metric]) for metric in shown}
    mixed = {metric for metric in shown if _several_commits(rows[rows["metric"] == metric])}
    notes: list[str] = []
    titles = [*varies, "provider", *(label(metric, unit) for metric, (_, unit) in scales.items())]
    lines = [titles, [":--"] * (len(varies) + 1) + ["--:"] * len(shown)]
    for _, line in ordered.groupby(list(LINE), sort=False):
        cells = {row["metric"]: row for row in line.to_dict("records")}
        # A run that failed as a whole has one row, of a metric that has no column.
        whole = next((row for name, row in cells.items() if name not in METRICS and row["status"] in LOST), None)
        texts = [_cell(cells.get(metric, whole), scales[metric][0], notes, metric in mixed) for metric in shown]
        lines.append([*(_escape(str(line[column].iloc[0])) for column in (*varies, "provider")), *texts])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    footnotes = "  \n".join(f"({index}) {_escape(note)}" for index, note in enumerate(notes, 1))
    where = source(rows[rows["metric"].isin(shown) | rows["status"].isin(LOST)])
    above = f"{_escape(where)}.{_explanation(rows, shown, mixed)}"
    parts = [f"### {_escape(heading)}", above, table, footnotes]
    return "\n\n".join(filter(None, parts))


def _several_commits(rows: pd.DataFrame) -> bool:
    """Return whether the rows of a metric are times of several commits."""
    known = rows[rows["p50"].notna() & rows["unit"].isin(TIMES)]
    return bool(known["commit"].nunique() > 1)


def _cell(row: dict[str, Any] | None, divisor: float, notes: list[str], mixed: bool) -> str:
    if row is None:
        return ""
    if row["status"] in LOST:
        why = textwrap.shorten(row["error"], 200, placeholder=" ...") or "no reason given"
        if why not in notes:
            notes.append(why)
        return f"{row['status']} ({notes.index(why) + 1})"
    if mixed:
        return DASH
    if row["metric"].endswith("_error"):
        return f"{row['p50']:.1e}"
    if row["metric"].startswith(RATIO):
        interval = "" if math.isnan(row["low"] + row["high"]) else f" ({row['low']:.3f} to {row['high']:.3f})"
        return f"{row['p50']:.3f}{interval}"
    return number(row["p50"] / divisor)


def _explanation(rows: pd.DataFrame, shown: Sequence[str], mixed: set[str]) -> str:
    """Return what the figures are, for the columns that need it."""
    text = ""
    times = [metric for metric in shown if metric == "time" or metric.startswith(RATIO)]
    if times:
        counts = rows.loc[rows["metric"] == "time_rounds", "p50"].dropna()
        rounds = " to ".join(map(number, sorted({counts.min(), counts.max()}))) if len(counts) else ""
        text += f" Times are medians of {rounds} rounds." if rounds else " Times are medians."
    if rows.loc[rows["metric"].isin(times), "low"].notna().any():
        text += " In brackets: the 95 % confidence interval of a ratio's median."
    if mixed:
        text += " A dash: times of several commits, of which only the ratios compare."
    if any(metric.endswith("_error") for metric in shown):
        text += " Errors: against fp64, relative to the largest value."
    return text


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is; an underscore inside a word needs no escape."""
    return re.sub(r"[\\`*\[\]<>|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)


def fill(text: str) -> str:
    """Return the document with the tables of its CSVs. Raises: UsageError for a filter that finds nothing."""

    def block(match: re.Match[str]) -> str:
        filters = dict(each.split("=", 1) for each in match[3].split())
        names = {"metric": "metrics", "split": "split"}
        chosen = {names[name]: filters.pop(name).split(",") for name in names if name in filters}
        rows = read([Path(match[2])], [f"{column}={values}" for column, values in filters.items()])
        return f"{match[1]}\n{tables(rows, **chosen).strip()}\n\n{match[4]}"

    return BLOCK.sub(block, text)


def fill_documents(
    files: Annotated[list[Path], typer.Argument(help="Markdown files.")],
    check: Annotated[bool, typer.Option("--check", help="Write nothing, exit with 1 if a table is outdated.")] = False,
) -> None:
    """Fill the tables of Markdown files from the CSVs that they name."""
    outdated = []
    for path in files:
        with usage_error_from(f"{path} cannot be read"):
            text = path.read_text(encoding="utf-8")
        new = fill(text)
        if new != text:
            outdated.append(str(path))
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and outdated:
        print(f"these files have outdated tables: {', '.join(outdated)}")
        raise typer.Exit(1)
