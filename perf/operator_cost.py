"""Host time of the operators: microseconds a call of 16 pairs, everything but the launch of the kernel.

    python -m triton_convbn.perf.operator_cost --calls 2000

The tensors are those of ResNet-50's first 16 pairs, fp32, on the CPU, where nothing runs beside the host. The launch is
replaced by nothing. "call" is a call of the operator without gradients, as a compiled graph makes it: torch's dispatch,
our body and the allocation of the outputs. "body" is our Python alone, without dispatch and allocation.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table
from triton_convbn.kernels.inputs import FoldInputs
from triton_convbn.kernels.offline_cases import resnet50

from triton_convbn.ops import library, plan
from triton_convbn.ops.packed_pairs import PackedPairs

from .table import Row, environment, percentiles, processor, to_json, write

LIMITS_US = {"call": 150.0, "body": 60.0}
"""What a call of 16 pairs may take."""

PAIRS = 16


def fold_arguments() -> list[Any]:
    """Return the arguments of `triton_convbn::fold` for ResNet-50's first pairs."""
    pairs = []
    for spec in resnet50()[:PAIRS]:
        side = math.isqrt(spec.taps)
        weight, vector = torch.randn(spec.rows, spec.cols, side, side), torch.ones(spec.rows)
        pairs.append(FoldInputs(weight, None, *(vector.clone() for _ in range(4)), 1e-5))
    return list(PackedPairs.pack(pairs))


@contextmanager
def nothing_launched() -> Iterator[None]:
    """Let the kernels be chosen for CPU tensors inside the block, and never run."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), mock.patch.object(plan, "run", _nothing):
        yield


def _nothing(*_: Any) -> None:
    """Stand for a launch. A Mock would take longer than the body that is measured."""


@contextmanager
def nothing_allocated() -> Iterator[None]:
    """Let one tensor stand for every output inside the block."""
    tensor = torch.empty(0)
    with mock.patch.dict(plan._EMPTY, cpu=lambda *_: tensor):
        yield


def microseconds(call: Callable[[], Any], calls: int) -> list[float]:
    """Return the time of each call, after as many others as fill caches."""
    found = []
    for index in range(-50, calls):
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        if index >= 0:
            found.append(1e6 * (end - start))
    return found


def measure(calls: int) -> list[Row]:
    """Return a row for each operator and metric."""
    where = environment(processor())
    rows = []
    with torch.no_grad(), nothing_launched():
        arguments = fold_arguments()
        grads = library.fold_op(*arguments)
        backward = [grads, [3] * PAIRS, [0b1101] * PAIRS, [], *arguments]
        for name, operator, body, planned, given in (
            ("fold", library.fold_op, library._fold, plan.planned_fold, arguments),
            ("fold_backward", library.fold_backward_op, library._fold_backward, plan.planned_fold_backward, backward),
        ):
            times = {"call": microseconds(partial(operator, *given), calls)}
            with nothing_allocated():
                times["body"] = microseconds(partial(body, planned, *given), calls)
            case = f"{name}_{PAIRS}_pairs", "triton_convbn", "operator", "float32", "contiguous", 0
            rows += [
                Row(*case, f"host_time_{metric}", "us", *percentiles(found), "ok", "", *where)
                for metric, found in times.items()
            ]
    return rows


def main(
    calls: Annotated[int, typer.Option(min=1, help="How often each is called.")] = 2000,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of a table.")] = False,
    csv_: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the rows there too.")] = None,
) -> None:
    """Measure the host time of the operators, without a launch."""
    torch.set_num_threads(1)
    rows = measure(calls)
    if csv_ is not None:
        write(csv_, rows)
    if json_:
        print(to_json(rows, limits_us=LIMITS_US))
        return
    table = Table(title=f"Microseconds a call of {PAIRS} pairs, launch replaced, {processor()}, {calls} calls")
    for column in ("operator", "what", "20 %", "median", "80 %", "limit"):
        table.add_column(column, justify="left" if column in ("operator", "what") else "right")
    for row in rows:
        what = row.metric.removeprefix("host_time_")
        times = (f"{value:.0f}" for value in (row.p20, row.p50, row.p80))
        table.add_row(row.case, what, *times, f"{LIMITS_US[what]:.0f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
