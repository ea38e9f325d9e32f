"""Pretend that there is an H100: what Inductor reads of the device and of Triton's driver to generate code.

Nothing can run on it. The figures are those that the driver reports for an H100 SXM.
"""

import functools
import importlib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from triton_convbn.errors import UsageError

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
)
CAPABILITY = (PROPERTIES.major, PROPERTIES.minor)

# Functions of these modules cache answers about the device, which change where the block begins and ends.
_CACHING = ("torch.utils._triton", "torch._inductor.utils", "torch._inductor.runtime.hints")


def check() -> None:
    """Raise UsageError if this torch or Triton cannot generate code for an H100."""
    try:
        from triton.backends import backends
    except ImportError:
        backends = {}
    if "nvidia" not in backends:
        raise UsageError("planning for an H100 needs a triton with NVIDIA's backend")
    if torch.version.hip is not None:
        raise UsageError("planning for an H100 needs a torch for CUDA or for the CPU; this one is for ROCm")


@contextmanager
def pretended_h100() -> Iterator[None]:
    """Let torch and Triton see an H100 inside the block, which must not compute anything."""
    from torch._dynamo import device_interface
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    target = GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], PROPERTIES.warp_size)
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
        # Compilation saves and restores the state of the random generators.
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
    }
    # Dynamo's interface keeps references of its own, two of them under other names.
    own = ("current_device", "get_device_properties", "is_bf16_supported", "_exchange_device", "_maybe_exchange_device")
    interface: dict[str, Any] = {name.lstrip("_"): staticmethod(cuda[name]) for name in own}
    active = types.SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    conv_backend = functools.partial(_conv_backend, torch._C._select_conv_backend)
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.multiple(CudaInterface, **interface),
        mock.patch.object(driver, "_active", active),
        mock.patch.object(torch._C, "_select_conv_backend", conv_backend),
        mock.patch.dict(device_interface.caching_worker_device_properties, clear=True),
        mock.patch.dict(device_interface.caching_worker_current_devices, clear=True),
    ):
        _clear_caches()
        try:
            yield
        finally:
            _clear_caches()


def _conv_backend(select: Callable[..., Any], *positional: Tensor, **options: Any) -> Any:
    """Return the backend of a convolution, for bf16 the one of fp16.

    Without a GPU, torch assumes a cuDNN that has no bf16, and a convolution that returns everything contiguous.
    ResNet-50's backward would then have 93 copies more than in fp16, which an H100 does not need. torch 2.11 passes
    every argument by keyword.
    """
    options |= dict(zip(("input", "weight"), positional, strict=False))
    if options["input"].dtype == torch.bfloat16:
        for name in ("input", "weight", "bias"):
            if options.get(name) is not None:
                options[name] = options[name].half()
    return select(**options)


def _clear_caches() -> None:
    """Clear the caches of the functions, and of the classes' methods. `gc.get_objects` has none after `gc.freeze`."""
    for name in _CACHING:
        module = importlib.import_module(name)
        scopes = [vars(module), *(vars(each) for each in vars(module).values() if isinstance(each, type))]
        for each in (value for scope in scopes for value in scope.values()):
            cached = getattr(each, "__func__", each)  # of a static or a class method
            if type(cached) is functools._lru_cache_wrapper:
                cached.cache_clear()
