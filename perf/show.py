"""What a bench found, on the terminal: a table for each setting."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .report import Report
from .table import Key


class Column(NamedTuple):
    title: str
    metric: str
    scale: float
    format: str


COLUMNS = (
    Column("pairs folded", "pairs_folded", 1, ".0f"),
    Column("output error", "output_error", 1, ".1e"),
    Column("gradient error", "gradient_error", 1, ".1e"),
    Column("MB kept for backward", "saved_for_backward", 1e-6, ".1f"),
    Column("MB at the peak", "peak_memory", 1e-6, ".1f"),
    Column("compile s", "compile_time", 1, ".1f"),
    Column("ms", "time", 1, ".1f"),
)


def show(report: Report, keys: Sequence[Key], console: Console | None = None) -> None:
    """A table for each of the keys, whose provider is empty. PackedPairs that nobody has a figure for are left out.

    Of a key that has no row nothing is shown.
    """
    console = console or stdout()
    for key in dict.fromkeys(keys):
        rows = [row for row in report.rows if row.key._replace(provider="") == key]
        providers = [
            name for name in dict.fromkeys(row.provider for row in rows if row.status != "skipped") if name != "all"
        ]
        metrics = {row.metric for row in rows if row.status != "skipped"}
        baseline = "inductor" if "inductor" in providers else "eager"
        columns = [column for column in COLUMNS if column.metric in metrics]
        if not rows:
            continue
        title = f"{key.case}, {key.mode}, {key.dtype}, {key.layout}, batch {key.batch}\n"
        title += f"measured on {rows[0].device}, torch {rows[0].torch}"
        table = Table(title=escape(title))
        table.add_column("", no_wrap=True)
        for column in columns:
            table.add_column(column.title, justify="right")
        if len(providers) > 1:
            table.add_column(f"time / {baseline}", justify="right")
        for provider in providers:
            own = key._replace(provider=provider)
            cells = [_cell(report, own, column) for column in columns]
            if len(providers) > 1:
                cells.append("1" if provider == baseline else _ratio(report, own, f"time_over_{baseline}"))
            table.add_row(provider, *cells)
        console.print(table if providers else escape(title), highlight=False, soft_wrap=not providers)
        for row in rows:
            if row.status in ("failed", "skipped"):
                console.print(f"{row.status}: {row.provider} {row.metric}: {row.error}", markup=False, soft_wrap=True)
    rounds = {
        int(row.p50) for row in report.rows if row.metric == "time_rounds" and row.key._replace(provider="") in keys
    }
    console.print(
        "Errors: against eager in fp64, relative to the largest value. A ReLU or a max-pooling that decides otherwise\n"
        "on the last bit moves a gradient by more than rounding: compare with eager's own. Memory: parameters aside.\n"
        f"Times: medians of {' or '.join(map(str, sorted(rounds))) or 'no'} rounds; ratios of paired rounds, with the"
        " 95 % interval of their median.",
        markup=False,
        highlight=False,
    )


def stdout() -> Console:
    """A file or a pipe has no width of its own, and tables are wider than the 80 columns that it is taken for."""
    console = Console()
    return console if console.is_terminal else Console(width=max(140, console.width))


def _cell(report: Report, key: Key, column: Column) -> str:
    row = report.row(key, column.metric)
    if row is None or row.p50 != row.p50:
        return "failed" if row is not None and row.status == "failed" else ""
    return f"{row.p50 * column.scale:{column.format}}" + (" !" if row.status == "failed" else "")


def _ratio(report: Report, key: Key, metric: str) -> str:
    row, low, high = (report.row(key, name) for name in (metric, f"{metric}_low", f"{metric}_high"))
    if row is None:
        return ""
    interval = f"\n{low.p50:.3f} to {high.p50:.3f}" if low and high else ""
    return f"{row.p50:.3f}{interval}"
