"""Fill the tables of documents from the committed CSVs: python -m triton_convbn.perf.docs [--check] FILES"""

from pathlib import Path
from typing import Annotated

import typer

from .steps import run_command
from .tables import fill


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
