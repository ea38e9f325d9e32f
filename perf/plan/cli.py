"""`triton-convbn plan`: what Inductor would launch on an H100, on a machine without one."""

import copy
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from triton_convbn.arguments import Model, Shapes, Size
from triton_convbn.errors import UsageError
from triton_convbn.progress import errors

from . import Count, Dtype, Provider

if TYPE_CHECKING:
    from torch import nn

    from triton_convbn.example_inputs import Inputs

    from .planner import Plan

DEVICES = {"gpu": "NVIDIA H100 (planned)", "traced": "NVIDIA H100, as traced (planned)"}
NOTES = """\
Read from the code that Inductor generates for an H100. Launches are Triton kernels and folds. Convolutions and other
calls (matmuls) come on top. Bytes are those of all of them."""
TRACED_NOTE = "As traced on a CPU: bias gradients are part of the convolutions. On a GPU they are not."
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
    dtype: Annotated[Dtype, typer.Option("--dtype")] = "float32",
    provider: Annotated[
        list[Provider] | None,
        typer.Option("--provider", metavar="NAME", help=f"Plan only {', '.join(Provider)}; repeatable."),
    ] = None,
    frozen_affine: Annotated[bool, typer.Option("--frozen-affine", help="Freeze BatchNorm's weight and bias.")] = False,
    count: Annotated[
        Count, typer.Option("--count", help="traced: as a CPU traces it, without a GPU's sums of bias gradients.")
    ] = "gpu",
    host: Annotated[bool, typer.Option("--host", help="Measure a step's host time under a driver stub.")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="List every kernel and the bytes it moves.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Append the rows to this file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Plan the launches and bytes of a compiled model on an H100, from Inductor's generated code. Needs no GPU."""
    import pandas as pd
    import torch

    from triton_convbn.example_inputs import bind
    from triton_convbn.models import load_with_inputs

    from ..environment import processor
    from ..frame import to_frame
    from ..results import Key, Log, Report, percentiles, to_json
    from ..tables import show
    from ..workloads import at_size
    from .host import host_times
    from .planner import plan as plan_one

    if frozen_affine and not train:
        raise UsageError("--frozen-affine is about gradients: it needs --train")
    if host and count != "gpu":
        raise UsageError("--host measures what a GPU would be given: it needs --count gpu")
    autocast = getattr(torch, dtype.removeprefix("autocast_")) if dtype.startswith("autocast_") else None
    precision = torch.float32 if autocast else getattr(torch, dtype)
    loaded, inputs = load_with_inputs(model, shape, batch=batch, size=size, default_batch=8)
    _check(model, loaded, inputs)
    case = at_size(model, loaded, size, shape)
    loaded, x = bind(loaded.to(precision), inputs.to(dtype=precision))
    for module in loaded.modules() if frozen_affine else ():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)
    mode = "train-frozen" if frozen_affine else "train" if train else "infer"
    key = Key(case, "", mode, dtype, batch=inputs.batch)
    log = None if csv is None else Log(csv)
    planned = Report(log, DEVICES[count], "planned")
    stubbed = Report(log, f"{processor()} (stubbed)", "stubbed")
    plans: list[Plan] = []
    for name in dict.fromkeys(map(str, provider or Provider)):
        with errors.status(f"planning {model} with {name}"):
            try:
                plans.append(plan_one(loaded, x, name, train, autocast, count))
            except UsageError:
                raise
            except Exception as error:
                why = str(error).strip().splitlines()[0]
                raise UsageError(f"{model} on {inputs} cannot be planned: {why}") from error
        for metric, value in plans[-1].figures().items():
            unit = "bytes" if metric.startswith(("bytes", "saved")) else "launches"
            planned.measured(key._replace(provider=name), metric, unit, (value, math.nan, math.nan))
    if host:
        with errors.status("measuring host time"):
            for name, times in host_times(plans).items():
                stubbed.measured(key._replace(provider=name), "host_time", "us", percentiles(times.microseconds))
    rows = planned.rows + stubbed.rows
    if json_:
        more = {"kernels": {each.provider: list(map(asdict, each.launches)) for each in plans}} if kernels else {}
        print(to_json(rows, status="planned", count=count, device=DEVICES[count], **more))
        return
    show(to_frame(rows))
    for each in plans if kernels else ():
        launches = pd.DataFrame(map(asdict, each.launches))[["direction", "kind", "launches", "bytes", "name"]]
        print(f"\n{each.provider}: planned kernels, forward then backward\n{launches.to_string(index=False)}")
    print("\n".join(["", *[TRACED_NOTE] * (count == "traced"), NOTES, *[HOST_NOTE] * host]))


def _check(name: str, model: "nn.Module", inputs: "Inputs") -> None:
    """Raise UsageError if the model does not take the inputs. On the meta device, which computes nothing, if it can."""
    from triton_convbn.example_inputs import check

    try:
        check(name, copy.deepcopy(model).to("meta"), inputs.to(device="meta"))
    except UsageError:
        check(name, model, inputs)
