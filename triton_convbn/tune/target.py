"""What a run is asked to tune for: the problems, and the GPU, which need not be there."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..kernels.tuned import Gpu, gpu_of
from ..perf.table import package_version
from .archs import arch_of
from .bar import errors
from .bench import OfflineBench
from .device import DeviceBench
from .outcome import Evaluator
from .problem import Problem, problems_of_file, problems_of_model
from .store import Header, source_hash


@dataclass(frozen=True)
class Asked:
    """The shapes, as given on the command line."""

    models: Sequence[str]
    shapes: Sequence[Path]
    dtypes: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.models or self.shapes)

    def problems(self, say: bool = True) -> list[Problem]:
        """Of each model, dtype and file the largest call of each tuned key. say: on stderr, what takes seconds."""
        found: list[Problem] = []
        for path in self.shapes:
            found += problems_of_file(path)
        for name in self.models:
            for dtype in self.dtypes:
                with errors.status(f"tracing {name}, {dtype}") if say else nullcontext():
                    found += problems_of_model(name, dtype)
        return largest_first(found)


def largest_first(problems: Sequence[Problem]) -> list[Problem]:
    """Each problem once, those of one key together, the largest first; keys in the order of their first problems."""
    by_key: dict[str, list[Problem]] = {}
    for problem in dict.fromkeys(problems):
        by_key.setdefault(problem.tuned_key, []).append(problem)
    return [problem for same in by_key.values() for problem in sorted(same, key=lambda each: -each.elements)]


@dataclass(frozen=True)
class Target:
    """A GPU, and its device where it is there and is measured."""

    gpu: Gpu
    device: Any = None

    def header(self) -> Header:
        """Of the records of a run on it."""
        name, driver = "", ""
        if self.device is not None:
            import torch

            cuda = getattr(torch._C, "_cuda_getDriverVersion", str)  # not there in a build for ROCm
            name, driver = self.gpu.name, str(torch.version.hip or cuda())
        return Header(self.gpu.arch, name, driver, package_version("torch"), package_version("triton"), source_hash())

    def evaluator(self, workers: int | None, timeout: float, ranks: int) -> Evaluator:
        """workers: processes that compile; None: one a core, of this machine's that `ranks` share."""
        workers = workers or max(1, (os.cpu_count() or 1) // ranks)
        if self.device is None:
            return OfflineBench(self.gpu.arch, workers=workers, timeout=timeout)
        return DeviceBench(self.device, timeout=timeout)


def target_of(arch: str | None, device: str | None, local: int = 0) -> Target:
    """The target of --arch or of --device, where "cuda" is the GPU of that number.

    Raises: UsageError for an architecture that is not known and for a GPU that is not there.
    """
    if device is None:
        return Target(Gpu(arch_of(arch or "").name))
    import torch

    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"no such device: {device}") from error
    if found.type != "cuda" or not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no GPU that torch can use; --arch sm_90 ranks without one")
    index = local if found.index is None else found.index
    if index >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    found = torch.device("cuda", index)
    return Target(gpu_of(found), found)
