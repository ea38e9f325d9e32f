"""Measure the host time of the operators: microseconds a call of 16 pairs, without the kernel launch.

    python -m triton_convbn.perf.operator_cost --calls 2000

The tensors are those of ResNet-50's first 16 pairs, fp32, on the CPU, and the launch is replaced by an empty function.
"call" is a call of the operator without gradients, as a compiled graph makes it: torch's dispatch, our body and the
allocation of the outputs. "body" is our Python alone.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from triton_convbn.kernels.inputs import FoldInputs
from triton_convbn.kernels.offline_cases import resnet50

from triton_convbn.ops import library, plan
from triton_convbn.ops.packed_pairs import PackedPairs

from .steps import CsvOption, JsonOption, print_rows, run_command
from .table import Row, environment, percentiles, processor, write

LIMITS_US = {"call": 150.0, "body": 60.0}
"""Limits for a call of 16 pairs."""

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
    """Select kernels for CPU tensors inside the block without running them."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), mock.patch.object(plan, "run", _nothing):
        yield


def _nothing(*_: Any) -> None:
    """Replace a launch. A Mock would take longer than the body that is measured."""


@contextmanager
def nothing_allocated() -> Iterator[None]:
    """Replace every output by one tensor inside the block."""
    tensor = torch.empty(0)
    with mock.patch.dict(plan._EMPTY, cpu=lambda *_: tensor):
        yield


def microseconds(call: Callable[[], Any], calls: int) -> list[float]:
    """Return the time of each call, after 50 calls that fill caches."""
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


def command(
    calls: Annotated[int, typer.Option(min=1, help="Number of calls.")] = 2000,
    json_: JsonOption = False,
    csv_: CsvOption = None,
) -> None:
    """Measure the host time of the operators, without a launch."""
    torch.set_num_threads(1)
    rows = measure(calls)
    if csv_ is not None:
        write(csv_, rows)
    lines = [
        {
            "operator": row.case,
            "part": (part := row.metric.removeprefix("host_time_")),
            **{name: f"{value:.0f}" for name, value in (("20 %", row.p20), ("median", row.p50), ("80 %", row.p80))},
            "limit": f"{LIMITS_US[part]:.0f}",
        }
        for row in rows
    ]
    title = f"Microseconds a call of {PAIRS} pairs, launch replaced, {processor()}, {calls} calls"
    print_rows(rows, json_, title, lines, limits_us=LIMITS_US)


if __name__ == "__main__":
    run_command(command)
