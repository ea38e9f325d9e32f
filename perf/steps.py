"""Shared parts of the benchmarks that run on the CPU: a training step, the error against fp64, options and output."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from triton_convbn import ConvBNPass
from triton_convbn.errors import UsageError

from .table import Log, Row, to_json

CsvOption = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Also write the rows to this file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


class Result(NamedTuple):
    """Outputs of a model, and the gradients of its parameters by name, in fp64."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def step(
    run: Callable[[Tensor], Any],
    model: nn.Module,
    x: Tensor,
    loss_weights: Callable[[Tensor], Tensor],
    autocast: torch.dtype | None = None,
) -> Result:
    """Run forward and backward once. The loss is the sum of every output times `loss_weights(output)`."""
    model.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        outputs = [each for each in tree_leaves(run(x)) if isinstance(each, Tensor)]
    weights = map(loss_weights, outputs)
    losses = [(out.to(weight.dtype) * weight).sum() for out, weight in zip(outputs, weights, strict=True)]
    torch.stack(losses).sum().backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Result([output.detach().double() for output in outputs], gradients)


def relative_error(found: Tensor, exact: Tensor, order: float = 2.0) -> float:
    """Return the norm of the difference over the norm of the exact values."""
    norm = torch.linalg.vector_norm
    return (norm(found - exact, order) / norm(exact, order)).item()


def folded_graph(gm: fx.GraphModule, _inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Fold every pair and run the graph in eager: a backend of `torch.compile` without code generation."""
    ConvBNPass(when="always")(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm.forward


def open_log(path: Path) -> Log:
    """Open a CSV to append to. Raises: UsageError if the file cannot be read or has other columns."""
    try:
        return Log(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    """Iterate with a progress bar on stderr."""
    return track(items, what, console=Console(stderr=True), transient=True)


def print_rows(rows: Sequence[Row], as_json: bool, title: str, lines: Iterable[dict[str, str]], **more: Any) -> None:
    """Print the rows as JSON with the entries of `more`, or print `lines`, each a cell by its column, as a table."""
    if as_json:
        print(to_json(rows, **more))
        return
    table = Table(title=title)
    for line in lines:
        if not table.columns:
            for column in line:
                table.add_column(column, overflow="fold")
        table.add_row(*line.values())
    Console().print(table)


def run_command(command: Callable[..., None]) -> None:
    """Run a command from the command line. A UsageError is one line on stderr and exit code 2."""
    try:
        typer.run(command)
    except UsageError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
