"""`triton-convbn plan`: what Inductor would launch on an H100, on a machine without one."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triton_convbn.errors import UsageError

if TYPE_CHECKING:
    from .host_time import HostTime
    from .plan import Plan
    from .table import Row

UNITS = {"bytes_forward": "bytes", "bytes_backward": "bytes", "saved_for_backward": "bytes"}
"""Of the metrics that are no launches."""

DTYPES = ("float32", "float16", "bfloat16", "autocast_float16", "autocast_bfloat16")


def plan(
    model: Annotated[str, typer.Option("--model", help="A torchvision or timm name, or package.module:callable.")],
    train: Annotated[bool, typer.Option("--train", help="A forward and a backward instead of an inference.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1)] = 8,
    size: Annotated[int | None, typer.Option("--size", min=1, help="Height and width of the input.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help=f"One of {', '.join(DTYPES)}.")] = "float32",
    provider: Annotated[list[str] | None, typer.Option("--provider", help="Plan only these; repeatable.")] = None,
    frozen_affine: Annotated[
        bool, typer.Option("--frozen-affine", help="No gradients for BatchNorm's weight and bias.")
    ] = False,
    count: Annotated[
        str,
        typer.Option(
            "--count",
            help="gpu, or traced: as a CPU traces the model, without the sums that a GPU makes of bias gradients.",
        ),
    ] = "gpu",
    host: Annotated[
        bool,
        typer.Option("--host", help="Measure the host time of a step on this CPU, under a driver that does nothing."),
    ] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="List every kernel with the bytes that it moves.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Append the rows to this file.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of a table.")] = False,
) -> None:
    """Plan the launches and bytes of a compiled model on an H100, from Inductor's generated code. Needs no GPU."""
    from rich.console import Console

    from triton_convbn.models import example_input, load

    from .cases import at_size
    from .plan import COUNTS, PROVIDERS
    from .plan import plan as plan_one
    from .planned_gpu import check
    from .table import Log, to_json

    _choice("--dtype", dtype, DTYPES)
    _choice("--count", count, COUNTS)
    chosen = list(dict.fromkeys(provider or PROVIDERS))
    for name in chosen:
        _choice("--provider", name, tuple(PROVIDERS))
    if frozen_affine and not train:
        raise UsageError("--frozen-affine is about gradients: it needs --train")
    if host and count != "gpu":
        raise UsageError("--host measures what a GPU would be given: it needs --count gpu")
    check()
    progress = Console(stderr=True, highlight=False)
    loaded = load(model)
    x = example_input(loaded, batch, size)
    _prepare(loaded, frozen_affine)
    precision, autocast = _dtypes(dtype)
    loaded, x = loaded.to(precision), x.to(precision)
    _try(loaded, x, model)
    mode = "train-frozen" if frozen_affine else "train" if train else "infer"
    case = at_size(model, loaded, size)
    log = _open(Log, csv)
    plans, found = [], []
    for name in chosen:
        with progress.status(f"planning {model} with {name}"):
            try:
                each = plan_one(loaded, x, name, train, autocast, count)  # type: ignore[arg-type]
                plans.append(each)
            except UsageError:
                raise
            except Exception as error:
                first = str(error).strip().splitlines()[0]
                raise UsageError(f"{model} on {tuple(x.shape)} cannot be planned: {first}") from error
        found += (rows := _rows(plans[-1], (case, name, mode, dtype, "contiguous", batch)))
        for row in rows if log is not None else ():
            log.append(row)
    times: dict[str, HostTime] = {}
    if host:
        from .host_time import host_times

        with progress.status("measuring host time"):
            times = host_times(plans)
        found += (rows := [_host_row(times[name], (case, name, mode, dtype, "contiguous", batch)) for name in chosen])
        for row in rows if log is not None else ():
            log.append(row)
    if log is not None:
        log.close()
    if json_:
        more = {"kernels": {each.provider: _kernels(each) for each in plans}} if kernels else {}
        print(to_json(found, status="planned", count=count, device=found[0].device, **more))
        return
    _print(plans, f"{case}, batch {batch}, {dtype}, {mode}", kernels, times)


def _choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option} {value}: choose one of {', '.join(choices)}")


def _prepare(model: Any, frozen_affine: bool) -> None:
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in model.modules():
        if frozen_affine and isinstance(module, _BatchNorm):
            module.requires_grad_(False)


