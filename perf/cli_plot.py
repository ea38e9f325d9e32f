"""`triton-convbn plot`: plots, or Markdown tables, from the CSV files that the benchmark wrote."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from triton_convbn.errors import UsageError


class Format(StrEnum):
    PNG = "png"
    SVG = "svg"


OUT = Path("out")


def plot(
    files: Annotated[list[Path], typer.Argument(metavar="CSV", help="What `triton-convbn bench` wrote.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the plots go; default out.")] = None,
    format_: Annotated[list[Format] | None, typer.Option("--format", help="Can be repeated; default both.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables on stdout instead of plots.")] = False,
    metric: Annotated[
        list[str] | None, typer.Option(help="A metric as in the CSV; can be repeated; default the main ones.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="The files that were written as one JSON object.")] = False,
) -> None:
    """Draw what the benchmark measured, or print it as Markdown tables. Plots of an earlier call are replaced."""
    if markdown and (out or format_ or json_):
        raise UsageError("--markdown prints tables and writes no file: leave out --out, --format and --json")
    from .frame import read

    frame = read(files)
    if markdown:
        from .markdown import tables

        print(tables(frame, metric or ()), end="")
        return
    from .plot import plots

    written = [str(path) for path in plots(frame, out or OUT, format_ or list(Format), metric or ())]
    print(json.dumps({"files": written}) if json_ else "\n".join(written))
