"""Measure on the GPU, or on the CPU in a dry run."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from triton_convbn.measure import cpu_clock, replayable

from ..results import Quantiles, percentiles

INTERPRETED = "cpu (interpreted)"


class Bench:
    """A device and its timers: the current GPU, or the CPU in a dry run."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
        self.name = INTERPRETED if dry else torch.cuda.get_device_name(self.device)
        if dry:
            torch.set_num_threads(1)  # all tensors are small

    def synchronize(self, device: torch.device | None = None) -> None:
        if not self.dry:
            torch.cuda.synchronize(device)

    def gpu_milliseconds(self, function: Callable[[], object], rep: float = 100) -> Quantiles:
        """Time the call as a replayed CUDA graph with a cold L2 cache. rep: milliseconds to measure."""
        if self.dry:
            return percentiles([1e3 * cpu_clock(function) for _ in range(2)])
        import triton.testing

        again = self.replayable(function)
        p50, p20, p80 = triton.testing.do_bench(again, warmup=rep / 4, rep=rep, quantiles=[0.5, 0.2, 0.8])
        return p50, p20, p80

    def step_milliseconds(self, step: Callable[[], object], count: int) -> dict[str, list[float]]:
        """Return latency and host time of `count` synchronized steps, and milliseconds a step of as many in a row."""
        found: dict[str, list[float]] = {"latency": [], "host": [], "throughput": []}
        for _ in range(count):
            self.synchronize()
            start = time.perf_counter()
            step()
            found["host"].append(1e3 * (time.perf_counter() - start))
            self.synchronize()
            found["latency"].append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(count):
            step()
        self.synchronize()
        found["throughput"].append(1e3 * (time.perf_counter() - start) / count)
        return found

    def kernels(self, function: Callable[[], object], calls: int) -> dict[str, list[float]]:
        """Return milliseconds and launches a call by kernel name, or by CPU operator in a dry run."""
        activity, kind = ProfilerActivity.CUDA, DeviceType.CUDA
        if self.dry:
            activity, kind = ProfilerActivity.CPU, DeviceType.CPU
        with profile(activities=[activity], acc_events=True) as profiled:
            for _ in range(calls):
                function()
            self.synchronize()
        found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for event in profiled.events():
            if event.device_type == kind:
                found[event.name][0] += event.time_range.elapsed_us() / 1e3 / calls
                found[event.name][1] += 1 / calls
        return found

    def replayable(self, function: Callable[[], object]) -> Callable[[], object]:
        """Capture the call in a CUDA graph, after a run that compiles everything. Return its replay."""
        return function if self.dry else replayable(function)

    def free(self) -> None:
        if not self.dry:
            torch.cuda.empty_cache()


@contextmanager
def by_kernel() -> Iterator[None]:
    """Raise RuntimeError if plain torch computes a fold inside the block."""

    before = dict(counters["triton_convbn"])
    yield
    now = counters["triton_convbn"]
    reasons = [key for key in now if key.startswith("decomposed:") and now[key] > before.get(key, 0)]
    if reasons:
        raise RuntimeError(f"no kernel has run: {', '.join(reasons)}")
