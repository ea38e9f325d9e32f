"""Measure what a call costs: bytes kept for backward, bytes at the peak, and seconds in paired rounds."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SavedBytes:
    """Bytes that autograd keeps between forward and backward: each storage once, without parameters and buffers."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self.storages.values())


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[SavedBytes]:
    """Count the bytes that a forward inside the block keeps for backward.

    Compile the model before: Dynamo would trace the hooks that count.
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
    """Return the most bytes that torch has allocated on the device at once during a call, above those before it.

    torch's allocators count. Memory that a library allocates itself, such as oneDNN's scratch memory, is not counted.
    If the call frees memory that was allocated before it, the peak is too low.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Otherwise Kineto writes to stderr at every start, and about a missing GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


Clock = Callable[[Callable[[], object]], float]
"""A function that calls another and returns the seconds that the call took."""


def cpu_clock(function: Callable[[], object], now: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of one call, by `now`."""
    start = now()
    function()
    return now() - start


def cuda_clock(function: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """Return the seconds of one call on the current GPU, by CUDA events.

    Args:
        before: Runs on the GPU before the call, and is not timed.
    """
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
    """Return the clock for calls on the device."""
    return cuda_clock if device.type == "cuda" else cpu_clock


def cold_clock_of(device: torch.device) -> Clock:
    """Return a clock that overwrites the L2 cache before each call, with a buffer of twice its size.

    The GPU is still writing when the call is launched, so a launch that is slower than its kernel is not timed.
    """
    if device.type != "cuda":
        return cpu_clock
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(max(size, 2**28), dtype=torch.int8, device=device)

    def clock(function: Callable[[], object]) -> float:
        return cuda_clock(function, buffer.zero_)

    return clock


def replayable(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Capture the call in a CUDA graph, after a run that compiles everything. Return its replay.

    On the CPU there are no graphs, and the function is returned.

    The replay holds a reference to the function, and so to the tensors whose addresses the graph has. Without it, the
    tuner's second round on an H200 wrote to memory that had been freed.
    """
    if device.type != "cuda":
        return function
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
    """Return the seconds of each function, `count` times. The functions take turns, so a slow moment slows them all.

    The order is reversed every other round. Each runs once untimed right before it is timed, because in use a step
    follows one like it. An inference of mobileone_s0 took 47 ms on a CPU right after 180 ms of plain Inductor's, and
    43 ms after itself. Host time of the same code was 3.4 ms after another provider's and 3.3 ms after itself.

    Args:
        progress: Wraps the indices of the rounds, to show them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in progress(range(count)):
        for name in list(functions)[:: -1 if index % 2 else 1]:
            functions[name]()
            seconds[name].append(clock(functions[name]))
    return seconds


def median_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return a confidence interval of the median of the distribution that the values are drawn from.

    The bounds are two order statistics, as in the sign test, so no distribution is assumed. An interval at 95 % needs 6
    values. Fewer give NaN.
    """
    ordered, n = sorted(values), len(values)
    below, index = 0.0, -1  # the chance that at most `index` of n draws are below the median
    while (grown := below + math.comb(n, index + 1) / 2**n) <= (1 - confidence) / 2:
        below, index = grown, index + 1
    return (ordered[index], ordered[n - 1 - index]) if index >= 0 else (math.nan, math.nan)
