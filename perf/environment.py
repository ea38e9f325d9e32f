"""The machine and versions that a benchmark ran on: a JSON file beside its CSV, with an entry for every run."""

import json
import os
import platform
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from triton_convbn.kernels.files import write_atomically

from .table import commit, locked, processor

VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "TORCH", "TRITON", "CUDA_VISIBLE", "LD_PRELOAD")
PACKAGES = ("torch", "triton", "torchvision", "timm", "numpy", "pandas")


def describe() -> dict[str, Any]:
    """Return the machine, the versions, and the environment variables that change how fast torch is."""
    installed = {d.metadata["Name"].lower(): d.version for d in distributions() if d.metadata["Name"]}
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        memory = None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
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
    """Return the file beside that CSV."""
    return path.with_suffix(".environment.json")


def note(path: Path) -> None:
    """Add this run to the file beside that CSV. Raises: ValueError if that file is not a list of runs."""
    target = beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as csv, locked(csv):  # two processes that begin at once must both have their entry
        try:
            runs = json.loads(target.read_text(encoding="utf-8"))
        except FileNotFoundError:
            runs = []
        except ValueError:
            runs = None
        if not isinstance(runs, list):
            raise ValueError(f"{target} is no list of runs")
        text = json.dumps([*runs, describe()], indent=2, allow_nan=False) + "\n"
        write_atomically(target, text.encode(), mode=0o644)
