"""What the pass costs while compiling: milliseconds a pair, and whether that grows with the graph.

    python -m triton_convbn.perf.pass_cost --pairs 10,100,500,1000,2000 --rounds 5

The graphs are chains of convolution, BatchNorm and ReLU, written as Dynamo writes them (torch's own functions, every
parameter a placeholder, every node with its fake tensor) but without Dynamo, which takes minutes for 2,000 pairs.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import fx
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_convbn import ConvBNPass

from .table import Row, environment, percentiles, processor, to_json, write

LIMIT_MS = 1.0
"""What a pair may cost."""

METRICS = ("pass_time_per_pair", "pass_cpu_time_per_pair")
"""By the clock, and by the processor time of this process, which others on the same machine disturb less."""

Found = dict[int, list[tuple[float, float]]]
"""For each number of pairs the milliseconds a pair of every round, in the order of METRICS."""


def chain(pairs: int) -> fx.GraphModule:
    """``relu(batch_norm(conv2d(x, W)))``, `pairs` times in a row, as Dynamo captures it: (2, 8, 16, 16), fp32."""
    graph = fx.Graph()
    with FakeTensorMode():
        x = torch.empty(2, 8, 16, 16)
        weight, vector = torch.empty(8, 8, 3, 3, requires_grad=True), torch.empty(8, requires_grad=True)
        statistic = torch.empty(8)

    def placeholder(name: str, example: torch.Tensor) -> fx.Node:
        node = graph.placeholder(name)
        # Each its own storage, as parameters have: the pass asks which of them share memory.
        node.meta["example_value"] = example if example is x else torch.empty_like(example)
        return node

    def call(function: Callable[..., Any], *arguments: Any) -> fx.Node:
        node = graph.call_function(function, arguments)
        node.meta["example_value"] = torch.empty_like(x)
        return node

    shapes = {"weight": weight, "running_mean": statistic, "running_var": statistic, "gamma": vector, "beta": vector}
    out = placeholder("x", x)
    parameters = [{key: placeholder(f"{key}_{i}", shape) for key, shape in shapes.items()} for i in range(pairs)]
    for own in parameters:
        conv = call(torch.conv2d, out, own["weight"], None, (1, 1), (1, 1), (1, 1), 1)
        statistics_ = own["running_mean"], own["running_var"]
        normalized = call(F.batch_norm, conv, *statistics_, own["gamma"], own["beta"], False, 0.1, 1e-5)
        out = call(F.relu, normalized, True)
    graph.output((out,))
    return fx.GraphModule(torch.nn.Module(), graph)


def seconds(pairs: int) -> tuple[float, float]:
    """How long the pass takes on a new graph of that many pairs: by the clock, and of the processor.

    Raises: RuntimeError, where it did not fold them all, for then the time means nothing.
    """
    gm = chain(pairs)
    before = counters["triton_convbn"]["folded"]
    start = time.perf_counter(), time.process_time()
    ConvBNPass()(gm.graph)
    end = time.perf_counter(), time.process_time()
    folded = counters["triton_convbn"]["folded"] - before
    if folded != pairs:
        raise RuntimeError(f"the pass folded {folded} of {pairs} pairs")
    return end[0] - start[0], end[1] - start[1]


def measure(sizes: list[int], rounds: int, step: Callable[[str], None] = lambda _text: None) -> Found:
    """Milliseconds a pair for each size, `rounds` times, all sizes in turn: a slow moment slows them all."""
    seconds(min(sizes))  # the first call imports and fills caches
    found: Found = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            step(f"{size} pairs")
            clock, processor_time = seconds(size)
            found[size].append((1e3 * clock / size, 1e3 * processor_time / size))
    return found


def growth(found: Found) -> float:
    """Milliseconds a pair of the largest graph over those of the smallest, in processor time: 1 is linear."""
    largest, smallest = (statistics.median(cpu for _, cpu in found[size]) for size in (max(found), min(found)))
    return largest / smallest


def rows(found: Found) -> list[Row]:
    """The measurements, tidy: one row a size and metric."""
    case = "triton_convbn", "pass", "float32", "contiguous", 2
    where = environment(processor())
    return [
        Row(f"chain_{size}", *case, metric, "ms", *percentiles(list(values)), "ok", "", *where)
        for size, measured in found.items()
        for metric, values in zip(METRICS, zip(*measured, strict=True), strict=True)
    ]


def _sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise typer.BadParameter(f"{text!r} is no list of positive numbers such as 10,100,2000", param_hint="--pairs")
    return sizes


def main(
    pairs: Annotated[str, typer.Option(help="The sizes of the graphs, in pairs.")] = "10,100,500,1000,2000",
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 5,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of a table.")] = False,
    csv_: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the rows there too.")] = None,
) -> None:
    """Measure what ConvBNPass costs on graphs of many pairs."""
    sizes = _sizes(pairs)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("first graph", total=len(sizes) * rounds)
        found = measure(sizes, rounds, lambda text: bar.update(task, description=text, advance=1))
    measured, ratio = rows(found), growth(found)
    if csv_ is not None:
        write(csv_, measured)
    if json_:
        print(to_json(measured, limit_ms=LIMIT_MS, growth=ratio))
        return
    table = Table(title=f"ConvBNPass, measured on {processor()}, {rounds} rounds")
    for column in ("pairs", "ms a pair", "20 % to 80 %", "CPU ms a pair", "ms in all"):
        table.add_column(column, justify="right")
    for size in found:
        clock, cpu = (row for row in measured if row.case == f"chain_{size}")
        spread = f"{clock.p20:.3f} to {clock.p80:.3f}"
        table.add_row(str(size), f"{clock.p50:.3f}", spread, f"{cpu.p50:.3f}", f"{clock.p50 * size:.1f}")
    Console().print(table)
    print(
        f"A pair costs {ratio:.2f} times as much CPU time in the largest graph as in the smallest; it may cost"
        f" {LIMIT_MS} ms."
    )


if __name__ == "__main__":
    typer.run(main)
