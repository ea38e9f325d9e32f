"""`triton-convbn tune`: find, record and put in force the configuration of the fold kernels for a GPU."""

import hashlib
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..arguments import Shapes
from ..errors import UsageError, choose
from ..kernels.config import EVICTS
from ..kernels.offline import ARCHS
from ..kernels.tuned import Gpu, gpu_of
from ..kernels.tuned_files import BadTunedFile, user_dir, user_file, write
from ..kernels.tuned_files import read as read_tuned
from ..progress import errors, progress
from .bench import Bench
from .problem import Problem, configurations, largest_first, problems_of_model
from .report import entries_of, output, output_choices
from .run import PRESETS, Preset, Strategy, search
from .store import Header, Store, set_aside


def tune(
    model: Annotated[
        list[str] | None, typer.Option(help="A torchvision or timm name, or package.module:callable. Repeatable.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Dtype, by default float32. Repeatable.", metavar="DTYPE")
    ] = None,
    shape: Shapes = None,
    arch: Annotated[
        str | None, typer.Option(help="Compile for this architecture, such as sm_90, and run nothing on a GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Measure on this GPU, such as cuda:0.")] = None,
    preset: Annotated[Literal["quick", "full"], typer.Option(help="Search for two minutes, or try all.")] = "quick",
    search_: Annotated[Strategy | None, typer.Option("--search", help="Use this search, not the preset's.")] = None,
    budget: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="Seconds after which the run ends.")
    ] = None,
    max_configs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Most configurations for one problem.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of --search shuffled.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes that compile, by default one per core.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Seconds after which a candidate counts as hung.")
    ] = 60.0,
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append records to FILE, by default one in the user's cache.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Write a row for each candidate to FILE.")
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Write winners to FILE, by default where launches look."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on from the store's records, or set them aside.")
    ] = True,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Repeat a search on the records of FILE without writing a winner."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the configurations in force and tune nothing.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Find the fold kernels' configuration: by time on a GPU, by compiled facts without one.

    Every candidate is recorded as soon as it is known. The same command resumes an interrupted run.
    """
    begun = time.monotonic()
    if replay is None and (arch is None) is (device is None):
        raise UsageError("give --arch sm_90 to rank by compiled facts, or --device cuda:0 to measure")
    if not (model or show or replay):
        raise UsageError("nothing to tune for: give --model NAME")
    if tuned is not None and tuned.is_file():
        try:
            read_tuned(tuned)
        except BadTunedFile as error:
            raise UsageError(f"{error}; give another --tuned") from error
    gpu, device = _gpu(arch, device)
    traced: list[Problem] = []
    for name, each in product(model or [], dtype or ["float32"]):
        with errors.status(f"tracing {name}, {each}"):
            traced += problems_of_model(name, each, shape)
    problems = largest_first(traced)
    if show:
        output_choices({problem.tuned_key for problem in problems}, gpu, json_)
        return
    given: dict[str, Any] = {"strategy": search_, "seconds": budget, "configs": max_configs, "seed": seed}
    chosen = replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})
    if replay is not None:
        recorded = Store.read(replay)
        found = search(problems or largest_first(recorded.problems.values()), None, recorded, chosen, begun)
        output(found, recorded, csv, json_, {"replayed": str(replay)})
        return
    header = Header.of(gpu)
    name = f"{gpu.arch}-{hashlib.sha256(repr(header).encode()).hexdigest()[:12]}.jsonl"
    path = store or user_dir() / "tune" / name
    if not resume:
        if "WORLD_SIZE" in os.environ:
            raise UsageError("--fresh under torchrun: rename the store yourself, or give another --store")
        if old := set_aside(path):
            print(f"{path} is set aside as {old.name}", file=sys.stderr)
    records = Store.open(path, header)
    from .evaluate import compile_candidate, time_candidates

    if device:
        bench = Bench(partial(time_candidates, device=device), 1, timeout, noisy=True)
        chosen = replace(chosen, space=replace(chosen.space, evict=EVICTS))
    else:
        bench = Bench(partial(compile_candidate, arch=gpu.arch), workers or os.cpu_count() or 1, timeout)
    run(problems, bench, records, chosen, begun, csv, tuned, json_)


def run(
    problems: Sequence[Problem],
    bench: Bench,
    store: Store,
    preset: Preset,
    begun: float,
    csv: Path | None = None,
    tuned: Path | None = None,
    json_: bool = False,
) -> None:
    """Tune, record, put the winners in force, report, and close the bench.

    Under torchrun, each process takes its share of the keys, so that candidates of a key are compared on one device.
    All share one store and one tuned file. Each writes its own CSV, with the rank in the name.

    Raises:
        UsageError: The store or the CSV cannot be written.
        typer.Exit: With code 1. Nothing can win a problem, or the winners cannot be written.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    keys = list(dict.fromkeys(problem.tuned_key for problem in problems))[rank::world]
    problems = [problem for problem in problems if problem.tuned_key in keys]
    if csv is not None and world > 1:
        csv = csv.with_stem(f"{csv.stem}-{rank}")
    every = sum(len(configurations(preset.space, problem)) for problem in problems)
    try:
        with closing(bench), progress(every, quiet=world > 1) as advance:
            searches = search(problems, bench, store, preset, begun, advance)
    except KeyboardInterrupt:
        count = sum(map(len, store.outcomes.values()))
        print(f"interrupted: {count} records are in {store.path}; the same command resumes", file=sys.stderr)
        raise
    target = tuned or user_file(store.header.arch)
    entries = entries_of(searches, store.header)
    try:
        if entries:
            write(target, store.header.arch, entries)
    except OSError as error:
        print(f"the winners are not in force, for {target} cannot be written: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    finally:
        output(searches, store, csv, json_, {"store": str(store.path), "tuned": str(target)})
    if not json_:
        winners = f"winners of {len(entries)} keys are in {target}" if entries else "there is no winner"
        print(f"{winners}; records are in {store.path}")
    if any(each.ended and each.winner is None and each.first is None for each in searches):
        raise typer.Exit(1)


def _gpu(arch: str | None, device: str | None) -> tuple[Gpu, str]:
    """Return the GPU, and its device if it is measured. "cuda" is the GPU of this process of torchrun."""
    if device is None:
        return Gpu(choose("architecture", [arch], ARCHS)[0] if arch else ""), ""
    import torch

    device = device if ":" in device else f"{device}:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        gpu = gpu_of(torch.device(device))
        if not gpu.arch:
            raise RuntimeError("this is no GPU")
    except (RuntimeError, AssertionError) as error:  # torch's, for an unknown device or a missing GPU
        raise UsageError(f"--device {device}: {error}; --arch sm_90 ranks without a GPU") from error
    return gpu, device
