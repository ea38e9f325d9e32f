"""Evaluate candidates without a GPU: compile them, and check values in Triton's interpreter."""

from collections.abc import Sequence
from functools import lru_cache, partial

from ..kernels.offline import HIP_WARP, facts
from .bench import Bench, Candidate, Outcome, Status

# Kilobytes that a block may have: "Technical specifications per compute capability" in NVIDIA's CUDA C++ Programming
# Guide, AMD's ISA guides. ptxas and LLVM know the threads of a block and exceed no other limit; they spill instead.
SHARED_KB = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
SHARED_KB |= dict.fromkeys(HIP_WARP, 64)


def compile_candidate(candidates: Sequence[Candidate], arch: str) -> list[Outcome]:
    """Return the outcome of one candidate. Runs in a worker."""
    from triton.backends.amd.compiler import HIPBackend

    HIPBackend._torch_available = False  # it would look for torch tensors among the arguments
    (candidate,) = candidates
    kernels = [facts(source, arch) for _, source in candidate.sources() if source.programs]
    found = {
        "launches": len(kernels),
        "programs": sum(kernel.programs for kernel in kernels),
        "registers": max((kernel.registers for kernel in kernels), default=0),
        "spills": sum(kernel.spills for kernel in kernels),
        "shared_bytes": max((kernel.shared_bytes for kernel in kernels), default=0),
        "instructions": sum(kernel.instructions for kernel in kernels),
        "load_bits": max((bits for kernel in kernels for bits in kernel.load_bits), default=0),
        "store_bits": max((bits for kernel in kernels for bits in kernel.store_bits), default=0),
        "bytes": sum(kernel.bytes_read + kernel.bytes_written for kernel in kernels),
        "compile_seconds": round(sum(kernel.compile_seconds for kernel in kernels), 2),
    }
    found["bytes"] += found["instructions"] * (8 if arch in HIP_WARP else 16)  # on average on AMD
    limit, status, message = 1024 * SHARED_KB[arch], Status.OK, ""
    if found["spills"]:
        status, message = Status.SPILLS, f"{found['spills']} spills"
    elif found["shared_bytes"] > limit:
        status, message = Status.OVER_LIMIT, f"{found['shared_bytes']} bytes of shared memory, {arch} has {limit}"
    elif wrong := _wrong(candidate.reduced()):
        status, message = Status.WRONG_VALUES, wrong
    return [Outcome(status, found["registers"] if status is Status.OK else None, found, message)]


@lru_cache
def _wrong(candidate: Candidate) -> str | None:
    """Return what is wrong with the values, if anything. Cached: candidates that differ in threads reduce to one."""
    import torch
    import triton

    from ..kernels.kernel_call import KernelCall

    call = KernelCall(candidate.specs, torch.device("cpu"))
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        call.run(candidate.sources())
    return call.wrong()


def offline_bench(arch: str, workers: int, timeout: float) -> Bench:
    """Return a bench that evaluates by compiled facts, for an architecture that need not be there.

    Candidates that spill, need too much shared memory or give wrong values cannot win. The cost of the others is their
    number of registers.
    """
    return Bench(partial(compile_candidate, arch=arch), workers, timeout)
