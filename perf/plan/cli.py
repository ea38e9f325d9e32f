"""`triton-convbn plan`: what Inductor would launch on an H100, on a machine without one."""

import math
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer

from triton_convbn.arguments import Model, Shapes, Size
from triton_convbn.errors import UsageError, first_line
from triton_convbn.progress import errors

from ..command import Csv, Json, print_rows

Provider = StrEnum(
    "Provider",
    "inductor inductor_efficient_conv_bn inductor_efficient_conv_bn_combo"
    " triton_convbn triton_convbn_always triton_convbn_keep",
)
Dtype = StrEnum("Dtype", ["float32", "float16", "bfloat16", "autocast_float16", "autocast_bfloat16"])

DEVICE = "NVIDIA H100 (planned)"
NOTES = """\
Read from the code that Inductor generates for an H100. Launches are Triton kernels and folds. Convolutions and other
calls (matmuls) come on top. Bytes are those of all of them."""
HOST_NOTE = """\
Host time is measured on this CPU, under a CUDA driver that does nothing: the generated code of a step, its launchers
and allocations, and our operators where it calls them. Left out for every provider: autograd's engine, AOTAutograd's
runtime, guards, and the time of convolutions, matmuls and the driver."""


def plan(
    model: Model,
    train: Annotated[bool, typer.Option("--train", help="Plan forward and backward, not inference.")] = False,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Batch size, 8 by default.")] = None,
    size: Size = None,
    shape: Shapes = None,
    dtype: Annotated[Dtype, typer.Option("--dtype")] = Dtype.float32,
    provider: Annotated[
        list[Provider] | None,
        typer.Option("--provider", metavar="NAME", help=f"Plan only {', '.join(Provider)}; repeatable."),
    ] = None,
    frozen_affine: Annotated[bool, typer.Option("--frozen-affine", help="Freeze BatchNorm's weight and bias.")] = False,
    host: Annotated[bool, typer.Option("--host", help="Measure a step's host time under a driver stub.")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="List every kernel and the bytes it moves.")] = False,
    csv: Csv = None,
    json_: Json = False,
) -> None:
    """Plan the launches and bytes of a compiled model on an H100, from Inductor's generated code. Needs no GPU."""
    import pandas as pd
    import torch

    from ..environment import processor
    from ..results import Report, percentiles
    from ..runner import report_ratios
    from ..subject import subject
    from ..workloads import Setting, whole
    from .host import host_times
    from .planner import Plan
    from .planner import plan as plan_one

    if frozen_affine and not train:
        raise UsageError("--frozen-affine is about gradients: it needs --train")
    mode = "train-frozen" if frozen_affine else "train" if train else "infer"
    case = whole(model, size, shape, batch)
    setting = case.own_batch(Setting(mode, str(dtype), "contiguous", batch or 8))
    own = subject(case, setting, torch.device("cpu"), compared=False)
    planned = Report(csv, DEVICE, "planned")
    stubbed = Report(csv, f"{processor()} (stubbed)", "stubbed")
    plans: list[Plan] = []
    for name in dict.fromkeys(map(str, provider or Provider)):
        with errors.status(f"planning {model} with {name}"):
            try:
                plans.append(plan_one(own.model, own.x, name, train, own.autocast))
            except UsageError:
                raise
            except Exception as error:
                why = f"{model} on {tuple(own.x.shape)} cannot be planned: {first_line(error)}"
                raise UsageError(why) from error
        for metric, value in plans[-1].figures().items():
            unit = "bytes" if metric.startswith(("bytes", "saved")) else "launches"
            planned.measured(own.key._replace(provider=name), metric, unit, (value, math.nan, math.nan))
    if host:
        with errors.status("measuring host time"):
            found = {name: times.microseconds for name, times in host_times(plans).items()}
        for name, times in found.items():
            key = own.key._replace(provider=name)
            stubbed.measured(key, "host_time", "us", percentiles(times))
            report_ratios(stubbed, key, ("inductor",), found)
    more: dict[str, Any] = {"status": "planned", "device": DEVICE}
    if kernels:
        more["kernels"] = {each.provider: list(map(asdict, each.launches)) for each in plans}
    print_rows(planned.rows + stubbed.rows, json_, one_table=False, **more)
    if json_:
        return
    for each in plans if kernels else ():
        launches = pd.DataFrame(map(asdict, each.launches))[["direction", "kind", "launches", "bytes", "name"]]
        print(f"\n{each.provider}: planned kernels, forward then backward\n{launches.to_string(index=False)}")
    print("\n".join(["", NOTES, *[HOST_NOTE] * host]))
