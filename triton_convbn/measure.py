"""What a run costs: bytes kept for backward, counted, and seconds, in paired rounds."""

import statistics
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


def cpu_clock(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rounds(
    functions: dict[str, Callable[[], object]],
    count: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    clock: Callable[[Callable[[], object]], float] = cpu_clock,
) -> dict[str, list[float]]:
    """Seconds of each function, `count` times, in turn: a machine that slows down slows them all.

    Each is run once before, uncounted. The order is reversed every other round. clock: calls a function and returns
    the seconds that it took.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in progress(range(count)):
        for name in list(functions)[:: -1 if index % 2 else 1]:
            seconds[name].append(clock(functions[name]))
    return seconds


def ratio(seconds: list[float], baseline: list[float]) -> float:
    """The median of the paired ratios, round by round."""
    return statistics.median(a / b for a, b in zip(seconds, baseline, strict=True))
