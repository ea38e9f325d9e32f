"""Evaluate candidates without a GPU: compile them, check values in Triton's interpreter, rank by registers and bytes.

The limits of a multiprocessor are those of "Technical specifications per compute capability" in NVIDIA's CUDA C++
Programming Guide, and of AMD's ISA guides of CDNA 2, CDNA 3 and RDNA 3. They are not read off a device.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UsageError
from ..kernels.codegen import generate
from ..kernels.config import KernelConfig
from ..kernels.offline import KernelFacts, facts
from .candidate import Candidate, Generate
from .outcome import COMPILED, Outcome, Status
from .pool import Pool
from .problem import Problem


@dataclass(frozen=True)
class Arch:
    """Limits of a multiprocessor (AMD: compute unit), in warps (waves), blocks, and bytes of shared memory.

    registers: 32-bit registers of a scheduler (SIMD), all lanes; a warp gets them in units of `register_unit`.
    instruction_bytes: size of an instruction, on average on AMD.
    """

    warps: int
    blocks: int
    shared: int
    shared_block: int
    warp: int = 32
    schedulers: int = 4
    registers: int = 16384
    register_unit: int = 256
    thread_registers: int = 255
    block_threads: int = 1024
    instruction_bytes: int = 16


KB = 1024
_CDNA = Arch(32, 32, 64 * KB, 64 * KB, 64, 4, 512 * 64, 8 * 64, 512, 1024, 8)
ARCHS = {
    "sm_75": Arch(32, 16, 64 * KB, 64 * KB),
    "sm_80": Arch(64, 32, 164 * KB, 163 * KB),
    "sm_86": Arch(48, 16, 100 * KB, 99 * KB),
    "sm_89": Arch(48, 24, 100 * KB, 99 * KB),
    "sm_90": Arch(64, 32, 228 * KB, 227 * KB),
    "sm_100": Arch(64, 32, 228 * KB, 227 * KB),
    "sm_120": Arch(48, 24, 100 * KB, 99 * KB),
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx1100": Arch(32, 32, 64 * KB, 64 * KB, 32, 2, 1536 * 32, 24 * 32, 256, 1024, 8),
}


def arch_of(name: str) -> Arch:
    """Return the limits of an architecture. Raise UsageError if they are unknown."""
    if name not in ARCHS:
        raise UsageError(f"no architecture {name!r}; known are {', '.join(ARCHS)}")
    return ARCHS[name]


def blocks_resident(kernel: KernelFacts, arch: Arch) -> int:
    """Return how many programs of a kernel fit on a multiprocessor at once; 0 if none does."""
    warp_registers = -(-max(1, kernel.registers) * arch.warp // arch.register_unit) * arch.register_unit
    by_registers = arch.schedulers * (arch.registers // warp_registers)
    blocks = min(arch.blocks, min(arch.warps, by_registers) // kernel.warps)
    return min(blocks, arch.shared // kernel.shared_bytes) if kernel.shared_bytes else blocks


def over_limit(kernel: KernelFacts, arch: Arch) -> str | None:
    """Return the limit that a kernel exceeds, in words; None if it exceeds none."""
    for what, value, limit in (
        ("registers a thread", kernel.registers, arch.thread_registers),
        ("threads a block", kernel.warps * arch.warp, arch.block_threads),
        ("bytes of shared memory", kernel.shared_bytes, arch.shared_block),
    ):
        if value > limit:
            return f"{value} {what}, {kernel.arch} has {limit}"
    if not blocks_resident(kernel, arch):
        return f"no program fits on a multiprocessor: {kernel.registers} registers, {kernel.warps} warps"
    return None


def compile_candidate(candidate: Candidate) -> list[KernelFacts]:
    """Return the facts of each launch that has programs. Runs in a worker."""
    from triton.backends.amd.compiler import HIPBackend

    HIPBackend._torch_available = False  # it would look for torch tensors among the arguments
    return [facts(source, candidate.arch) for _, source in candidate.sources() if source.programs]


def check_candidate(candidate: Candidate) -> str | None:
    """Return what is wrong with the values of the reduced candidate; None if nothing is. Runs in a worker."""
    import torch

    from ..kernels.kernel_call import KernelCall

    torch.set_num_threads(1)
    small = candidate.reduced()
    sources = small.sources()
    # The interpreter has no threads, so texts that differ only in the docstring, which names them, compute the same.
    key = tuple((part.start, part.stop, source.programs, source.text.split('"""', 2)[2]) for part, source in sources)
    if key not in _CHECKED:
        call = KernelCall(small.specs, torch.device("cpu"))
        call.run(sources)
        _CHECKED[key] = call.wrong()
    return _CHECKED[key]


