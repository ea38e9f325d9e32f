"""`triton-convbn tune`: find, record and put in force the configuration of the fold kernels for a device."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..kernels.tuned import BadTunedFile, choose, files, read
from ..perf.show import stdout
from . import store as stores
from .bar import progress
from .problem import DTYPES
from .ranks import ranks
from .replay import Replay
from .report import choice_row, show_choices
from .run import PRESETS, Preset
from .run import tune as search_all
from .search import SEARCHES
from .session import Session, output
from .target import Asked, largest_first, target_of


def tune(
    model: Annotated[
        list[str] | None, typer.Option("--model", help="Tune for the calls of a model by name; may be repeated.")
    ] = None,
    shapes: Annotated[
        list[Path] | None, typer.Option("--shapes", metavar="FILE", help="Tune for the pairs that a JSON file lists.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help=f"Of --model: {', '.join(DTYPES)}; may be repeated.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option("--arch", help="Rank by compiled facts for it, such as sm_90. Needs no GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="Measure on it, such as cuda:0.")] = None,
    preset: Annotated[str, typer.Option("--preset", help="quick or full.")] = "quick",
    search: Annotated[
        str | None, typer.Option("--search", help="In place of the preset's: exhaustive, shuffled or local.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", min=1, metavar="SECONDS", help="Of the whole run.")
    ] = None,
    max_configs: Annotated[
        int | None, typer.Option("--max-configs", min=1, help="That a key tries at most, those in the store included.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the searches that draw lots.")] = 0,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes that compile; default one a core.")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds after which a candidate counts as hung.")
    ] = 60.0,
    store: Annotated[
        Path | None, typer.Option("--store", metavar="FILE", help="Records; default in the user's cache directory.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write every candidate there, one a row.")
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(
            "--tuned", metavar="FILE", help="Put the winners there; default the user's file, in force at once."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on from the records, or set them aside and begin anew.")
    ] = True,
    replay: Annotated[
        Path | None,
        typer.Option("--replay", metavar="STORE", help="Search recorded outcomes instead; writes no winner."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Say which configuration is in force for each key, and why; tune nothing.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of tables.")] = False,
) -> None:
    """Find the fold kernels' configuration for a device: by time on a GPU, by compiled facts without one.

    Every candidate is recorded as soon as it is known. The same command goes on where a run ended.
    """
    begun = time.monotonic()
    if replay is None and (arch is None) is (device is None):
        raise UsageError("give --arch sm_90 to rank by compiled facts, or --device cuda:0 to measure")
    for name in dtype or ():
        _known("--dtype", name, DTYPES)
    chosen = _preset(preset, search, budget, max_configs)
    asked = Asked(model or [], shapes or [], dtype or ["float32"])
    if show:
        _show(asked, arch, device, json_)
        return
    if not asked.models and not asked.shapes and replay is None:
        raise UsageError("nothing to tune for: give --model NAME or --shapes FILE")
    if csv is not None:
        _writable(csv)
    if replay is not None:
        _replay(replay, asked, chosen, seed, csv, json_)
        return
    with ranks() as mine:
        target = target_of(arch, device, mine.local)
        problems = asked.problems(say=mine.rank == 0)
        if target.device is not None:
            chosen = replace(chosen, space=chosen.space.measured())
        evaluator = target.evaluator(workers, timeout, mine.world)
        Session(target, chosen, mine, seed, store, csv, tuned, json_, begun).run(problems, evaluator, resume)


def _replay(path: Path, asked: Asked, preset: Preset, seed: int, csv: Path | None, json_: bool) -> None:
    """Search recorded outcomes, all problems of the store unless some are asked for."""
    content = stores.read(path)
    problems = asked.problems() if asked else largest_first(list(content.problems.values()))
    header = content.header or stores.Header("")
    with progress(problems, preset, quiet=True) as bar:
        results = search_all(problems, Replay(content), stores.Store(None, header), preset, bar, seed)
    output(results, header, csv, json_, {"replayed": str(path), "unreadable_lines": content.garbage})


def _show(asked: Asked, arch: str | None, device: str | None, json_: bool) -> None:
    gpu = target_of(arch, device).gpu
    keys = dict.fromkeys(problem.tuned_key for problem in asked.problems())
    looked = [path for _, path in files(gpu.arch)]
    for path in looked:
        try:
            keys |= dict.fromkeys(entry.key for entry in read(path))
        except (OSError, BadTunedFile):  # the lookup itself warns of a file that is there and is none
            continue
    choices = [choose(key, gpu) for key in sorted(keys)]
    where = gpu.name or gpu.arch
    if json_:
        print(json.dumps({"device": where, "files": list(map(str, looked)), "rows": list(map(choice_row, choices))}))
    elif choices:
        show_choices(choices, where, stdout())
    else:
        print(f"nothing is tuned for {where}, every call runs with the default; looked in {looked}")


def _known(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{option} {value}: choose one of {', '.join(choices)}")


def _preset(name: str, search: str | None, budget: float | None, configs: int | None) -> Preset:
    _known("--preset", name, tuple(PRESETS))
    preset = PRESETS[name]
    if search is not None:
        _known("--search", search, tuple(SEARCHES))
        preset = replace(preset, search=search)
    if budget is not None:
        preset = replace(preset, seconds=budget)
    return preset if configs is None else replace(preset, configs=configs)


def _writable(path: Path) -> None:
    """A sweep of an hour should not end at a folder that is not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "its folder cannot be written")
    except OSError as error:
        raise UsageError(f"--csv {path}: {error.strerror or error}") from error
