"""Host time of planned code: microseconds that the generated wrappers of a step take where the GPU takes none.

The wrappers of the plan run in a process of their own under a CUDA driver that does nothing (`stub_driver.c`). Tensors,
the allocator, Inductor's and Triton's launchers and this package's operators are the real ones. Left out are autograd's
engine, AOTAutograd's runtime, guards, and the host time of convolutions, matmuls and other operators of torch, which
return at once, with every provider alike. Kernels have no code, as nobody runs it.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from triton_convbn.errors import UsageError

from .plan import Plan
from .planned_code import launches_of
from .table import processor

ROUNDS = 101
"""A step takes milliseconds, and what else the machine does is in many of them."""


COMMAND = (sys.executable, "-m", "triton_convbn.perf.host_run")


@dataclass(frozen=True)
class HostTime:
    """microseconds: of a step, forward and backward, round by round. launches: of one step, as the driver counts."""

    microseconds: list[float]
    launches: int


def device() -> str:
    """The device of a row."""
    return f"{processor()} (stubbed)"


def host_times(plans: Sequence[Plan], rounds: int | None = None) -> dict[str, HostTime]:
    """Time a step of each plan, in rounds that take them in turn.

    Raises: UsageError, where this torch is not built for CUDA or the wrappers do not run.
    """
    check()
    given = {
        "rounds": rounds or ROUNDS,
        "wrappers": {plan.provider: [asdict(each) for each in plan.wrappers] for plan in plans},
    }
    with tempfile.TemporaryDirectory(prefix="triton_convbn-") as made:
        directory = Path(made)
        environment = os.environ | {
            "LD_PRELOAD": str(build(directory)),
            "TRITON_LIBCUDA_PATH": made,
            "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),  # its kernels have no code
            "TRITON_CACHE_DIR": str(directory / "triton"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TRITON_INTERPRET": "0",
        }
        ran = subprocess.run(COMMAND, input=json.dumps(given), capture_output=True, text=True, env=environment)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
        raise UsageError(f"the generated code does not run without a GPU: {last}")
    found = json.loads(ran.stdout)
    for plan in plans:
        launched, planned = (
            found["launches"][plan.provider],
            launches_of([*plan.forward, *plan.backward], "triton", "fold"),
        )
        if launched < planned:
            raise RuntimeError(f"{plan.provider}: {planned} launches are planned, the driver counts {launched}")
    return {name: HostTime(times, found["launches"][name]) for name, times in found["microseconds"].items()}


def check() -> None:
    """Raise UsageError, where there is nothing to run the wrappers with."""
    if not sys.platform.startswith("linux") or torch.version.cuda is None:
        raise UsageError("--host needs Linux and a torch that is built for CUDA; a GPU it does not need")


def build(directory: Path) -> Path:
    """Compile the driver that does nothing. Raises: UsageError where the compiler fails."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    library = directory / "libcuda.so.1"
    options = ["-x", "c", "-std=gnu11", "-D_GNU_SOURCE", "-w", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    source = Path(__file__).with_name("stub_driver.c")
    command = [get_cpp_compiler(), *options, "-o", str(library), str(source)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise UsageError(f"the driver that does nothing cannot be compiled: {ran.stderr.strip().splitlines()[0]}")
    return library
