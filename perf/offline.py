"""Compile the generated kernels for GPUs that need not be there, and report registers, spills and more.

    triton-convbn dev offline --csv perf/results/kernels_offline.csv

Every kernel of `kernels/offline_cases.py` is compiled for every architecture. Nothing runs on a GPU: figures are
"compiled offline", see `kernels/offline.py`.
"""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from triton_convbn.kernels.files import write_atomically
from triton_convbn.kernels.kernel_source import KernelSource
from triton_convbn.kernels.offline import ARCHS, KernelFacts, facts
from triton_convbn.kernels.offline_cases import CASES

from triton_convbn.dispatch import has_triton, interpreting
from triton_convbn.errors import UsageError, choose, usage_error_from
from triton_convbn.progress import print_table

from .command import Json, progress

COLUMNS = ["case", *(field.name for field in fields(KernelFacts)), "error"]
NUMBERS = {field.name for field in fields(KernelFacts) if str(field.type) in ("int", "float", "int | None")}
SHOWN = ["case", "arch", "registers", "spills", "load_bits", "store_bits", "instructions", "compile_seconds", "error"]

Rows = dict[tuple[str, str], dict[str, Any]]
"""The cells by column, of each case and architecture. An empty cell is None."""


def read(path: Path) -> Rows:
    """Return the rows of a file, or none if there is no file yet.

    Raises:
        UsageError: If the file cannot be read or has other columns.
    """
    if not path.exists():
        return {}
    with usage_error_from(str(path)), path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise UsageError(f"{path} has other columns than {', '.join(COLUMNS)}; give another --csv")
        try:
            rows = [{name: _value(name, cell) for name, cell in row.items()} for row in reader]
        except ValueError as error:
            raise UsageError(f"{path}: line {reader.line_num}: {error}; give another --csv") from error
    return {(row["case"], row["arch"]): row for row in rows}


def write(path: Path, rows: Rows) -> None:
    """Replace the file with all rows, in the order of the matrix. Raises: UsageError if it cannot be written."""
    places = {key: place for place, key in enumerate(product(CASES, ARCHS))}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(rows[key] for key in sorted(rows, key=lambda key: places.get(key, len(places))))
    with usage_error_from(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.getvalue().encode(), mode=0o644)


def _value(name: str, cell: str) -> Any:
    if name in NUMBERS and cell:
        return float(cell) if "." in cell else int(cell)
    return cell or None


def _cell(value: Any) -> Any:
    """Return a CSV cell: `32:24 128:14` for counts by width, `32 128` for widths."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{count}" for key, count in value.items())
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def compiled(case: str, source: KernelSource, arch: str) -> dict[str, Any]:
    """Return the row of one compilation, failed or not."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"case": case, "kernel": source.name, "arch": arch, "how": "compiled offline"}
    try:
        return row | {name: _cell(value) for name, value in asdict(facts(source, arch)).items()}
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def command(
    arch: Annotated[list[str] | None, typer.Option(help="Only these architectures; default: all.")] = None,
    case_: Annotated[list[str] | None, typer.Option("--case", help="Only these kernels; default: all.")] = None,
    csv_: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Keep the rows in FILE.")] = None,
    json_: Json = False,
) -> None:
    """Compile the generated kernels for GPUs that need not be there: registers, spills, instructions.

    A row in the file is not compiled again if it is of the same generated text and the same Triton.
    """
    wanted = list(product(choose("case", case_ or list(CASES), CASES), choose("architecture", arch or ARCHS, ARCHS)))
    if not has_triton():
        raise UsageError("compiling needs triton: pip install triton")
    if interpreting():
        raise UsageError("TRITON_INTERPRET is set, so Triton compiles nothing; unset it")
    import triton

    rows = read(csv_) if csv_ else {}
    done: Rows = {}
    try:
        for case, target in progress(wanted, "offline"):
            source, row = CASES[case](), rows.get((case, target), {})
            if (row.get("digest"), row.get("triton"), row.get("error")) != (source.digest, triton.__version__, None):
                row = rows[case, target] = compiled(case, source, target)
                if csv_:
                    write(csv_, rows)
            done[case, target] = row
    finally:  # also after Ctrl-C, which would lose them without a file
        _show(list(done.values()), json_)
    if any(row["error"] for row in done.values()):
        raise typer.Exit(1)


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the rows as one JSON object or as a table."""
    if as_json:
        print(json.dumps({"how": "compiled offline", "rows": rows}))
    elif rows:
        import pandas

        shown = [name for name in SHOWN if name != "error" or any(row["error"] for row in rows)]
        frame = pandas.DataFrame(rows, dtype=object)[shown]
        print_table(frame.rename(columns=lambda name: name.replace("_", " ")), "Compiled offline")
