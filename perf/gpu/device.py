"""Measure on a device: the current GPU, or the CPU in a dry run."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from triton_convbn.measure import cold_clock_of, replayable, rounds

from ..results import Quantiles, Report, percentiles

INTERPRETED = "cpu (interpreted)"


def device_of(dry: bool) -> torch.device:
    """Return the device to measure on. In a dry run torch gets one thread, as all tensors are small."""
    if dry:
        torch.set_num_threads(1)
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def report_of(device: torch.device, csv: Path) -> Report:
    """Return a report of the device that appends to a file and prints to stderr."""
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", file=sys.stderr, flush=True)

    if device.type == "cpu":
        return Report(csv, INTERPRETED, "interpreted", say)
    return Report(csv, torch.cuda.get_device_name(device), say=say)


def synchronize(device: torch.device) -> None:
    """Wait for the device. The CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cold_milliseconds(function: Callable[[], object], device: torch.device) -> Quantiles:
    """Time the call as a replayed CUDA graph with a cold L2 cache."""
    count = 100 if device.type == "cuda" else 2
    seconds = rounds({"": replayable(function, device)}, count, clock=cold_clock_of(device))[""]
    return percentiles([1e3 * each for each in seconds])


def step_milliseconds(step: Callable[[], object], count: int, device: torch.device) -> dict[str, list[float]]:
    """Return latency and host time of `count` synchronized steps, and milliseconds a step of as many in a row."""
    found: dict[str, list[float]] = {"latency": [], "host": [], "throughput": []}
    for _ in range(count):
        synchronize(device)
        start = time.perf_counter()
        step()
        found["host"].append(1e3 * (time.perf_counter() - start))
        synchronize(device)
        found["latency"].append(1e3 * (time.perf_counter() - start))
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    found["throughput"].append(1e3 * (time.perf_counter() - start) / count)
    return found


def kernels(function: Callable[[], object], calls: int, device: torch.device) -> dict[str, list[float]]:
    """Return milliseconds and launches a call by kernel name, or by CPU operator in a dry run."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    with profile(activities=[getattr(ProfilerActivity, kind.name)], acc_events=True) as profiled:
        for _ in range(calls):
            function()
        synchronize(device)
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profiled.events():
        if event.device_type == kind:
            found[event.name][0] += event.time_range.elapsed_us() / 1e3 / calls
            found[event.name][1] += 1 / calls
    return found


@contextmanager
def by_kernel() -> Iterator[None]:
    """Raise RuntimeError if plain torch computes a fold inside the block."""
    before = dict(counters["triton_convbn"])
    yield
    now = counters["triton_convbn"]
    reasons = [key for key in now if key.startswith("decomposed:") and now[key] > before.get(key, 0)]
    if reasons:
        raise RuntimeError(f"no kernel has run: {', '.join(reasons)}")
