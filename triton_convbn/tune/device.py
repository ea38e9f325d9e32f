"""Evaluate candidates on a device by time: check values first, time with a cold cache, then time the best again.

One process owns the device. A candidate that hangs, crashes or breaks the device ends that process, and the next
candidate gets a new one. Times are those of `measure.cuda_clock`.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any

from ..kernels.codegen import generate
from ..kernels.config import KernelConfig
from ..measure import Clock
from .candidate import Candidate, Generate
from .outcome import MEASURED, Outcome, Status
from .pool import Pool, in_a_line
from .problem import Problem


@dataclass(frozen=True)
class Timing:
    """Configurations of one call, to be timed in turns by the process of a device; see `DeviceBench`."""

    candidates: tuple[Candidate, ...]
    device: str
    rounds: int
    graph: bool
    clock: Clock | None


def time_candidates(timing: Timing) -> list[Outcome]:
    """Return the outcome of each candidate, in order. Those with wrong values are not timed. Runs in the worker."""
    import torch

    device = torch.device(timing.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        return _time(timing, device)
    except Exception as error:
        _end_if_broken(device, error)
        raise


def _time(timing: Timing, device: Any) -> list[Outcome]:
    from .. import measure
    from ..kernels.kernel_call import KernelCall

    outcomes: dict[int, Outcome] = {}
    calls: dict[str, Callable[[], object]] = {}
    for number, candidate in enumerate(timing.candidates):
        call = KernelCall(candidate.specs, device)
        try:
            sources = candidate.sources()
            call.run(sources)
        except Exception as error:  # only this candidate fails, if the device still answers
            _end_if_broken(device, error)
            outcomes[number] = Outcome(Status.FAILED, unit=MEASURED, message=in_a_line(error))
            continue
        if wrong := call.wrong():
            outcomes[number] = Outcome(Status.WRONG_VALUES, unit=MEASURED, message=wrong)
            continue
        run: Callable[[], object] = functools.partial(call.run, sources)
        calls[str(number)] = measure.replayable(run) if timing.graph and device.type == "cuda" else run
        facts = {
            "launches": len(sources),
            "programs": sum(source.programs for _, source in sources),
            "bytes": sum(source.bytes_moved for _, source in sources),
        }
        outcomes[number] = Outcome(Status.OK, unit=MEASURED, facts=facts)
    clock = timing.clock or measure.cold_clock_of(device)
    copy = _copy_bandwidth(timing.device, timing.clock)
    for name, seconds in measure.rounds(calls, timing.rounds, clock=clock).items():
        us = [1e6 * s for s in seconds]
        cost = median(us)
        p20, *_, p80 = quantiles(us, n=5, method="inclusive") if len(us) > 1 else (cost, cost)
        known = outcomes[int(name)]
        rate = known.facts["bytes"] / 1e3 / cost
        more = {"p20_us": p20, "p80_us": p80, "rounds": len(us), "gb_per_s": rate, "share_of_bandwidth": rate / copy}
        outcomes[int(name)] = replace(known, cost=cost, facts={**known.facts, **more})
    return [outcomes[number] for number in range(len(timing.candidates))]


def _end_if_broken(device: Any, error: Exception) -> None:
    """End this process if its device no longer answers, as after an illegal access; the pool starts another."""
    import torch

    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        print(in_a_line(error), file=sys.stderr, flush=True)
        os._exit(1)


@functools.cache
def _copy_bandwidth(name: str, clock: Clock | None) -> float:
    """Return the GB/s of a copy on the device, reads plus writes: the whole of `share_of_bandwidth`."""
    import torch

    from .. import measure

    device = torch.device(name)
    source = torch.zeros(2**28 if device.type == "cuda" else 2**20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timed = measure.rounds({"copy": lambda: target.copy_(source)}, 11, clock=clock or measure.cold_clock_of(device))
    return 2 * source.nbytes / 1e9 / median(timed["copy"])


class DeviceBench:
    """An `Evaluator` by time on a device.

    Args:
        device: "cuda", "cuda:1", or for tests "cpu", which interprets.
        timeout: seconds for a candidate: compilation, check and timing.
        rounds: how often each candidate is timed.
        graph: time CUDA graphs, which excludes the host's part.
        generate: generates a kernel; importable by name.
        clock: importable by name; None for the device's own.
    """

    unit = MEASURED
    margin = 0.01

    def __init__(
        self,
        device: str,
        timeout: float = 60.0,
        rounds: int = 21,
        graph: bool = True,
        generate: Generate = generate,
        clock: Clock | None = None,
    ) -> None:
        self._timing = Timing((), device, rounds, graph, clock)
        self._generate = generate
        self._pool = Pool(1, timeout, {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if device == "cpu" else {})

    def close(self) -> None:
        """Kill the process of the device."""
        self._pool.close()

    def evaluate(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Yield each configuration once with its outcome, each timed by itself."""
        for config in dict.fromkeys(configs):
            yield from self._timed(problem, [config])

    def rerank(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Yield the configurations timed in turns, so that a device that slows down slows them all alike."""
        if configs:
            yield from self._timed(problem, list(dict.fromkeys(configs)))

    def _timed(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        candidates = tuple(Candidate(problem.specs, config, self._generate) for config in configs)
        future = self._pool.submit(time_candidates, replace(self._timing, candidates=candidates))
        try:
            if error := future.exception():
                failed = self._pool.failure(error)
                outcomes, seconds = [failed] * len(configs), failed.seconds
            else:
                outcomes, seconds = future.result()
        finally:
            future.cancel()  # after an interruption: kills what still runs
        for config, outcome in zip(configs, outcomes, strict=True):
            yield config, replace(outcome, unit=MEASURED, seconds=seconds / len(configs))
