"""`triton-convbn plan`: what Inductor would launch on an H100, on a machine without one."""

import copy
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triton_convbn.errors import UsageError

from . import Count, Dtype, Provider

if TYPE_CHECKING:
    from ..results import Row
    from .planner import Plan

DEVICES = {"gpu": "NVIDIA H100 (planned)", "traced": "NVIDIA H100, as traced (planned)"}
NOTES = """\
Planned, not measured: read from the code that Inductor generates for an H100. Launches are Triton kernels and folds.
Convolutions and other calls (matmuls) come on top. Bytes are those of all of them."""
TRACED_NOTE = "As traced on a CPU: bias gradients are part of the convolutions. On a GPU they are not."
HOST_NOTE = """\
Host time is measured on this CPU, under a CUDA driver that does nothing: the generated code of a step, its launchers
and allocations, and our operators where it calls them. Left out for every provider: autograd's engine, AOTAutograd's
runtime, guards, and the time of convolutions, matmuls and the driver."""


def plan(
    model: Annotated[str, typer.Option("--model", help="A torchvision or timm name, or package.module:callable.")],
    train: Annotated[bool, typer.Option("--train", help="Plan forward and backward, not inference.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1)] = 8,
    size: Annotated[int | None, typer.Option("--size", min=1, help="Height and width of the input.")] = None,
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
    import torch
    from rich.console import Console

    from triton_convbn.models import example_input, load

    from ..environment import environment, processor
    from ..results import Key, Log, Row, percentiles, to_json
    from ..workloads import at_size
    from . import host as stub
    from .planner import plan as plan_one

    if frozen_affine and not train:
        raise UsageError("--frozen-affine is about gradients: it needs --train")
    if host and count != "gpu":
        raise UsageError("--host measures what a GPU would be given: it needs --count gpu")
    progress = Console(stderr=True, highlight=False)
    autocast = getattr(torch, dtype.removeprefix("autocast_")) if dtype.startswith("autocast_") else None
    precision = torch.float32 if autocast else getattr(torch, dtype)
    loaded = load(model).to(precision)
    x = example_input(loaded, batch, size).to(precision)
    _check_input(loaded, x, model)
    for module in loaded.modules() if frozen_affine else ():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)
    mode = "train-frozen" if frozen_affine else "train" if train else "infer"
    case, nothing = at_size(model, loaded, size), math.nan
    keys = {name: Key(case, name, mode, dtype, batch=batch) for name in dict.fromkeys(map(str, provider or Provider))}
    log = None if csv is None else Log(csv)
    plans: list[Plan] = []
    rows: list[Row] = []

    def add(found: Iterable[Row]) -> None:
        for row in found:
            rows.append(row)
            if log is not None:
                log.append(row)

    for name, key in keys.items():
        with progress.status(f"planning {model} with {name}"):
            try:
                plans.append(plan_one(loaded, x, name, train, autocast, count))
            except UsageError:
                raise
            except Exception as error:
                first = str(error).strip().splitlines()[0]
                raise UsageError(f"{model} on {tuple(x.shape)} cannot be planned: {first}") from error
        add(
            Row(*key, metric, _unit(metric), value, nothing, nothing, "planned", "", *environment(DEVICES[count]))
            for metric, value in plans[-1].figures().items()
        )
    if host:
        with progress.status("measuring host time"):
            times = stub.host_times(plans)
        where = environment(f"{processor()} (stubbed)")
        add(
            Row(*keys[name], "host_time", "us", *percentiles(times[name].microseconds), "stubbed", "", *where)
            for name in keys
        )
    if json_:
        more = {"kernels": {each.provider: list(map(asdict, each.launches)) for each in plans}} if kernels else {}
        print(to_json(rows, status="planned", count=count, device=DEVICES[count], **more))
        return
    _print_rows(rows, f"{case}, batch {batch}, {dtype}, {mode}: {DEVICES[count]}, not measured")
    for each in plans if kernels else ():
        _print_launches(each)
    print("\n".join([TRACED_NOTE] * (count == "traced") + [NOTES] + [HOST_NOTE] * host))


def _check_input(model: Any, x: Any, name: str) -> None:
    """Raise UsageError if the model does not take the input: eager says so in fewer words than Dynamo."""
    try:
        copy.deepcopy(model).to("meta")(x.to("meta"))
    except NotImplementedError:  # an operator without a meta kernel, which Dynamo may know
        pass
    except Exception as error:
        raise UsageError(f"{name} does not run on an input of shape {tuple(x.shape)}: {error}") from error


def _unit(metric: str) -> str:
    return "bytes" if metric.startswith(("bytes", "saved")) else "launches"


def _print_rows(rows: "list[Row]", title: str) -> None:
    """Print one line a metric and one column a provider."""
    from rich.console import Console
    from rich.table import Table

    def cell(row: "Row") -> str:
        value = f"{row.p50 / 1e6:,.1f} MB" if row.unit == "bytes" else f"{row.p50:,.0f}"
        return value if math.isnan(row.p20) else f"{value} us (20 % to 80 %: {row.p20:,.0f} to {row.p80:,.0f})"

    metrics: dict[str, list[str]] = {}
    for row in rows:
        metrics.setdefault(row.metric, []).append(cell(row))
    table = Table("", *dict.fromkeys(row.provider for row in rows), title=title)
    for metric, cells in metrics.items():
        table.add_row(metric.replace("_", " "), *cells)
    Console().print(table)


def _print_launches(plan: "Plan") -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("direction", "kind", "launches", "bytes", "name")
    table = Table(*columns, title=f"{plan.provider}: planned kernels, forward then backward")
    for launch in plan.launches:
        table.add_row(*(str(getattr(launch, column)) for column in columns))
    Console().print(table)
