"""Configurations to outcomes on a device, by time: checked for values first, with a cold cache, then the best again.

The device belongs to one process of the pool. A candidate that hangs or crashes takes that process with it, and the
next one gets a new process. Every time is of the package's one clock, `measure.cuda_clock`.
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
from .bench import Candidate, failure
from .outcome import MEASURED, Generate, Outcome, Status
from .pool import Lane, Pool, in_a_line
from .problem import Problem

Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Timing:
    """What the process of a device is asked: configurations of one call, timed in turn.

    graph: as CUDA graphs, which leaves out what the host does. clock: importable; None for the device's own.
    """

    candidates: tuple[Candidate, ...]
    device: str
    rounds: int
    graph: bool
    clock: Clock | None


def time_candidates(timing: Timing) -> list[Outcome]:
    """In the process of the device: an outcome for each candidate, in order. Only those with right values are timed."""
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
        except Exception as error:  # of this candidate alone, if the device still answers
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
    """After an illegal access a process can do nothing on its device any more: end it, and the pool starts another."""
    import torch

    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        print(in_a_line(error), file=sys.stderr, flush=True)
        os._exit(1)


@functools.cache
def _copy_bandwidth(name: str, clock: Clock | None) -> float:
    """GB/s of a copy on the device, read and written: what `share_of_bandwidth` is a share of."""
    import torch

    from .. import measure

    device = torch.device(name)
    source = torch.zeros(2**28 if device.type == "cuda" else 2**20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timed = measure.rounds({"copy": lambda: target.copy_(source)}, 11, clock=clock or measure.cold_clock_of(device))
    return 2 * source.nbytes / 1e9 / median(timed["copy"])


class DeviceBench:
    """An `Evaluator` by time on a device: "cuda", "cuda:1", or "cpu" with the interpreter, which is for tests.

    timeout: seconds for a candidate, compilation, check and timing. rounds: how often each is timed, and `rerank`
    again. graph, clock, generate: see `Timing` and `OfflineBench`.
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
        self.device = device
        self._timing = Timing((), device, rounds, graph, clock)
        self._generate = generate
        environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if device == "cpu" else {}
        self._pool = Pool([Lane("device", time_candidates, 1, environment)], timeout)

    def __enter__(self) -> "DeviceBench":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.close()

    def evaluate(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Each configuration once, by itself, as they finish."""
        for config in dict.fromkeys(configs):
            self._submit(problem, [config])
        yield from self._outcomes()

    def rerank(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """The best few once more, in turn, so that a device that slows down slows them all alike."""
        if configs:
            self._submit(problem, list(dict.fromkeys(configs)))
        yield from self._outcomes()

    def _submit(self, problem: Problem, configs: Sequence[KernelConfig]) -> None:
        candidates = tuple(Candidate(problem.specs, config, self._generate) for config in configs)
        self._pool.submit("device", replace(self._timing, candidates=candidates))

    def _outcomes(self) -> Iterator[tuple[KernelConfig, Outcome]]:
        for done in self._pool.results():
            candidates: tuple[Candidate, ...] = done.task.candidates
            outcomes: list[Any] = done.value if done.how == "returned" else [failure(done)] * len(candidates)
            for candidate, outcome in zip(candidates, outcomes, strict=True):
                yield candidate.config, replace(outcome, unit=MEASURED, seconds=done.seconds / len(candidates))