def _try(model: Any, x: Any, name: str) -> None:
    """Run it once without data: what that says of a wrong input is shorter than what Dynamo does."""
    import copy

    try:
        copy.deepcopy(model).to(device="meta")(x.to(device="meta"))
    except NotImplementedError:  # an operator without shapes alone; Dynamo may know better
        pass
    except Exception as error:
        raise UsageError(f"{name} does not run on an input of shape {tuple(x.shape)}: {error}") from error


def _dtypes(name: str) -> tuple[Any, Any]:
    """The dtype of model and input, and the one that autocast casts to, or None."""
    import torch

    if name.startswith("autocast_"):
        return torch.float32, getattr(torch, name.removeprefix("autocast_"))
    return getattr(torch, name), None


def _open(log: Any, path: Path | None) -> Any:
    try:
        return None if path is None else log(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--csv: {error}") from error


def _rows(plan: "Plan", case: tuple[str, str, str, str, str, int]) -> "list[Row]":
    """One row a metric. A plan has no spread."""
    from .planned_gpu import NAMES
    from .table import Row, environment

    where, nothing = environment(NAMES[plan.count]), math.nan
    return [
        Row(*case, metric, UNITS.get(metric, "launches"), float(value), nothing, nothing, "planned", "", *where)
        for metric, value in plan.figures().items()
    ]


def _host_row(time: "HostTime", case: tuple[str, str, str, str, str, int]) -> "Row":
    from .host_time import device
    from .table import Row, environment, percentiles

    return Row(*case, "host_time", "us", *percentiles(time.microseconds), "stubbed", "", *environment(device()))


def _kernels(plan: "Plan") -> list[dict[str, Any]]:
    from dataclasses import asdict

    directions = {"forward": plan.forward, "backward": plan.backward}
    return [{"direction": name} | asdict(kernel) for name, kernels in directions.items() for kernel in kernels]


def _print(plans: "list[Plan]", title: str, kernels: bool, times: "dict[str, HostTime]") -> None:
    from rich.console import Console
    from rich.table import Table

    from .planned_gpu import NAMES
    from .table import percentiles

    console = Console()
    table = Table(title=f"{title}: {NAMES[plans[0].count]}, not measured")
    table.add_column("provider", overflow="fold")
    for column in ("launches", "of them folds", "convolutions", "GB moved", "MB kept for backward"):
        table.add_column(column, justify="right")
    if times:
        table.add_column("host us (20 % to 80 %)", justify="right")
    for plan in plans:
        f = plan.figures()
        moved = f"{f['bytes_forward'] / 1e9:.2f} + {f['bytes_backward'] / 1e9:.2f}"
        launches = f"{f['launches_forward']} + {f['launches_backward']}"
        folds = f"{f['folds_forward']} + {f['folds_backward']}"
        cells = [plan.provider, launches, folds, str(f["convolutions"]), moved, f"{f['saved_for_backward'] / 1e6:.1f}"]
        if times:
            median, low, high = percentiles(times[plan.provider].microseconds)
            cells.append(f"{median:,.0f} ({low:,.0f} to {high:,.0f})")
        table.add_row(*cells)
    console.print(table)
    for plan in plans if kernels else ():
        listed = Table(title=f"{plan.provider}: planned kernels, forward then backward")
        for column in ("", "kind", "launches", "bytes", "kernel"):
            listed.add_column(column, overflow="fold")
        for kernel in _kernels(plan):
            columns = (kernel[key] for key in ("direction", "kind", "launches", "bytes", "name"))
            listed.add_row(*map(str, columns))
        console.print(listed)
    if plans[0].count == "traced":
        print("As traced on a CPU: bias gradients are part of the convolutions, which on a GPU they are not.")
    print(
        "Planned, not measured: read off the code that Inductor generates for an H100, forward + backward. Launches\n"
        "are Triton kernels and folds; convolutions and matmuls come on top. Bytes are those of all of them."
    )
    if times:
        print(
            "Host time is measured on this CPU, under a CUDA driver that does nothing: the generated code of a step,\n"
            "its launchers and allocations, and our operators where it calls them. Left out for all alike: autograd's\n"
            "engine, AOTAutograd's runtime, guards, and what convolutions, matmuls and the driver take."
        )
