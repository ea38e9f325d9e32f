"""Evaluate candidates in a worker: by compiled facts without a GPU, or by time on one.

Without a GPU they are compiled, and their values are checked in Triton's interpreter.

On a GPU, values are checked first, then candidates are timed with a cold cache, then the best again. One process owns
the device. A candidate that hangs, crashes or breaks the device ends that process, and the next candidate gets a new
one. `measure.cuda_clock` times a CUDA graph, so times exclude the host.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from statistics import median, quantiles

import torch

from .. import measure
from ..kernels.config import DEFAULT_CONFIG, KernelConfig
from ..kernels.kernel_call import KernelCall
from ..kernels.offline import HIP_WARP, facts
from ..kernels.spec import GradSpec, PairSpec
from .outcome import Outcome, Status, in_a_line
from .problem import Problem

# Kilobytes that a block may have: "Technical specifications per compute capability" in NVIDIA's CUDA C++ Programming
# Guide, AMD's ISA guides. ptxas and LLVM know the threads of a block and exceed no other limit; they spill instead.
SHARED_KB = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
SHARED_KB |= dict.fromkeys(HIP_WARP, 64)


def compile_candidate(problem: Problem, configs: Sequence[KernelConfig], arch: str) -> list[Outcome]:
    """Return the outcome of one configuration, by compiled facts for an architecture that need not be there.

    Candidates that spill, need too much shared memory or give wrong values cannot win. The cost of the others is their
    number of registers.
    """
    from triton.backends.amd.compiler import HIPBackend

    HIPBackend._torch_available = False  # it would look for torch tensors among the arguments
    (config,) = configs
    kernels = [facts(source, arch) for _, source in problem.sources(config) if source.programs]
    instructions = sum(kernel.instructions for kernel in kernels)
    moved = sum(kernel.bytes_read + kernel.bytes_written for kernel in kernels)
    found = {
        "launches": len(kernels),
        "programs": sum(kernel.programs for kernel in kernels),
        "registers": max((kernel.registers for kernel in kernels), default=0),
        "spills": sum(kernel.spills for kernel in kernels),
        "shared_bytes": max((kernel.shared_bytes for kernel in kernels), default=0),
        "instructions": instructions,
        "load_bits": max((bits for kernel in kernels for bits in kernel.load_bits), default=0),
        "store_bits": max((bits for kernel in kernels for bits in kernel.store_bits), default=0),
        "bytes": moved + instructions * (8 if arch in HIP_WARP else 16),  # on average on AMD
        "compile_seconds": round(sum(kernel.compile_seconds for kernel in kernels), 2),
    }
    limit = 1024 * SHARED_KB[arch]
    if found["spills"]:
        return [Outcome(Status.SPILLS, None, found, f"{found['spills']} spills")]
    if found["shared_bytes"] > limit:
        message = f"{found['shared_bytes']} bytes of shared memory, {arch} has {limit}"
        return [Outcome(Status.OVER_LIMIT, None, found, message)]
    # The interpreter has no threads.
    if wrong := _wrong(reduced(problem, config), replace(config, threads=DEFAULT_CONFIG.threads)):
        return [Outcome(Status.WRONG_VALUES, None, found, wrong)]
    return [Outcome(Status.OK, found["registers"], found)]


def reduced(problem: Problem, config: KernelConfig) -> Problem:
    """Return the problem with fewer channels, such that the code generated for `config` takes the same paths.

    Dtypes and layouts stay, and so does what selects a path: in a fold, the powers of two up to a block that divide the
    elements; in a backward, the powers of two up to a program's rows that divide the channels. Two blocks or programs
    remain, or a few more. One of several equal pairs remains, or two if they share a body.
    """
    left: list[PairSpec | GradSpec] = []
    for spec in problem.specs:
        each = _fewer_channels(spec, config)
        if left.count(each) < (2 if config.emit == "shared" else 1):
            left.append(each)
    return Problem(tuple(left))


def _fewer_channels(spec: PairSpec | GradSpec, config: KernelConfig) -> PairSpec | GradSpec:
    """Return the spec with fewer rows, in whole groups, or in a backward with fewer output channels."""
    pair = spec.pair if isinstance(spec, GradSpec) else spec
    if not pair.numel:
        return spec
    name, groups, elements, unit = "rows", pair.groups, pair.cols * pair.taps * pair.groups, config.block
    least = max(2, -(-2 * unit // elements))
    if isinstance(spec, GradSpec):  # a program fills its block with channels, and holds 32 or more if transposed
        name, groups, elements = "cols" if pair.transposed else "rows", 1, 1
        channels = min(config.block // (pair.numel // pair.channels), config.rows or config.block)
        unit = 1 << max(32 if pair.transposed else 1, channels).bit_length()
        least = unit // 2 + 1
    count = getattr(pair, name) // groups
    ends = math.gcd(count * elements, unit)
    fewer = next((number for number in range(least, count) if math.gcd(number * elements, unit) == ends), count)
    pair = replace(pair, **{name: fewer * groups})
    return replace(spec, pair=pair) if isinstance(spec, GradSpec) else pair


@lru_cache
def _wrong(problem: Problem, config: KernelConfig) -> str | None:
    """Return what is wrong with the interpreted values, if anything."""
    import triton

    call = KernelCall(problem.specs, torch.device("cpu"))
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        call.run(problem.sources(config))
    return call.wrong()


def time_candidates(problem: Problem, configs: Sequence[KernelConfig], device: str, rounds: int = 21) -> list[Outcome]:
    """Return the outcome of each configuration, in order. Those with wrong values are not timed.

    Several are timed in turns, so that a device that slows down slows them all alike.
    """
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    checked = [_checked(problem, config, where) for config in configs]
    calls = {str(n): call for n, (_, call) in enumerate(checked) if call}
    try:
        seconds = measure.rounds(calls, rounds, clock=measure.cold_clock_of(where))
    except Exception as error:
        _end_if_broken(where, error)
        raise
    outcomes = [outcome for outcome, _ in checked]
    for n, times in seconds.items():
        us, outcome = [1e6 * each for each in times], outcomes[int(n)]
        cost = median(us)
        p20, *_, p80 = quantiles(us, n=5, method="inclusive") if len(us) > 1 else (cost, cost)
        more = {"p20_us": p20, "p80_us": p80, "rounds": len(us), "gb_per_s": outcome.facts["bytes"] / 1e3 / cost}
        outcomes[int(n)] = replace(outcome, cost=cost, facts={**outcome.facts, **more})
    return outcomes


def _checked(
    problem: Problem, config: KernelConfig, device: torch.device
) -> tuple[Outcome, Callable[[], object] | None]:
    """Run a candidate once. Return its outcome, and a call to time if its values are right."""
    try:
        call, sources = KernelCall(problem.specs, device), problem.sources(config)
        call.run(sources)
        if wrong := call.wrong():
            return Outcome(Status.WRONG_VALUES, message=wrong), None
        found = {
            "launches": len(sources),
            "programs": sum(source.programs for _, source in sources),
            "bytes": sum(source.bytes_moved for _, source in sources),
        }
        return Outcome(Status.OK, facts=found), measure.replayable(partial(call.run, sources), device)
    except Exception as error:  # only this candidate fails, if the device still answers
        _end_if_broken(device, error)
        return Outcome(Status.FAILED, message=in_a_line(error)), None


def _end_if_broken(device: torch.device, error: Exception) -> None:
    """End this process if its device no longer answers, as after an illegal access. The pool starts another."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        print(in_a_line(error), file=sys.stderr, flush=True)
        os._exit(1)
