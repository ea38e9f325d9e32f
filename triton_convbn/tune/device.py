"""Evaluate candidates on a device by time: check values first, time with a cold cache, then time the best again.

One process owns the device. A candidate that hangs, crashes or breaks the device ends that process, and the next
candidate gets a new one. Times are those of `measure.cuda_clock`, of a CUDA graph, which excludes the host's part.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median, quantiles

import torch

from .. import measure
from ..kernels.kernel_call import KernelCall
from .bench import Bench, Candidate, Outcome, Status, in_a_line


def time_candidates(
    candidates: Sequence[Candidate], device: str, rounds: int = 21, clock: measure.Clock | None = None
) -> list[Outcome]:
    """Return the outcome of each candidate, in order. Those with wrong values are not timed.

    Runs in a worker. Several candidates are timed in turns, so that a device that slows down slows them all alike.
    """
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    checked = [_checked(candidate, where) for candidate in candidates]
    calls = {str(n): call for n, (_, call) in enumerate(checked) if call}
    try:
        seconds = measure.rounds(calls, rounds, clock=clock or measure.cold_clock_of(where))
    except Exception as error:
        _end_if_broken(where, error)
        raise
    return [_timed(outcome, seconds[str(n)]) if call else outcome for n, (outcome, call) in enumerate(checked)]


def _checked(candidate: Candidate, device: torch.device) -> tuple[Outcome, Callable[[], object] | None]:
    """Run a candidate once. Return its outcome, and a call to time if its values are right."""
    try:
        call, sources = KernelCall(candidate.specs, device), candidate.sources()
        call.run(sources)
        if wrong := call.wrong():
            return Outcome(Status.WRONG_VALUES, message=wrong), None
        facts = {
            "launches": len(sources),
            "programs": sum(source.programs for _, source in sources),
            "bytes": sum(source.bytes_moved for _, source in sources),
        }
        run = partial(call.run, sources)
        return Outcome(Status.OK, facts=facts), measure.replayable(run) if device.type == "cuda" else run
    except Exception as error:  # only this candidate fails, if the device still answers
        _end_if_broken(device, error)
        return Outcome(Status.FAILED, message=in_a_line(error)), None


def _timed(outcome: Outcome, seconds: Sequence[float]) -> Outcome:
    """Return the outcome with its cost, the median of the rounds."""
    us = [1e6 * second for second in seconds]
    cost = median(us)
    p20, *_, p80 = quantiles(us, n=5, method="inclusive") if len(us) > 1 else (cost, cost)
    more = {"p20_us": p20, "p80_us": p80, "rounds": len(us), "gb_per_s": outcome.facts["bytes"] / 1e3 / cost}
    return replace(outcome, cost=cost, facts={**outcome.facts, **more})


def _end_if_broken(device: torch.device, error: Exception) -> None:
    """End this process if its device no longer answers, as after an illegal access. The pool starts another."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        print(in_a_line(error), file=sys.stderr, flush=True)
        os._exit(1)


def device_bench(device: str, timeout: float) -> Bench:
    """Return a bench that evaluates by time on a device, such as "cuda:0"."""
    return Bench(partial(time_candidates, device=device), 1, timeout, noisy=True)
