"""Fill the tables of documents from the committed CSVs: python -m triton_convbn.perf.docs [--check] FILES

A document names a table between two comments, and this command replaces what is between them:

    <!-- table perf/results/cpu.csv case=resnet50 mode=train metric=time,saved_for_backward -->
    <!-- end -->

The filters are columns of the CSV, with values separated by commas; `metric` names the columns of the table. Paths are
relative to the working directory.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from .command import run_command
from .frame import read, select
from .tables import tables

BLOCK = re.compile(r"(<!-- table (\S+)((?: \S+=\S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """Return the document with the tables of its CSVs. Raises: UsageError for a filter that finds nothing."""

    def block(match: re.Match[str]) -> str:
        filters = match[3].split()
        metrics = next((each[7:].split(",") for each in filters if each.startswith("metric=")), [])
        rows = select(read([Path(match[2])]), [each for each in filters if not each.startswith("metric=")])
        return f"{match[1]}\n{tables(rows, metrics).strip()}\n\n{match[4]}"

    return BLOCK.sub(block, text)


def command(
    files: Annotated[list[Path], typer.Argument(help="Markdown files.")],
    check: Annotated[bool, typer.Option("--check", help="Write nothing, exit with 1 if a table is outdated.")] = False,
) -> None:
    """Fill the tables of Markdown files from the CSVs that they name."""
    outdated = []
    for path in files:
        text = path.read_text()
        new = fill(text)
        if new != text:
            outdated.append(str(path))
            if not check:
                path.write_text(new)
    if check and outdated:
        print(f"these files have outdated tables: {', '.join(outdated)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    run_command(command)
