"""What a run costs: bytes kept for backward and at the peak, counted, and seconds, in paired rounds."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SavedBytes:
    """The bytes that autograd keeps between forward and backward: each storage once, without parameters and buffers."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self.storages.values())


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what a forward inside the block keeps for backward.

    Compile before: the hooks that count are no part of what is measured, and Dynamo would see them.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = SavedBytes()
    kept: list[Tensor] = []  # alive until the block ends, so that no address is counted for two tensors

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved.storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that torch allocates on the device at once during a call, above what was there before it.

    Counted by torch's allocators. What a library takes for itself, such as oneDNN's scratch memory, is not in it. What
    the function frees of what was there before may make room: leave it nothing to free.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes to stderr at every start, and of every missing GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


Clock = Callable[[Callable[[], object]], float]
"""Calls a function and returns the seconds that it took."""


def cpu_clock(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def cuda_clock(function: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """Seconds of one call on the current GPU, by CUDA events. before: runs on the GPU ahead of it, and is not timed."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if before is not None:
        before()
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_of(device: torch.device) -> Clock:
    return cuda_clock if device.type == "cuda" else cpu_clock


def cold_clock_of(device: torch.device) -> Clock:
    """Like `clock_of`, with an L2 cache that holds nothing of the call: a buffer of twice its size is written before.

    The GPU is still writing when the call is launched, so that a launch slower than its kernel is not in the time.
    """
    if device.type != "cuda":
        return cpu_clock
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(max(size, 2**28), dtype=torch.int8, device=device)

    def clock(function: Callable[[], object]) -> float:
        return cuda_clock(function, buffer.zero_)

    return clock


def replayable(function: Callable[[], object]) -> Callable[[], None]:
    """Return the call as a CUDA graph that can be replayed; it has run before, so that everything is compiled.

    What is returned keeps the function, and with it the tensors that the graph reads and writes by their addresses.
    Without that the tuner's second round on an H200 wrote to memory that was no longer its own.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay(_kept: Callable[[], object] = function) -> None:
        graph.replay()

    return replay


def rounds(
    functions: dict[str, Callable[[], object]],
    count: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    clock: Clock = cpu_clock,
) -> dict[str, list[float]]:
    """Seconds of each function, `count` times, in turn: a machine that slows down slows them all.

    Each is run once before, uncounted. The order is reversed every other round.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in progress(range(count)):
        for name in list(functions)[:: -1 if index % 2 else 1]:
            seconds[name].append(clock(functions[name]))
    return seconds


def ratios(seconds: list[float], baseline: list[float]) -> list[float]:
    """The paired ratios, round by round."""
    return [a / b for a, b in zip(seconds, baseline, strict=True)]


def median_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """An interval that holds the median of what the values were drawn from, whatever its distribution.

    Between two order statistics (the sign test turned around); at least 6 values give one at 95 %, fewer give NaN.
    """
    ordered, n = sorted(values), len(values)
    below, index = 0.0, -1  # the chance that at most `index` of n draws lie under the median
    while (grown := below + math.comb(n, index + 1) / 2**n) <= (1 - confidence) / 2:
        below, index = grown, index + 1
    return (ordered[index], ordered[n - 1 - index]) if index >= 0 else (math.nan, math.nan)
