"""What the measuring commands share: options, a progress bar, and output as tables or JSON."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from triton_convbn.progress import errors

from .results import Row, to_json

Csv = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Append the rows to FILE.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds; an interval needs 6.")]


def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    """Iterate with a progress bar on stderr."""
    return track(items, what, console=errors, transient=True)


def print_rows(rows: Sequence[Row], as_json: bool, note: str = "", one_table: bool = True, **more: Any) -> None:
    """Print the rows as JSON with the entries of `more`, or as one table or several, with a note below."""
    if as_json:
        print(to_json(rows, **more))
        return
    from .frame import to_frame
    from .tables import SPLIT, show

    show(to_frame(rows), () if one_table else SPLIT)
    if note:
        print(note)
