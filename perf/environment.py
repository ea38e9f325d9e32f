"""On what a benchmark ran: a JSON file beside its CSV, with an entry for every run."""

import json
import os
import platform
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from .table import commit, locked, processor

VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "TORCH", "TRITON", "CUDA_VISIBLE", "LD_PRELOAD")
PACKAGES = ("torch", "triton", "torchvision", "timm", "numpy", "pandas")


def describe() -> dict[str, Any]:
    """The machine, the versions, and what of the environment changes how fast torch is."""
    installed = {d.metadata["Name"].lower(): d.version for d in distributions() if d.metadata["Name"]}
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: installed[name] for name in PACKAGES if name in installed},
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith(VARIABLES)},
    }


def beside(path: Path) -> Path:
    return path.with_suffix(".environment.json")


def note(path: Path) -> None:
    """Add this run to the file beside that CSV. What is no such list there is left alone, as a ValueError."""
    target = beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as csv, locked(csv):  # or of two processes that begin at once one would lose its entry
        try:
            runs = json.loads(target.read_text(encoding="utf-8"))
        except FileNotFoundError:
            runs = []
        except ValueError:
            runs = None
        if not isinstance(runs, list):
            raise ValueError(f"{target} is no list of runs")
        draft = target.with_name(f"{target.name}.{os.getpid()}")
        draft.write_text(json.dumps([*runs, describe()], indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(target)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
