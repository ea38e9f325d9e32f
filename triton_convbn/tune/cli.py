"""`triton-convbn tune`: find, record and put in force the configuration of the fold kernels for a GPU."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..kernels.tuned import BadTunedFile, Gpu, choose, files, gpu_of, user_dir
from ..kernels.tuned import read as read_tuned
from ..progress import errors
from .header import Header, header_of
from .offline import OfflineBench, arch_of
from .outcome import Evaluator
from .problem import Problem, largest_first, problems_of_model
from .report import choice_row, show_choices
from .run import PRESETS, Preset, Replay
from .session import Session, output, stdout, tuned_results
from .store import Store, read, set_aside


class PresetName(StrEnum):
    """The names of PRESETS."""

    QUICK = "quick"
    FULL = "full"


class SearchName(StrEnum):
    """The names of SEARCHES."""

    EXHAUSTIVE = "exhaustive"
    SHUFFLED = "shuffled"
    LOCAL = "local"


def tune(
    model: Annotated[list[str] | None, typer.Option(help="Model name or module:callable; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Of --model; repeatable.", metavar="DTYPE")] = None,
    arch: Annotated[str | None, typer.Option(help="Compile for it, such as sm_90; needs no GPU.")] = None,
    device: Annotated[str | None, typer.Option(help="Measure on it, such as cuda:0.")] = None,
    preset: Annotated[PresetName, typer.Option(help="Space, search and budget.")] = PresetName.QUICK,
    search: Annotated[SearchName | None, typer.Option(help="Replaces the preset's.", metavar="SEARCH")] = None,
    budget: Annotated[float | None, typer.Option(min=1, metavar="SECONDS", help="Of the whole run.")] = None,
    max_configs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Candidates of a key.")] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffled search.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Compilers; default one a core.")] = None,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Of a candidate.")] = 60.0,
    store: Annotated[Path | None, typer.Option(metavar="FILE", help="Records; default in the cache.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every candidate, one a row.")] = None,
    tuned: Annotated[Path | None, typer.Option(metavar="FILE", help="Winners; default the user's file.")] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Resume, or set records aside.")] = True,
    replay: Annotated[Path | None, typer.Option(metavar="FILE", help="Search a store; no winner.")] = None,
    show_: Annotated[bool, typer.Option("--show", help="Show what is in force; tune nothing.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Find the fold kernels' configuration: by time on a GPU, by compiled facts without one.

    Every candidate is recorded as soon as it is known. The same command resumes an interrupted run.
    """
    begun = time.monotonic()
    if replay is None and (arch is None) is (device is None):
        raise UsageError("give --arch sm_90 to rank by compiled facts, or --device cuda:0 to measure")
    chosen = PRESETS[preset]
    chosen = replace(chosen, search=search or chosen.search, seconds=budget or chosen.seconds, configs=max_configs)
    problems = _problems(model or [], dtype or ["float32"])
    if show_:
        _show(problems, _gpu(arch, device)[0], json_)
        return
    if not problems and replay is None:
        raise UsageError("nothing to tune for: give --model NAME")
    if csv is not None:
        _check_writable(csv)
    if replay is not None:
        _replay(replay, problems, chosen, seed, csv, json_)
        return
    gpu, torch_device = _gpu(arch, device)
    header = header_of(gpu, torch_device is not None)
    path = store or _default_store(header)
    if not resume and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("--fresh under torchrun: rename the store yourself, or give another --store")
    if not resume and (old := set_aside(path)) is not None:
        errors.print(f"{path} is set aside as {old.name}", soft_wrap=True, markup=False)
    evaluator: Evaluator
    if torch_device is None:
        evaluator = OfflineBench(gpu.arch, workers or os.cpu_count() or 1, timeout)
    else:
        chosen = replace(chosen, space=chosen.space.measured())
        from .device import DeviceBench

        evaluator = DeviceBench(str(torch_device), timeout)
    Session(header, chosen, path, seed, csv, tuned, json_, begun).run(problems, evaluator)


def _replay(path: Path, problems: list[Problem], preset: Preset, seed: int, csv: Path | None, json_: bool) -> None:
    """Search the records of a store: of all its problems unless models are given."""
    from .device import DeviceBench

    content = read(path)
    header = content.header or Header("")
    bench: type[DeviceBench] | type[OfflineBench] = DeviceBench if header.device else OfflineBench
    problems = problems or largest_first(list(content.problems.values()))
    evaluator = Replay(content, bench.margin, bench.unit)
    results = tuned_results(problems, evaluator, Store(None, header), preset, seed, None, quiet=True)
    output(results, header, content, csv, json_, {"replayed": str(path)})


def _show(problems: Sequence[Problem], gpu: Gpu, json_: bool) -> None:
    """Print the configuration in force for each key of the problems and of the tuned files."""
    keys = {problem.tuned_key for problem in problems}
    looked = [path for _, path in files(gpu.arch)]
    for path in looked:
        try:
            keys |= {entry.key for entry in read_tuned(path)}
        except (OSError, BadTunedFile):  # the lookup itself warns
            continue
    choices = [choose(key, gpu) for key in sorted(keys)]
    where = gpu.name or gpu.arch
    if json_:
        print(json.dumps({"device": where, "files": list(map(str, looked)), "rows": list(map(choice_row, choices))}))
    elif choices:
        show_choices(choices, where, stdout())
    else:
        print(f"nothing is tuned for {where}, every call runs with the default; looked in {looked}")


def _problems(models: Sequence[str], dtypes: Sequence[str]) -> list[Problem]:
    found: list[Problem] = []
    for name in models:
        for dtype in dtypes:
            with errors.status(f"tracing {name}, {dtype}"):
                found += problems_of_model(name, dtype)
    return largest_first(found)


def _gpu(arch: str | None, device: str | None) -> tuple[Gpu, Any]:
    """Return the GPU, and its torch.device if it is measured. "cuda" is the GPU of this process of torchrun."""
    if device is None:
        arch_of(arch or "")
        return Gpu(arch or ""), None
    import torch

    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"no such device: {device}") from error
    if found.type != "cuda" or not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no GPU that torch can use; --arch sm_90 ranks without one")
    index = int(os.environ.get("LOCAL_RANK", 0)) if found.index is None else found.index
    if index >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    found = torch.device("cuda", index)
    return gpu_of(found), found


def _default_store(header: Header) -> Path:
    try:
        return user_dir() / "tune" / f"{header.name}.jsonl"
    except ImportError as error:
        raise UsageError("the cache directory is unknown without platformdirs: give --store FILE") from error


def _check_writable(path: Path) -> None:
    """Raise UsageError now if the CSV cannot be written, not after an hour's run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "its folder cannot be written")
    except OSError as error:
        raise UsageError(f"--csv {path}: {error.strerror or error}") from error
