"""One progress bar for every command, on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

errors = Console(stderr=True, highlight=False)


@contextmanager
def progress(total: int, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show a bar with the time left. Yield a function that advances it by one step, described by its argument."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=errors, transient=True, disable=quiet) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda description: bar.update(task, advance=1, description=description)
