"""An H100 that is not there: what Inductor asks of the device and of Triton's driver while it generates code.

Inside `planned_h100` torch and Triton say that there is one H100. Nothing can run on it; only code can be generated.
The figures are those that the driver reports for an H100 SXM. Afterwards everything is as it was.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from triton_convbn.errors import UsageError

NAMES = {"gpu": "NVIDIA H100 (planned)", "traced": "NVIDIA H100, as traced (planned)"}
"""The device of a row, by what is counted; see `plan`."""

CAPABILITY = (9, 0)
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    clock_rate=1_980_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
    gcnArchName="",
)

# Modules whose caches hold answers about the device. What was cached before the block says that there is none, and what
# is cached in it says that there is an H100.
_CACHES = ("torch.utils._triton", "torch._inductor.utils", "torch._inductor.runtime.hints")


class _Driver:
    """Triton's driver, as far as code generation asks it anything."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], PROPERTIES.warp_size)

    def get_current_device(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"a planned GPU has no {name}")


def check() -> None:
    """Raise UsageError, where this torch or Triton cannot generate code for a GPU."""
    try:
        from triton.backends import backends
        from triton.runtime.driver import driver
    except ImportError as error:
        raise UsageError(f"planning for a GPU needs triton 3.6 or later: {error}") from error
    if "nvidia" not in backends:
        raise UsageError("planning for an H100 needs a triton with NVIDIA's backend")
    if torch.version.hip is not None:
        raise UsageError("planning for an H100 needs a torch for CUDA or for the CPU; this one is for ROCm")
    missing = [name for owner, name in _replaced(driver) if not hasattr(owner, name)]
    if missing:
        raise UsageError(f"planning for a GPU was made for torch 2.14; torch {torch.__version__} has no {missing[0]}")


@contextmanager
def planned_h100() -> Iterator[None]:
    """Let torch and Triton see an H100 inside the block. Do not let anything run there that computes."""
    from torch._dynamo import device_interface
    from triton.runtime.driver import driver

    with ExitStack() as stack:
        for (owner, name), value in _replaced(driver).items():
            stack.enter_context(mock.patch.object(owner, name, value))
        for known in ("caching_worker_device_properties", "caching_worker_current_devices"):
            stack.enter_context(mock.patch.dict(getattr(device_interface, known), clear=True))
        stack.callback(_clear_caches)
        _clear_caches()
        yield


def _replaced(driver: Any) -> dict[tuple[Any, str], Any]:
    """What stands in for each attribute that Inductor, Dynamo and Triton read."""
    from torch._dynamo.device_interface import CudaInterface

    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "is_bf16_supported": lambda including_emulation=True: True,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        # Compilation keeps the state of the random generators.
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
    }
    # Dynamo's interface took its own references when it was imported.
    interface = ("current_device", "get_device_properties", "is_bf16_supported", "exchange_device")
    return (
        {(torch.cuda, name): value for name, value in cuda.items()}
        | {(CudaInterface, name): staticmethod(cuda.get(name, cuda["_exchange_device"])) for name in interface}
        | {(CudaInterface, "maybe_exchange_device"): staticmethod(cuda["_maybe_exchange_device"])}
        | {(driver, "_active"): _Driver()}
        | {(torch._C, "_select_conv_backend"): functools.partial(_convolution_backend, torch._C._select_conv_backend)}
    )


def _convolution_backend(select: Callable[..., Any], *positional: Tensor, **options: Any) -> Any:
    """Return the backend of a convolution, for bf16 the one of fp16.

    Without a GPU, torch assumes a cuDNN that has no bf16, and a convolution that returns everything contiguous.
    ResNet-50's backward would then have 93 copies more than in fp16 (planned once without this), which an H100 does not
    need. torch 2.11 passes every argument by keyword.
    """
    options |= dict(zip(("input", "weight"), positional, strict=False))
    if options["input"].dtype == torch.bfloat16:
        for name in ("input", "weight", "bias"):
            if options.get(name) is not None:
                options[name] = options[name].half()
    return select(**options)


def _clear_caches() -> None:
    for name in _CACHES:
        members = list(vars(sys.modules[name]).values()) if name in sys.modules else []
        for owner in [member for member in members if isinstance(member, type) and member.__module__ == name]:
            members += [getattr(method, "__func__", method) for method in vars(owner).values()]
        for member in members:
            if isinstance(member, functools._lru_cache_wrapper):
                member.cache_clear()