_CHECKED: dict[Any, str | None] = {}
"""The checks of this worker."""


class OfflineBench:
    """An `Evaluator` by compiled facts, for an architecture that need not be there.

    It drops candidates that spill, exceed a limit or give wrong values, and ranks the others by registers, then bytes.
    No such rank predicts time well enough to replace the default, so that the default wins wherever it is usable.

    Args:
        arch: one of ARCHS.
        workers: processes that compile. One more checks values.
        timeout: seconds for a compilation, and again for a check.
        generate: generates a kernel; importable by name.

    Raises:
        UsageError: for an unknown architecture.
    """

    unit = COMPILED
    margin = 1.0

    def __init__(self, arch: str, workers: int = 2, timeout: float = 60.0, generate: Generate = generate) -> None:
        self._name, self._arch, self._generate = arch, arch_of(arch), generate
        self._compilers = Pool(workers, timeout, {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"})
        self._checkers = Pool(1, timeout, {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"})

    def close(self) -> None:
        """Kill the workers."""
        self._compilers.close()
        self._checkers.close()

    def evaluate(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Yield each configuration once with its outcome, as they finish. Closing the iterator kills the rest."""
        compiling: dict[Future[Any], Candidate] = {}
        checking: dict[Future[Any], tuple[Candidate, Outcome]] = {}
        try:
            for config in dict.fromkeys(configs):
                candidate = Candidate(problem.specs, config, self._generate, self._name)
                compiling[self._compilers.submit(compile_candidate, candidate)] = candidate
            while compiling or checking:
                for future in wait([*compiling, *checking], return_when=FIRST_COMPLETED).done:
                    if future in checking:
                        candidate, compiled = checking.pop(future)
                        yield candidate.config, self._checked(future, compiled)
                        continue
                    candidate = compiling.pop(future)
                    outcome = self._compiled(future)
                    if outcome.status is Status.OK:
                        checking[self._checkers.submit(check_candidate, candidate)] = candidate, outcome
                    else:
                        yield candidate.config, outcome
        finally:
            for future in (*compiling, *checking):
                future.cancel()

    def rerank(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Yield nothing: compiling again gives the same facts."""
        return iter(())

    def _compiled(self, future: "Future[Any]") -> Outcome:
        if error := future.exception():
            return self._compilers.failure(error)
        kernels: list[KernelFacts]
        kernels, seconds = future.result()
        found = self._facts(kernels)
        if found["spills"]:
            return Outcome(Status.SPILLS, facts=found, message=f"{found['spills']} spills", seconds=seconds)
        if limit := next(filter(None, (over_limit(kernel, self._arch) for kernel in kernels)), None):
            return Outcome(Status.OVER_LIMIT, facts=found, message=limit, seconds=seconds)
        return Outcome(Status.OK, found["registers"], facts=found, seconds=seconds)

    def _checked(self, future: "Future[Any]", compiled: Outcome) -> Outcome:
        """Return the outcome of a candidate that compiled, once its values are checked."""
        if error := future.exception():
            failed = self._checkers.failure(error)
            return replace(failed, facts=compiled.facts, message=f"values: {failed.message}")
        wrong, seconds = future.result()
        seconds += compiled.seconds
        if wrong is not None:
            return Outcome(Status.WRONG_VALUES, facts=compiled.facts, message=wrong, seconds=seconds)
        return replace(compiled, seconds=seconds)

    def _facts(self, kernels: Sequence[KernelFacts]) -> dict[str, Any]:
        """Return the facts of all launches: the maximum of what limits, the sum of what adds up."""
        code = sum(kernel.instructions for kernel in kernels) * self._arch.instruction_bytes
        resident = [blocks_resident(kernel, self._arch) * kernel.warps for kernel in kernels]
        return {
            "launches": len(kernels),
            "programs": sum(kernel.programs for kernel in kernels),
            "registers": max((kernel.registers for kernel in kernels), default=0),
            "spills": sum(kernel.spills for kernel in kernels),
            "shared_bytes": max((kernel.shared_bytes for kernel in kernels), default=0),
            "instructions": sum(kernel.instructions for kernel in kernels),
            "load_bits": max((max(kernel.load_bits, default=0) for kernel in kernels), default=0),
            "store_bits": max((max(kernel.store_bits, default=0) for kernel in kernels), default=0),
            "bytes": sum(kernel.bytes_read + kernel.bytes_written for kernel in kernels) + code,
            "occupancy": round(min(resident, default=0) / self._arch.warps, 3),
            "compile_seconds": round(sum(kernel.compile_seconds for kernel in kernels), 2),
        }
