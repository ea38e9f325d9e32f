"""Measure the compile time of the pass: milliseconds a pair, and whether they grow with the graph.

    python -m triton_convbn.perf.pass_cost --pairs 10,100,500,1000,2000 --rounds 5

The graphs are chains of convolution, BatchNorm and ReLU as Dynamo captures them: torch's own functions, a placeholder
for each parameter, a fake tensor on each node. They are built without Dynamo, which takes minutes for 2,000 pairs.
"""

import re
import statistics
import time
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import fx
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_convbn import ConvBNPass
from triton_convbn.errors import UsageError

from .command import Csv, Json, Rounds, open_report, print_rows, progress, run_command
from .results import Key, percentiles

LIMIT_MS = 1.0
"""Limit for a pair."""

METRICS = ("pass_time_per_pair", "pass_cpu_time_per_pair")
"""Wall-clock time, and CPU time of this process, which other processes disturb less."""


def chain(pairs: int) -> fx.GraphModule:
    """Return ``relu(batch_norm(conv2d(x, W)))`` repeated `pairs` times, as Dynamo captures it: (2, 8, 16, 16), fp32."""
    graph, mode, image = fx.Graph(), FakeTensorMode(), (2, 8, 16, 16)
    shapes = {"weight": (8, 8, 3, 3), "mean": (8,), "var": (8,), "gamma": (8,), "beta": (8,)}

    def node(made: fx.Node, shape: tuple[int, ...], grad: bool = False) -> fx.Node:
        with mode:  # a storage each: the pass checks which parameters share memory
            made.meta["example_value"] = torch.empty(shape, requires_grad=grad)
        return made

    out = node(graph.placeholder("x"), image)
    parameters = [
        [node(graph.placeholder(f"{name}_{i}"), shapes[name], name not in ("mean", "var")) for name in shapes]
        for i in range(pairs)
    ]
    for weight, *vectors in parameters:
        conv = graph.call_function(torch.conv2d, (out, weight, None, (1, 1), (1, 1), (1, 1), 1))
        norm = graph.call_function(F.batch_norm, (node(conv, image), *vectors, False, 0.1, 1e-5))
        out = node(graph.call_function(F.relu, (node(norm, image), True)), image)
    graph.output((out,))
    return fx.GraphModule(torch.nn.Module(), graph)


def milliseconds(pairs: int) -> tuple[float, float]:
    """Return wall-clock and CPU milliseconds a pair on a new graph. Raises: RuntimeError if a pair is not folded."""
    gm = chain(pairs)
    before = counters["triton_convbn"]["folded"]
    start = time.perf_counter(), time.process_time()
    ConvBNPass()(gm.graph)
    end = time.perf_counter(), time.process_time()
    folded = counters["triton_convbn"]["folded"] - before
    if folded != pairs:
        raise RuntimeError(f"the pass folded {folded} of {pairs} pairs")
    return 1e3 * (end[0] - start[0]) / pairs, 1e3 * (end[1] - start[1]) / pairs


def command(
    pairs: Annotated[str, typer.Option(help="Sizes of the graphs, in pairs.")] = "10,100,500,1000,2000",
    rounds: Rounds = 5,
    json_: Json = False,
    csv_: Csv = None,
) -> None:
    """Measure the compile time of ConvBNPass on graphs of many pairs."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", pairs):
        raise UsageError(f"--pairs {pairs}: not a list of positive numbers such as 10,100,2000")
    sizes, report = sorted(set(map(int, pairs.split(",")))), open_report(csv_, resume=False)
    milliseconds(sizes[0])  # the first call imports and fills caches
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for size in progress(sizes * rounds, "pass_cost"):  # in turn, so that a slow moment slows all
        found[size].append(milliseconds(size))
    for size, measured in found.items():
        key = Key(f"chain_{size}", mode="pass", dtype="float32", batch=2)
        for metric, values in zip(METRICS, zip(*measured, strict=True), strict=True):
            report.measured(key, metric, "ms", percentiles(values))
    largest, smallest = (statistics.median(cpu for _, cpu in found[size]) for size in (sizes[-1], sizes[0]))
    growth = largest / smallest
    note = f"CPU time a pair, largest over smallest graph: {growth:.2f}. Limit for a pair: {LIMIT_MS:.0f} ms."
    print_rows(report.rows, json_, note, limit_ms=LIMIT_MS, growth=growth)


if __name__ == "__main__":
    run_command(command)
