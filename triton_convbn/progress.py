"""What commands show: one progress bar, on stderr, and tables, on stdout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    import pandas

errors = Console(stderr=True, highlight=False)


@contextmanager
def progress(total: int, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Show a bar with the time left. Yield a function of a description and a number of steps, one by default."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=errors, transient=True, disable=quiet) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda description=None, steps=1: bar.update(task, advance=steps, description=description)


def print_table(frame: "pandas.DataFrame", title: str) -> None:
    """Print a frame on stdout. A file or a pipe gets at least 140 characters a line."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(140, console.width))
    table = Table(title=escape(title))
    for column in frame.columns:
        table.add_column(escape(column), overflow="fold")
    for row in frame.astype(object).where(frame.notna(), "").itertuples(index=False):
        table.add_row(*(escape(str(value)) for value in row))
    console.print(table)
