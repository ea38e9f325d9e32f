"""The machine and versions that a benchmark runs on: columns of its rows, and a JSON file beside its CSV."""

import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

from triton_convbn.kernels.files import locked, write_atomically

from triton_convbn.cpu import cpu
from triton_convbn.errors import UsageError
from triton_convbn.versions import commit, package_version

VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "TORCH", "TRITON", "CUDA_VISIBLE", "LD_PRELOAD")
PACKAGES = ("torch", "triton", "torchvision", "timm", "numpy", "pandas")


def processor() -> str:
    """Return the name of the CPU, its family and model, and the vector instructions that torch uses.

    One name stands for several: AMD EPYC, without a family, is in older tables with AVX2, and with AVX-512 of Zen 5.
    """
    import torch

    try:
        name = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        name = None
    known = name[1].strip() if name else platform.processor() or platform.machine()
    own = cpu()
    if own is not None:
        known += f" family {own.family} model {own.model}"
    return f"{known} ({torch.backends.cpu.get_cpu_capability()})"


def environment(device: str) -> tuple[str, str, str, str]:
    """Return the last columns of a row: device, torch, triton, commit."""
    import torch

    return device, torch.__version__, package_version("triton"), commit()


def describe() -> dict[str, Any]:
    """Return the machine, the versions, and the environment variables that change how fast torch is."""
    import torch

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": commit(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith(VARIABLES)},
    }


def note(path: Path) -> None:
    """Add this run to the JSON file beside that CSV. Raises: UsageError if that file is not a list of runs."""
    target = path.with_suffix(".environment.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as csv, locked(csv):  # two processes that begin at once must both have their entry
        try:
            runs = json.loads(target.read_text(encoding="utf-8")) if target.exists() else []
        except ValueError:
            runs = None
        if not isinstance(runs, list):
            raise UsageError(f"{target} is no list of runs")
        text = json.dumps([*runs, describe()], indent=2, allow_nan=False) + "\n"
        write_atomically(target, text.encode(), mode=0o644)
