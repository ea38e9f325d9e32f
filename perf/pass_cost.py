"""Measure the compile time of the pass: milliseconds a pair, and whether they grow with the graph.

    python -m triton_convbn.perf.pass_cost --pairs 10,100,500,1000,2000 --rounds 5

The graphs are chains of convolution, BatchNorm and ReLU as Dynamo captures them: torch's own functions, a placeholder
for each parameter, a fake tensor on each node. They are built without Dynamo, which takes minutes for 2,000 pairs.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import fx
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_convbn import ConvBNPass

from .steps import CsvOption, JsonOption, print_rows, progress, run_command
from .table import Row, environment, percentiles, processor, write

LIMIT_MS = 1.0
"""Limit for a pair."""

METRICS = ("pass_time_per_pair", "pass_cpu_time_per_pair")
"""Wall-clock time, and CPU time of this process, which other processes disturb less."""

Found = dict[int, list[tuple[float, float]]]
"""Milliseconds a pair of every round, in the order of METRICS, by the number of pairs."""


def chain(pairs: int) -> fx.GraphModule:
    """Return ``relu(batch_norm(conv2d(x, W)))`` repeated `pairs` times, as Dynamo captures it: (2, 8, 16, 16), fp32."""
    graph = fx.Graph()
    with FakeTensorMode():
        x = torch.empty(2, 8, 16, 16)
        weight, vector = torch.empty(8, 8, 3, 3, requires_grad=True), torch.empty(8, requires_grad=True)
        statistic = torch.empty(8)

    def placeholder(name: str, example: torch.Tensor) -> fx.Node:
        node = graph.placeholder(name)
        # Parameters have a storage each: the pass checks which of them share memory.
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
    """Return wall-clock and CPU seconds of the pass on a new graph. Raises: RuntimeError if a pair is not folded."""
    gm = chain(pairs)
    before = counters["triton_convbn"]["folded"]
    start = time.perf_counter(), time.process_time()
    ConvBNPass()(gm.graph)
    end = time.perf_counter(), time.process_time()
    folded = counters["triton_convbn"]["folded"] - before
    if folded != pairs:
        raise RuntimeError(f"the pass folded {folded} of {pairs} pairs")
    return end[0] - start[0], end[1] - start[1]


def measure(sizes: list[int], rounds: int) -> Found:
    """Return milliseconds a pair for each size, `rounds` times. Sizes alternate: a slow moment slows all."""
    seconds(min(sizes))  # the first call imports and fills caches
    found: Found = {size: [] for size in sizes}
    for size in progress(sizes * rounds, "pass_cost"):
        clock, processor_time = seconds(size)
        found[size].append((1e3 * clock / size, 1e3 * processor_time / size))
    return found


def growth(found: Found) -> float:
    """Return CPU time a pair of the largest graph over that of the smallest: 1 is linear."""
    largest, smallest = (statistics.median(cpu for _, cpu in found[size]) for size in (max(found), min(found)))
    return largest / smallest


def rows(found: Found) -> list[Row]:
    """Return one row for each size and metric."""
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
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers like 10,100,2000", param_hint="--pairs")
    return sizes


def command(
    pairs: Annotated[str, typer.Option(help="Sizes of the graphs, in pairs.")] = "10,100,500,1000,2000",
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each size.")] = 5,
    json_: JsonOption = False,
    csv_: CsvOption = None,
) -> None:
    """Measure the compile time of ConvBNPass on graphs of many pairs."""
    found = measure(_sizes(pairs), rounds)
    measured, ratio = rows(found), growth(found)
    if csv_ is not None:
        write(csv_, measured)
    lines = [
        {
            "pairs": str(size),
            "ms a pair": f"{clock.p50:.3f}",
            "20 % to 80 %": f"{clock.p20:.3f} to {clock.p80:.3f}",
            "CPU ms a pair": f"{cpu.p50:.3f}",
            "ms in all": f"{clock.p50 * size:.1f}",
        }
        for size, clock, cpu in zip(found, measured[::2], measured[1::2], strict=True)
    ]
    title = f"ConvBNPass on {processor()}, {rounds} rounds; CPU time a pair, largest over smallest graph: {ratio:.2f}"
    print_rows(measured, json_, title, lines, limit_ms=LIMIT_MS, growth=ratio)


if __name__ == "__main__":
    run_command(command)
