"""Puts the tables of the documents in, from the committed CSVs: python -m triton_convbn.perf.docs [--check] FILES

A document says what it wants between two comments, and what stands between them is replaced:

    <!-- table perf/results/cpu.csv case=resnet50 mode=train metric=time,saved_for_backward -->
    <!-- end -->

The filters are columns of the CSV, several values apart by commas; `metric` names the columns of the table. Paths are
relative to the working directory. With --check nothing is written, and the exit code is 1 where a table is not the one
of its CSV.
"""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from triton_convbn.errors import UsageError

from .frame import read
from .markdown import tables
from .table import COLUMNS

BLOCK = re.compile(r"(<!-- table (\S+)((?: \S+=\S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The document with its tables as their CSVs have them. Raises: UsageError for a filter that finds nothing."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{_table(Path(match[2]), match[3].split())}\n{match[4]}", text)


def _table(path: Path, filters: list[str]) -> str:
    frame = read([path])
    metrics: list[str] = []
    for each in filters:
        column, _, values = each.partition("=")
        if column not in COLUMNS:
            raise UsageError(f"no such column of a benchmark: {column}")
        wanted = values.split(",")
        if column == "metric":
            metrics = wanted
        else:
            frame = frame[frame[column].astype(str).isin(wanted)]
    if frame.empty:
        raise UsageError(f"{path} has nothing for {' '.join(filters)}")
    return tables(frame, metrics).strip() + "\n"


def main(
    files: Annotated[list[Path], typer.Argument(help="Markdown files.")],
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 where a table is old.")] = False,
) -> None:
    """Put the tables of documents in, from the committed CSVs."""
    old = []
    for path in files:
        text = path.read_text()
        new = filled(text)
        if new != text:
            old.append(str(path))
            if not check:
                path.write_text(new)
    if check and old:
        print(f"the tables are not those of their CSVs: {', '.join(old)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        print(f"docs: {error}", file=sys.stderr)
        sys.exit(2)
