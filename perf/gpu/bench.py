"""Measure on the GPU, or on the CPU in a dry run."""

import time
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

    @property
    def second(self) -> torch.device | None:
        """A device other than the current one. In a dry run the same one, and None if there is one GPU."""
        if self.dry:
            return self.device
        others = [index for index in range(torch.cuda.device_count()) if index != self.device.index]
        return torch.device("cuda", others[0]) if others else None

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def gpu_milliseconds(self, function: Callable[[], object], rep: float = 100) -> Quantiles:
        """Time the call as a replayed CUDA graph with a cold L2 cache. rep: milliseconds to measure."""
        if self.dry:
            return percentiles([1e3 * cpu_clock(function) for _ in range(2)])
        import triton.testing

        again = self.replayable(function)
        p50, p20, p80 = triton.testing.do_bench(again, warmup=rep / 4, rep=rep, quantiles=[0.5, 0.2, 0.8])
        return p50, p20, p80

    def host_microseconds(self, function: Callable[[], object], calls: int = 20) -> Quantiles:
        """Time a call on the host, without waiting for the GPU."""
        function()
        self.synchronize()
        found = [1e6 * cpu_clock(function) for _ in range(2 if self.dry else calls)]
        self.synchronize()
        return percentiles(found)

    def step_milliseconds(self, step: Callable[[], object], count: int) -> dict[str, list[float]]:
        """Return latency and host time of `count` synchronized steps, and milliseconds a step of as many in a row."""
        found: dict[str, list[float]] = {"latency": [], "host": [], "throughput": []}
        for _ in range(count):
            self.synchronize()
            start = time.perf_counter()
            step()
            enqueued = time.perf_counter()
            self.synchronize()
            found["host"].append(1e3 * (enqueued - start))
            found["latency"].append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(count):
            step()
        self.synchronize()
        found["throughput"].append(1e3 * (time.perf_counter() - start) / count)
        return found

    def kernels(self, function: Callable[[], object], calls: int = 3) -> dict[str, tuple[float, float]]:
        """Return milliseconds and launches a call by kernel name, or by CPU operator in a dry run."""
        activity, kind = ProfilerActivity.CUDA, DeviceType.CUDA
        if self.dry:
            activity, kind = ProfilerActivity.CPU, DeviceType.CPU
        with profile(activities=[activity], acc_events=True) as profiled:
            for _ in range(calls):
                function()
            self.synchronize()
        found: dict[str, tuple[float, float]] = {}
        for event in profiled.events():
            if event.device_type == kind:
                milliseconds, count = found.get(event.name, (0.0, 0.0))
                spent = event.time_range.elapsed_us() / 1e3 / calls
                found[event.name] = milliseconds + spent, count + 1 / calls
        return found

    def replayable(self, function: Callable[[], object]) -> Callable[[], object]:
        """Capture the call in a CUDA graph, after a run that compiles everything. Return its replay."""
        return function if self.dry else replayable(function)

    @contextmanager
    def busy_side_stream(self) -> Iterator[None]:
        """Switch to a stream that first waits some 50 ms: work on any other stream runs too early."""
        if self.dry:
            yield
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # clock cycles
            yield
        torch.cuda.synchronize()

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
