"""`triton-convbn bench`, and `triton-convbn demo`, which is one bench with a fixed setting."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from triton_convbn.errors import UsageError

if TYPE_CHECKING:
    import torch

    from .cases import Case
    from .subject import Setting

DEFAULT = ["eager", "inductor", "inductor_efficient_conv_bn", "triton_convbn"]
_errors = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of tables.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed rounds; an interval of a ratio needs 6.")]
Size = Annotated[int | None, typer.Option("--size", min=1, help="Height and width of the input; default the model's.")]


def bench(
    model: Annotated[list[str] | None, typer.Option("--model", help="A model by name; may be repeated.")] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", help="Layers: resnet50, mobilenet_v2, resnext, decoder or heads; may be repeated."),
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option("--mode", help="infer, train, train-frozen, input-grad; default train.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="Such as float32 or autocast_bfloat16.")] = None,
    layout: Annotated[list[str] | None, typer.Option("--layout", help="contiguous or channels_last.")] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Default 4; may be repeated.")] = None,
    size: Size = None,
    provider: Annotated[list[str] | None, typer.Option("--provider", help=f"Default {', '.join(DEFAULT)}.")] = None,
    rounds: Rounds = 10,
    device: Annotated[str, typer.Option("--device", help="cpu, or cuda:0 and so on.")] = "cpu",
    cold: Annotated[
        bool, typer.Option("--cold", help="Compile with empty caches, and report how long it took.")
    ] = False,
    csv_: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Rows are added there; what it has already is not run again."),
    ] = None,
    json_: Json = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option("--compare", metavar="A B", help="Find regressions from CSV A to CSV B.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Of --compare: by how much a time may grow.")
    ] = 0.05,
) -> None:
    """Measure what the pass buys: errors, memory and time of models and layers, against the other ways to run them."""
    if compare is not None:
        from .compare import report as report_changes

        raise typer.Exit(report_changes(*compare, tolerance, json_, Console()))
    if not model and not layers:
        raise UsageError("nothing to measure: give --model NAME or --layers NAME, or --compare A.csv B.csv")
    from .cases import layers as layers_of
    from .cases import whole
    from .subject import DTYPES, LAYOUTS, MODES, Setting

    settings = [
        Setting(m, d, lay, b)
        for m in _known("mode", mode or ["train"], MODES)
        for d in _known("dtype", dtype or ["float32"], DTYPES)
        for lay in _known("layout", layout or ["contiguous"], LAYOUTS)
        for b in batch or [4]
    ]
    with _errors.status("making the cases"):
        cases = [whole(name, size) for name in model or []]
        cases += [case for name in layers or [] for case in layers_of(name)]
    _run(cases, settings, provider or DEFAULT, rounds, device, cold, csv_, json_)


def demo(
    model: Annotated[
        str, typer.Option("--model", help="A torchvision or timm name, or package.module:callable.")
    ] = "resnet18",
    batch: Annotated[int, typer.Option(min=1)] = 4,
    size: Annotated[int, typer.Option(min=32)] = 224,
    rounds: Rounds = 7,
    json_: Json = False,
) -> None:
    """Train one step of a model in eager, Inductor, Inductor with its own pass, and ours; compare. On the CPU."""
    from .cases import whole
    from .subject import Setting

    with _errors.status("making the model"):
        case = whole(model, size)
    _run([case], [Setting("train", "float32", "contiguous", batch)], DEFAULT, rounds, "cpu", False, None, json_)


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
    from .providers import providers
    from .report import Report
    from .run import is_done, measure
    from .show import show
    from .subject import subject
    from .table import Key, Log, processor, to_json

    chosen = providers(names)
    device = _device(device_name)
    if len(cases) > 1:  # a case that does not run says so before the others have run for an hour
        for case in cases:
            subject(case, settings[0]._replace(batch=1), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # whose events are the clock
    name = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    try:
        log = None if csv_ is None else Log(csv_)
        if csv_ is not None:
            environment.note(csv_)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    keys = [Key(case.name, "", *setting) for case, setting in product(cases, settings)]
    with _progress(len(keys) * rounds) as (say, advance):
        report = Report(log, name, say=say, resume=True)
        try:
            for case, setting in product(cases, settings):
                if is_done(Key(case.name, "", *setting), chosen, report):
                    advance(rounds)
                else:
                    each = subject(case, setting, device)
                    measure(each, chosen, report, rounds, cold, lambda of: _ticking(of, advance))
        except KeyboardInterrupt:
            say(f"interrupted; {len(report.rows)} rows" + (f" are in {csv_}: run it again to go on" if csv_ else ""))
            if not json_:
                show(report, keys)
            raise
        finally:
            if log is not None:
                log.close()
    shown = [row for row in report.rows if row.key._replace(provider="") in keys]
    if json_:
        print(to_json(shown, device=name, csv=None if csv_ is None else str(csv_)))
    else:
        show(report, keys)
    if any(row.status == "failed" for row in shown):  # what else the file holds is of another bench
        raise typer.Exit(1)


def _device(name: str) -> "torch.device":
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no such device: {name}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: no GPU that torch can use")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: there is a clock for cpu and cuda")
    return device


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """A bar of timed rounds; where stderr is no terminal, lines. Yields what takes a text and what takes a number."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=_errors, transient=True) as bar:
        task = bar.add_task("starting", total=total)

        def say(text: str) -> None:
            bar.update(task, description=text)
            if not _errors.is_terminal or text.startswith(("failed", "interrupted")):
                bar.console.print(text, markup=False, soft_wrap=True)

        yield say, lambda count: bar.update(task, advance=count)


def _ticking(rounds: Iterable[int], advance: Callable[[int], None]) -> Iterator[int]:
    for index in rounds:
        yield index
        advance(1)
