"""Compile generated kernels for a GPU that need not be there, and report facts about the machine code.

Nothing runs on a GPU: the facts come from Triton's ptxas and LLVM and are labelled "compiled offline". Triton's own
function specialises pointers for the alignment of PyTorch's allocators, 512 bytes. torch is not imported.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .disassembly import amd_facts, nvidia_facts
from .kernel_source import Argument, KernelSource
from .launch import load

CUDA_ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
HIP_WARP = {"gfx90a": 64, "gfx942": 64, "gfx1100": 32}
ARCHS = CUDA_ARCHS + tuple(HIP_WARP)
TORCH_NAMES = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16", "fp64": "torch.float64"}


@dataclass(frozen=True)
class KernelFacts:
    """Facts about one kernel compiled for one architecture. None if the target does not report a fact."""

    kernel: str
    digest: str  # of the generated text
    arch: str
    how: str  # always "compiled offline"
    programs: int
    warps: int
    registers: int  # of a thread; vector registers on AMD
    spills: int  # NVIDIA: instructions on local memory. AMD: spilled registers, scalar and vector
    shared_bytes: int
    load_bits: tuple[int, ...]  # widths of global loads, ascending
    store_bits: tuple[int, ...]
    loads: Mapping[int, int]  # global load instructions by width in bits
    stores: Mapping[int, int]
    instructions: int
    parameter_bytes: int  # what the compiler laid out, Triton's own parameters included
    scalar_registers: int | None  # AMD only
    bytes_read: int  # by the whole launch, from the generated structure: every tensor once
    bytes_written: int
    compile_seconds: float  # of a core, ptxas included: other processes on the machine do not count
    triton: str


@dataclass
class _Pointer:
    """A stand-in for a tensor in Triton's specialisation: the dtype by torch's name, an aligned address, the extent."""

    dtype: str
    extent: int

    def data_ptr(self) -> int:
        return 512

    def ptr_range(self) -> int:
        return self.extent


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if arch in HIP_WARP:
        return GPUTarget("hip", arch, HIP_WARP[arch])
    if re.fullmatch(r"sm_\d+", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    raise ValueError(f"unknown architecture {arch!r}; known are {', '.join(ARCHS)}")


def _specialise(backend: Any, argument: Argument) -> tuple[str, Any]:
    """Return the type and the attributes that a launch on real tensors gives an argument."""
    from triton._C.libtriton import native_specialize_impl

    pointer = _Pointer(TORCH_NAMES[argument.dtype], argument.bytes)
    kind, attributes = native_specialize_impl(type(backend), pointer, False, True, True)
    return kind, backend.parse_attr(attributes)


@contextlib.contextmanager
def _active(target: Any) -> Iterator[None]:
    """Make `tl.target_info`, which reads the active driver, report `target`."""
    from triton.runtime import driver

    before = driver._active  # not `driver.active`, which would look for a GPU
    driver.set_active(types.SimpleNamespace(get_current_target=lambda: target))
    try:
        yield
    finally:
        driver.set_active(before)


def _compile(source: KernelSource, arch: str) -> tuple[Any, int, float]:
    """Return Triton's compiled kernel, its warps, and the CPU seconds. Triton's cache is neither read nor written."""
    import triton
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    target = _target(arch)
    backend = make_backend(target)
    warps = max(1, source.config.threads // target.warp_size)
    kinds = [_specialise(backend, argument) for argument in source.arguments]
    with (
        tempfile.TemporaryDirectory() as cache,
        triton.knobs.runtime.scope(),
        triton.knobs.cache.scope(),
        _active(target),
    ):
        triton.knobs.runtime.interpret = False
        triton.knobs.cache.dir = cache
        ast = ASTSource(
            load(source),
            {argument.name: kind for argument, (kind, _) in zip(source.arguments, kinds, strict=True)},
            {},
            {(i,): attributes for i, (_, attributes) in enumerate(kinds) if attributes},
        )
        start = sum(os.times()[:4])
        compiled = triton.compile(ast, target=target, options={"num_warps": warps})
        return compiled, warps, sum(os.times()[:4]) - start


def facts(source: KernelSource, arch: str) -> KernelFacts:
    """Return the facts of `source` compiled for `arch`: one of ARCHS, or any sm_NN that Triton knows.

    Needs no GPU and no driver.

    Raises:
        ValueError: The architecture is unknown. Errors of Triton's compiler are raised as they are.
    """
    import triton

    compiled, warps, seconds = _compile(source, arch)
    found = amd_facts(compiled) if arch in HIP_WARP else nvidia_facts(compiled)
    return KernelFacts(
        kernel=source.name,
        digest=source.digest,
        arch=arch,
        how="compiled offline",
        programs=source.programs,
        warps=warps,
        load_bits=tuple(found["loads"]),
        store_bits=tuple(found["stores"]),
        bytes_read=source.bytes_read,
        bytes_written=source.bytes_written,
        compile_seconds=round(seconds, 2),
        triton=triton.__version__,
        **found,
    )
