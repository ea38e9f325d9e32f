"""Measure the overhead of this package: compile time of the pass, and host time of the fold operators.

    triton-convbn dev pass-cost --pairs 10,100,500,1000,2000 --rounds 5
    triton-convbn dev operator-cost --calls 2000

The pass runs on chains of convolution, BatchNorm and ReLU as Dynamo captures them: torch's own functions, a placeholder
for each parameter, a fake tensor on each node. They are built without Dynamo, which takes minutes for 2,000 pairs.

The operators get tensors of ResNet-50's first 16 pairs, fp32, on the CPU, and the launch is replaced by an empty
function. "call" is a call of the operator without gradients, as a compiled graph makes it: torch's dispatch, our body
and the allocation of the outputs. "body" is our Python alone.
"""

import os
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any
from unittest import mock

import torch
import torch.nn.functional as F
import typer
from torch import fx
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_convbn.kernels.kernel_call import random_pair
from triton_convbn.kernels.offline_cases import resnet50

from triton_convbn import ConvBNPass
from triton_convbn.errors import UsageError
from triton_convbn.measure import cpu_clock
from triton_convbn.ops import library, plan
from triton_convbn.ops.packed_pairs import PackedPairs

from .command import Csv, Json, print_rows, progress
from .environment import processor
from .results import Key, Report, percentiles

LIMIT_MS = 1.0
"""Limit of the pass for a pair."""

LIMITS_US = {"call": 150.0, "body": 60.0}
"""Limits of an operator for a call of 16 pairs."""

PAIRS = 16
WARMUP = 50
"""Calls that fill caches and are not timed."""


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


def pass_cost(
    pairs: Annotated[str, typer.Option(help="Sizes of the graphs, in pairs.")] = "10,100,500,1000,2000",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each graph.")] = 5,
    json_: Json = False,
    csv_: Csv = None,
) -> None:
    """Measure the compile time of ConvBNPass on graphs of many pairs: milliseconds a pair, and if they grow.

    CPU time is that of this process, which other processes disturb less than wall-clock time.
    """
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", pairs):
        raise UsageError(f"--pairs {pairs}: not a list of positive numbers such as 10,100,2000")
    sizes, report = sorted(set(map(int, pairs.split(",")))), Report(csv_, processor())
    milliseconds(sizes[0])  # the first call imports and fills caches
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for size in progress(sizes * rounds, "pass_cost"):  # in turn, so that a slow moment slows all
        found[size].append(milliseconds(size))
    for size, measured in found.items():
        key = Key(f"chain_{size}", mode="pass", dtype="float32", batch=2)
        wall, cpu = zip(*measured, strict=True)
        report.measured(key, "pass_time_per_pair", "ms", percentiles(wall))
        report.measured(key, "pass_cpu_time_per_pair", "ms", percentiles(cpu))
    largest, smallest = (statistics.median(cpu for _, cpu in found[size]) for size in (sizes[-1], sizes[0]))
    growth = largest / smallest
    note = f"CPU time a pair, largest over smallest graph: {growth:.2f}. Limit for a pair: {LIMIT_MS:.0f} ms."
    print_rows(report.rows, json_, note, limit_ms=LIMIT_MS, growth=growth)


def _nothing(*_: Any) -> None:
    """Replace a launch. A Mock would take longer than the body that is measured."""


def microseconds(call: Callable[[], Any], calls: int) -> list[float]:
    """Return the time of each call."""
    return [1e6 * cpu_clock(call) for _ in range(WARMUP + calls)][WARMUP:]


def operator_cost(
    calls: Annotated[int, typer.Option(min=1, help="Number of calls.")] = 2000,
    json_: Json = False,
    csv_: Csv = None,
) -> None:
    """Measure the host time of the operators, without a launch."""
    torch.set_num_threads(1)
    report = Report(csv_, processor())
    launch_nothing = mock.patch.object(plan, "run", _nothing)
    with torch.no_grad(), mock.patch.dict(os.environ, TRITON_INTERPRET="1"), launch_nothing:
        device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
        pairs = [random_pair(spec, device, generator) for spec in resnet50()[:PAIRS]]
        arguments = list(PackedPairs.pack(pairs))
        grads = library.fold_op(*arguments)
        backward = [grads, [3] * PAIRS, [0b1101] * PAIRS, [], *arguments]
        for name, operator, body, planned, given in (
            ("fold", library.fold_op, library._fold, plan.planned_fold, arguments),
            ("fold_backward", library.fold_backward_op, library._fold_backward, plan.planned_fold_backward, backward),
        ):
            key, empty = Key(f"{name}_{PAIRS}_pairs", mode="operator", dtype="float32"), torch.empty(0)
            call = microseconds(partial(operator, *given), calls)
            with mock.patch.dict(plan._EMPTY, cpu=lambda *_, empty=empty: empty):  # nothing is allocated
                own = microseconds(partial(body, planned, *given), calls)
            report.measured(key, "host_time_call", "us", percentiles(call))
            report.measured(key, "host_time_body", "us", percentiles(own))
    limits = ", ".join(f"{limit:.0f} us for the {part}" for part, limit in LIMITS_US.items())
    print_rows(report.rows, json_, f"Limits: {limits}.", limits_us=LIMITS_US)
