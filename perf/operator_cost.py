"""Measure the host time of the operators: microseconds a call of 16 pairs, without the kernel launch.

    python -m triton_convbn.perf.operator_cost --calls 2000

The tensors are those of ResNet-50's first 16 pairs, fp32, on the CPU, and the launch is replaced by an empty function.
"call" is a call of the operator without gradients, as a compiled graph makes it: torch's dispatch, our body and the
allocation of the outputs. "body" is our Python alone.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from triton_convbn.kernels.inputs import FoldInputs
from triton_convbn.kernels.offline_cases import resnet50

from triton_convbn.measure import cpu_clock
from triton_convbn.ops import library, plan
from triton_convbn.ops.packed_pairs import PackedPairs

from .command import Csv, Json, open_report, print_rows, run_command
from .results import Key, percentiles

LIMITS_US = {"call": 150.0, "body": 60.0}
"""Limits for a call of 16 pairs."""

PAIRS = 16
WARMUP = 50
"""Calls that fill caches and are not timed."""


def fold_arguments() -> list[Any]:
    """Return the arguments of `triton_convbn::fold` for ResNet-50's first pairs."""
    pairs = []
    for spec in resnet50()[:PAIRS]:
        side = math.isqrt(spec.taps)
        weight, vector = torch.randn(spec.rows, spec.cols, side, side), torch.ones(spec.rows)
        pairs.append(FoldInputs(weight, None, *(vector.clone() for _ in range(4)), 1e-5))
    return list(PackedPairs.pack(pairs))


def _nothing(*_: Any) -> None:
    """Replace a launch. A Mock would take longer than the body that is measured."""


def microseconds(call: Callable[[], Any], calls: int) -> list[float]:
    """Return the time of each call."""
    return [1e6 * cpu_clock(call) for _ in range(WARMUP + calls)][WARMUP:]


def command(
    calls: Annotated[int, typer.Option(min=1, help="Number of calls.")] = 2000,
    json_: Json = False,
    csv_: Csv = None,
) -> None:
    """Measure the host time of the operators, without a launch."""
    torch.set_num_threads(1)
    report = open_report(csv_, resume=False)
    launch_nothing = mock.patch.object(plan, "run", _nothing)
    with torch.no_grad(), mock.patch.dict(os.environ, TRITON_INTERPRET="1"), launch_nothing:
        arguments = fold_arguments()
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


if __name__ == "__main__":
    run_command(command)
