"""Time planned code on the host: what a step's generated wrappers take where the GPU takes no time.

The wrappers run in a process of their own under a CUDA driver that does nothing (`stub_driver.c`). Tensors, the
allocator, Inductor's and Triton's launchers and this package's operators are the real ones. Autograd's engine,
AOTAutograd's runtime and guards are left out. Convolutions, matmuls and other operators of torch return at once, for
every provider alike.
"""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.utils import _pytree as pytree

import triton_convbn
from triton_convbn.errors import UsageError
from triton_convbn.measure import cpu_clock
from triton_convbn.measure import rounds as in_turn
from triton_convbn.ops import library  # noqa: F401  the operators that generated code may call

from .code import DEVICE
from .h100 import CAPABILITY, PROPERTIES
from .planner import Plan

_LIBRARY_CALL = re.compile(
    r"^(\s+)((\w+) = )?(?:torch\.ops\.(?!triton_convbn\.|inductor\.)[\w.]+|aten\.[\w.]+|extern_kernels\.\w+)\(", re.M
)


class HostTime(NamedTuple):
    """The microseconds of a step, forward and backward, round by round, and its launches as the driver counts them."""

    microseconds: list[float]
    launches: int


def host_times(plans: Sequence[Plan], rounds: int = 401) -> dict[str, HostTime]:
    """Time a step of each plan, in rounds that take them in turn. Return the times by provider.

    Raises:
        UsageError: If this torch is not built for CUDA, or the wrappers do not run.
    """
    if not sys.platform.startswith("linux") or torch.version.cuda is None:
        raise UsageError("--host needs Linux and a torch that is built for CUDA; it needs no GPU")
    code = {plan.provider: [(each.text, each.results) for each in plan.generated] for plan in plans}
    with tempfile.TemporaryDirectory(prefix="triton_convbn-") as folder:
        driver, source = f"{folder}/libcuda.so.1", str(Path(__file__).with_name("stub_driver.c"))
        options = ["-xc", "-std=gnu11", "-D_GNU_SOURCE", "-w", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        ran = subprocess.run([get_cpp_compiler(), *options, "-o", driver, source], capture_output=True, text=True)
        if ran.returncode:
            why = ran.stderr.strip().partition("\n")[0]
            raise UsageError(f"the driver that does nothing does not compile: {why}")
        environment = {
            "LD_PRELOAD": driver,
            "TRITON_LIBCUDA_PATH": folder,
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",  # its kernels have no code
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TRITON_INTERPRET": "0",
        }
        # A model by name has put the current folder, which may hold another copy of this package, ahead of this one.
        path = [str(Path(triton_convbn.__file__).parents[1]), *sys.path]
        with (
            mock.patch.dict(os.environ, environment),
            mock.patch.object(sys, "path", path),
            ProcessPoolExecutor(1, get_context("spawn")) as pool,
        ):
            try:
                found = pool.submit(_measure, code, rounds).result()
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                raise UsageError(f"the generated code does not run without a GPU: {why}") from error
    for plan in plans:
        figures, launched = plan.figures(), found[plan.provider].launches
        planned = figures["launches_forward"] + figures["launches_backward"]
        if launched < planned:
            raise RuntimeError(f"{plan.provider}: {planned} launches are planned, the driver counts {launched}")
    return found


# ---- in the process under that driver ------------------------------------------------------------------------------


def _measure(code: dict[str, list[tuple[str, dict[str, Any]]]], rounds: int) -> dict[str, HostTime]:
    """Time a step of each provider's wrappers. The driver counts launches in a variable of its own."""
    counter = ctypes.c_ulonglong.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "launches")
    launches: dict[str, int] = {}
    steps: dict[str, Callable[[], object]] = {}
    with torch.no_grad(), _kernels_without_code():
        torch.cuda.init()
        for provider, wrappers in code.items():
            steps[provider] = step = partial(_step, [_load(*wrapper) for wrapper in wrappers])
            step()  # makes the launchers
            before = counter.value
            step()
            launches[provider] = counter.value - before
        # A step never waits, so its CPU time is its time, and other processes do not count.
        seconds = in_turn(steps, rounds, clock=partial(cpu_clock, now=time.thread_time))
    return {name: HostTime([1e6 * each for each in times], launches[name]) for name, times in seconds.items()}


def _step(calls: list[tuple[Callable[[list[Any]], Any], list[Any]]]) -> None:
    for call, inputs in calls:
        call(inputs.copy())  # the code empties the list that it is given


def _load(text: str, results: dict[str, Any]) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """Return the wrapper's `call` and its inputs. Library calls return tensors made beforehand."""
    module = types.ModuleType("generated")
    text = _LIBRARY_CALL.sub(lambda match: f"{match[1]}{match[2] or ''}return_{match[3] or 'nothing'}(", text)
    exec(compile(text, "<generated>", "exec"), module.__dict__)
    on_gpu = partial(torch.empty_strided, device=DEVICE)
    results = pytree.tree_map_only(Tensor, lambda like: on_gpu(like.shape, like.stride(), dtype=like.dtype), results)
    for name, result in {"nothing": None, **results}.items():
        setattr(module, f"return_{name}", lambda *_, result=result, **__: result)
    with mock.patch("torch._dynamo.testing.rand_strided", torch.empty_strided):
        return module.call, module.get_args()


@contextmanager
def _kernels_without_code() -> Iterator[None]:
    """Let torch see an H100's figures, and Triton make kernels without code: compiling would take minutes.

    Launchers and metadata are the real ones. Of several configurations the first is taken: none can be timed.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource

    def cubin(_module: Any, metadata: dict[str, Any]) -> bytes:
        for kind in ("global", "profile"):
            metadata |= {f"{kind}_scratch_size": 0, f"{kind}_scratch_align": 1}
        metadata |= {"name": "kernel", "shared": 0, "tmem_size": 0, "tensordesc_meta": None}
        return b""

    def add_stages(_self: Any, stages: dict[str, Any], *_options: Any) -> None:
        stages.update(ttir=lambda module, _metadata: module, cubin=cubin)

    def first(self: Any, *_arguments: Any, **_keywords: Any) -> None:
        self.launchers = self.launchers[:1]

    properties, capability = lambda device=None: PROPERTIES, lambda device=None: CAPABILITY
    with (
        mock.patch.multiple(torch.cuda, get_device_properties=properties, get_device_capability=capability),
        mock.patch.object(CUDABackend, "add_stages", add_stages),
        mock.patch.object(ASTSource, "make_ir", return_value=""),
        mock.patch.object(CachingAutotuner, "autotune_to_one_config", first),
    ):
        yield
