"""`triton-convbn bench`, `demo`, which is one bench with a fixed setting, and `plot`."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from triton_convbn.errors import UsageError
from triton_convbn.progress import errors, progress

if TYPE_CHECKING:
    import torch

    from .cases import Case
    from .subject import Setting

DEFAULT = ["eager", "inductor", "inductor_efficient_conv_bn", "triton_convbn"]
RESULTS = Path("perf/results")


class Format(StrEnum):
    """The formats of a plot."""

    PNG = "png"
    SVG = "svg"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds; the interval of a ratio needs 6.")]
Size = Annotated[int | None, typer.Option("--size", min=1, help="Height and width of the input; default: the model's.")]
Names = list[str] | None


def bench(
    model: Annotated[Names, typer.Option("--model", help="Name of a model. Repeatable.")] = None,
    layers: Annotated[
        Names, typer.Option("--layers", help="resnet50, mobilenet_v2, resnext, decoder or heads. Repeatable.")
    ] = None,
    mode: Annotated[
        Names, typer.Option("--mode", help="infer, train (default), train-frozen or input-grad. Repeatable.")
    ] = None,
    dtype: Annotated[
        Names, typer.Option("--dtype", help="Such as float32 (default) or autocast_bfloat16. Repeatable.")
    ] = None,
    layout: Annotated[
        Names, typer.Option("--layout", help="contiguous (default) or channels_last. Repeatable.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Batch size, 4 by default. Repeatable.")
    ] = None,
    size: Size = None,
    provider: Annotated[Names, typer.Option("--provider", help=f"By default {', '.join(DEFAULT)}. Repeatable.")] = None,
    rounds: Rounds = 10,
    device: Annotated[str, typer.Option("--device", help="Such as cpu or cuda:0.")] = "cpu",
    cold: Annotated[bool, typer.Option("--cold", help="Compile with empty caches, and report the time.")] = False,
    csv_: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Append the rows to FILE; measure what it lacks.")
    ] = None,
    json_: Json = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", metavar="A B", help="Find regressions from CSV A to CSV B.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Share by which a time may grow, for --compare.")
    ] = 0.05,
) -> None:
    """Measure errors, memory and time of models and layers, and compare ways to run them."""
    if compare is not None:
        from .compare import report as report_changes

        raise typer.Exit(report_changes(*compare, tolerance, json_, Console()))
    if not model and not layers:
        raise UsageError("nothing to measure: give --model NAME or --layers NAME, or --compare A.csv B.csv")
    from .cases import layers as layers_of
    from .cases import whole
    from .subject import DTYPES, LAYOUTS, MODES, Setting

    settings = [
        Setting(*setting)
        for setting in product(
            _known("mode", mode or ["train"], MODES),
            _known("dtype", dtype or ["float32"], DTYPES),
            _known("layout", layout or ["contiguous"], LAYOUTS),
            batch or [4],
        )
    ]
    with errors.status("building the models"):
        cases = [whole(name, size) for name in model or []]
        cases += [case for name in layers or [] for case in layers_of(name)]
    _run(cases, settings, provider or DEFAULT, rounds, device, cold, csv_, json_)


def demo(
    model: Annotated[
        str, typer.Option("--model", help="A torchvision or timm name, or package.module:callable.")
    ] = "resnet18",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Batch size.")] = 4,
    size: Annotated[int, typer.Option("--size", min=32, help="Height and width of the input.")] = 224,
    rounds: Rounds = 7,
    json_: Json = False,
) -> None:
    """Compare a training step in eager, Inductor, Inductor with its own pass, and with ours, on the CPU."""
    from .cases import whole
    from .subject import Setting

    with errors.status("building the model"):
        case = whole(model, size)
    _run([case], [Setting("train", "float32", "contiguous", batch)], DEFAULT, rounds, "cpu", False, None, json_)


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


def draw_memory(path: Path) -> Path:
    """Draw the bytes that a training step of ResNet-50 keeps for backward, from the committed CSVs."""
    from .frame import read
    from .plot import memory

    panels = {}
    for file, title, setting in (
        ("cpu.csv", "CPU, fp32, contiguous, batch 4", {"dtype": "float32", "layout": "contiguous", "batch": 4}),
        (
            "gpu_h200.csv",
            "H200, bf16 autocast, channels_last, batch 32",
            {"dtype": "autocast_bfloat16", "layout": "channels_last", "batch": 32},
        ),
    ):
        frame = read([RESULTS / file])
        for column, value in {"case": "resnet50", "mode": "train", **setting}.items():
            frame = frame[frame[column] == value]
        panels[title] = frame
    return memory(panels, path)


def _known(name: str, given: Sequence[str], known: Iterable[str]) -> list[str]:
    for value in given:
        if value not in known:
            raise UsageError(f"no such {name}: {value}; choose from {', '.join(known)}")
    return list(dict.fromkeys(given))


def _run(
    cases: "Sequence[Case]",
    settings: "Sequence[Setting]",
    names: list[str],
    rounds: int,
    device_name: str,
    cold: bool,
    csv_: Path | None,
    json_: bool,
) -> None:
    import torch

    from . import environment
    from .frame import to_frame
    from .providers import providers
    from .report import Report
    from .run import is_done, measure
    from .subject import subject
    from .table import Key, Log, processor, to_json
    from .tables import show

    chosen = providers(names)
    device = _device(device_name)
    if len(cases) > 1:  # a case that does not run says so before the others have run for an hour
        for case in cases:
            subject(case, settings[0]._replace(batch=1), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # the clock is its events
    name = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    try:
        log = None if csv_ is None else Log(csv_)
        if csv_ is not None:
            environment.note(csv_)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    keys = {Key(case.name, "", *setting) for case, setting in product(cases, settings)}

    def shown() -> list[Any]:
        return [row for row in report.rows if row.key._replace(provider="") in keys]

    with _progress(len(keys) * rounds) as (say, advance):
        report = Report(log, name, say=say, resume=True)
        try:
            for case, setting in product(cases, settings):
                if is_done(Key(case.name, "", *setting), chosen, report):
                    list(advance(range(rounds)))
                else:
                    measure(subject(case, setting, device), chosen, report, rounds, cold, advance)
        except KeyboardInterrupt:
            say(f"interrupted; {len(report.rows)} rows" + (f" are in {csv_}: run it again to resume" if csv_ else ""))
            if shown() and not json_:
                show(to_frame(shown()))
            raise
        finally:
            if log is not None:
                log.close()
    if json_:
        print(to_json(shown(), device=name, csv=None if csv_ is None else str(csv_)))
    else:
        show(to_frame(shown()))
    if any(row.status == "failed" for row in shown()):
        raise typer.Exit(1)


def _device(name: str) -> "torch.device":
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no such device: {name}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: there is a clock for cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: no GPU that torch can use")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[Iterable[int]], Iterator[int]]]]:
    """Show a bar of timed rounds. Yield a function for messages, and one that wraps the rounds."""
    doing = ["starting"]
    with progress(total) as advance:

        def say(text: str) -> None:
            doing[0] = text
            if not errors.is_terminal or text.startswith(("failed", "interrupted")):
                errors.print(text, markup=False, soft_wrap=True)

        def wrap(rounds: Iterable[int]) -> Iterator[int]:
            for index in rounds:
                yield index
                advance(doing[0])

        yield say, wrap
