"""`triton-convbn bench`, `demo`, which is one bench with a fixed setting, and `plot`."""

import json
from collections.abc import Iterable, Iterator
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from triton_convbn.arguments import Model, Shapes, Size
from triton_convbn.errors import UsageError, choose, first_line
from triton_convbn.progress import errors, progress

from .command import Csv, Json, Rounds, print_rows
from .results import PROVIDER_ORDER

if TYPE_CHECKING:
    import torch

DEFAULT = ["eager", "inductor", "inductor_efficient_conv_bn", "triton_convbn"]
MORE = [name for name in PROVIDER_ORDER if name not in DEFAULT and not name.endswith("_reduce_overhead")]
"""The other providers, but for those that need a GPU: `dev gpu-check` runs these."""

Mode = StrEnum("Mode", ["infer", "train", "train-frozen", "input-grad"])
Dtype = StrEnum("Dtype", ["float32", "float64", "float16", "bfloat16", "autocast_float16", "autocast_bfloat16"])
Layout = StrEnum("Layout", ["contiguous", "channels_last"])
Format = StrEnum("Format", ["png", "svg"])
Names = list[str] | None


def bench(
    model: Annotated[Names, typer.Option("--model", help="Name of a model. Repeatable.")] = None,
    layers: Annotated[
        Names,
        typer.Option("--layers", help="resnet50, mobilenet_v2, activations, resnext, decoder, heads or rt_detr."),
    ] = None,
    mode: Annotated[list[Mode] | None, typer.Option("--mode", help="By default train. Repeatable.")] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option("--dtype", help="By default float32. Repeatable.")] = None,
    layout: Annotated[list[Layout] | None, typer.Option("--layout", help="By default contiguous. Repeatable.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Batch size, 4 by default. Repeatable.")
    ] = None,
    size: Size = None,
    shape: Shapes = None,
    provider: Annotated[
        Names,
        typer.Option("--provider", help=f"By default {', '.join(DEFAULT)}. Others: {', '.join(MORE)}. Repeatable."),
    ] = None,
    rounds: Rounds = 10,
    device: Annotated[str, typer.Option("--device", help="Such as cpu or cuda:0.")] = "cpu",
    cold: Annotated[bool, typer.Option("--cold", help="Report the time of a cold compilation.")] = False,
    csv_: Csv = None,
    json_: Json = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", metavar="A B", help="Find regressions from CSV A to CSV B.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Growth of times that --compare allows.")
    ] = 0.05,
) -> None:
    """Measure errors, memory and time of models and layers, and compare ways to run them.

    What the file of --csv has from the same device, versions and commit is not measured again.
    """
    if compare is not None:
        from .compare import report as report_changes

        raise typer.Exit(report_changes(*compare, tolerance, json_))
    if not model and not layers:
        raise UsageError("nothing to measure: give --model NAME or --layers NAME, or --compare A.csv B.csv")
    if shape and not model:
        raise UsageError("--shape gives the inputs of --model; layers have inputs of their own")
    import torch

    from . import environment
    from .providers import PROVIDERS
    from .results import Key, Report, Row
    from .runner import is_done, measure
    from .subject import subject
    from .workloads import LAYERS, Setting, whole

    chosen = [PROVIDERS[name] for name in choose("provider", provider or DEFAULT, PROVIDERS)]
    where = _device(device)
    with errors.status("building the models"):
        cases = [whole(name, size, shape, batch[0] if batch else None) for name in model or []]
        cases += [case for name in choose("layers", layers or [], LAYERS) for case in LAYERS[name]()]
    each_setting = product(mode or ("train",), dtype or ("float32",), layout or ("contiguous",), batch or (4,))
    settings = list(dict.fromkeys(Setting(str(a), str(b), str(c), count) for a, b, c, count in each_setting))
    if len(cases) > 1:  # a case that does not run fails before the others have run for an hour
        for case in cases:
            subject(case, settings[0]._replace(batch=1), torch.device("cpu"))
    if where.type == "cuda":
        torch.cuda.set_device(where)  # the clock uses its events
    name = environment.processor() if where.type == "cpu" else torch.cuda.get_device_name(where)
    report = Report(csv_, name, resume=True)
    if csv_ is not None:
        environment.note(csv_)
    fitted = [(case, case.own_batch(setting)) for case, setting in product(cases, settings)]
    keys = {Key(case.name, "", *setting): (case, setting) for case, setting in fitted}
    with progress(len(keys) * rounds) as advance:

        def say(text: str) -> None:
            advance(text, 0)
            if not errors.is_terminal or text.startswith(("failed", "interrupted")):
                errors.print(text, markup=False, soft_wrap=True)

        def timed(indices: Iterable[int]) -> Iterator[int]:
            for index in indices:
                yield index
                advance()

        def shown() -> list[Row]:
            return [row for row in report.rows if row.key._replace(provider="") in keys]

        report.say = say
        try:
            for key, (case, setting) in keys.items():
                if is_done(key, chosen, report):
                    advance(steps=rounds)
                else:
                    measure(subject(case, setting, where), chosen, report, rounds, cold, timed)
        except KeyboardInterrupt:
            say(f"interrupted; {len(report.rows)} rows" + (f" are in {csv_}: run it again to resume" if csv_ else ""))
            if shown() and not json_:
                print_rows(shown(), False, one_table=False)
            raise
    print_rows(shown(), json_, one_table=False, device=name, csv=csv_ and str(csv_))
    if any(row.status == "failed" for row in shown()):
        raise typer.Exit(1)


def demo(
    model: Model = "resnet18",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Batch size.")] = 4,
    size: Annotated[int, typer.Option("--size", min=32, help="Height and width of the input.")] = 224,
    rounds: Rounds = 7,
    json_: Json = False,
) -> None:
    """Compare a training step in eager, Inductor, Inductor with its own pass, and with ours, on the CPU."""
    bench(model=[model], batch=[batch], size=size, rounds=rounds, json_=json_)


def plot(
    files: Annotated[list[Path] | None, typer.Argument(metavar="CSV", help="Files that `bench` wrote.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the plots; default: out.")] = None,
    format_: Annotated[list[Format] | None, typer.Option("--format", help="Both by default. Repeatable.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables instead of drawing plots.")] = False,
    metric: Annotated[Names, typer.Option("--metric", help="A metric as in the CSV. Repeatable.")] = None,
    memory: Annotated[
        Path | None, typer.Option("--memory", metavar="SVG", help="Draw README's picture from perf/results.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the written files as one JSON object.")] = False,
) -> None:
    """Draw what the benchmark measured, or print it as Markdown tables. Existing plots are replaced."""
    if memory is not None:
        from .plot import memory as draw_memory

        print(draw_memory(memory))
        return
    if not files:
        raise UsageError("Missing argument 'CSV...'")
    if markdown and (out or format_ or json_):
        raise UsageError("--markdown prints tables and writes no file: leave out --out, --format and --json")
    from .frame import read

    frame = read(files)
    if markdown:
        from .tables import tables

        print(tables(frame, metric or ()), end="")
        return
    from .plot import plots

    written = [str(path) for path in plots(frame, out or Path("out"), format_ or list(Format), metric or ())]
    print(json.dumps({"files": written}) if json_ else "\n".join(written))


def _device(name: str) -> "torch.device":
    """Return a device with a clock. Raises: UsageError if there is no such device here."""
    import torch

    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"no such device: {name} ({first_line(error)})") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: there is a clock for cpu and cuda")
    return device
