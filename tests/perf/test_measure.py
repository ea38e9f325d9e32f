"""Test measurements: intervals against all outcomes, rounds with a fake clock, bytes of known allocations."""

import gc
import itertools
import math
import random
import time
import weakref
from collections.abc import Callable, Iterable
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from triton_convbn.measure import (
    clock_of,
    cpu_clock,
    cuda_clock,
    median_interval,
    peak_bytes,
    replayable,
    rounds,
    saved_for_backward,
)

CPU = torch.device("cpu")


def widest_index(n: int, confidence: float) -> int:
    """Return the largest i for which the i-th smallest and i-th largest value enclose the median often enough, or -1.

    Count all ways in which n draws can be below or above the median.
    """
    below = [outcome.bit_count() for outcome in range(2**n)]
    held = [sum(i < count < n - i for count in below) / 2**n for i in range((n + 1) // 2)]
    return max((i for i, share in enumerate(held) if share >= confidence), default=-1)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("n", range(1, 14))
def test_interval_against_all_outcomes(n: int, confidence: float) -> None:
    index = widest_index(n, confidence)
    low, high = median_interval([float(value) for value in range(n)], confidence)
    if index < 0:
        assert math.isnan(low)
        assert math.isnan(high)
    else:
        assert (low, high) == (index, n - 1 - index)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # other processes may use the machine
@given(st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=40), st.randoms())
def test_interval_bounds_are_values(values: list[float], shuffler: random.Random) -> None:
    low, high = median_interval(values)
    ordered = sorted(values)
    assert low in values
    assert high in values
    assert low <= ordered[len(values) // 2] <= high
    # Neither order nor sign of the values matters.
    shuffler.shuffle(values)
    assert median_interval(values) == (low, high)
    assert median_interval([-value for value in values]) == (-high, -low)


@pytest.mark.parametrize("n", [6, 9, 10, 25])
def test_coverage_of_the_interval(n: int) -> None:
    """The distribution is far from symmetric: its mean is e times its median."""
    index = widest_index(n, 0.95) if n < 14 else 7
    exact = 1 - 2 * sum(math.comb(n, k) for k in range(index + 1)) / 2**n
    assert exact >= 0.95
    draws = random.Random(n)
    trials, held = 4000, 0
    for _ in range(trials):
        low, high = median_interval([draws.lognormvariate(0, math.sqrt(2)) for _ in range(n)])
        held += low <= 1 <= high
    assert abs(held / trials - exact) < 4 * math.sqrt(exact * (1 - exact) / trials)


@pytest.mark.parametrize("n", range(6))
def test_few_values_give_no_interval(n: int) -> None:
    assert all(map(math.isnan, median_interval([1.0] * n)))


def test_rounds_take_turns_in_alternating_order() -> None:
    calls: list[str] = []
    ticks = itertools.count(1)
    shown: list[int] = []

    def clock(function: Callable[[], object]) -> float:
        function()
        return float(next(ticks))

    def progress(of: Iterable[int]) -> Iterable[int]:
        for index in of:
            yield index
            shown.append(len(calls))

    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = rounds(functions, 3, progress, clock)
    # The first call of two is not timed.
    assert "".join(calls) == "aabbcc" + "ccbbaa" + "aabbcc"
    assert seconds == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    assert shown == [6, 12, 18]


def test_rounds_without_a_function_or_a_round() -> None:
    assert rounds({}, 3) == {}
    assert rounds({"a": lambda: None}, 0) == {"a": []}


def test_clock() -> None:
    assert clock_of(CPU) is cpu_clock
    assert clock_of(torch.device("cuda", 1)) is cuda_clock
    start = time.perf_counter()
    measured = cpu_clock(lambda: time.sleep(0.02))
    assert 0.02 <= measured <= time.perf_counter() - start


def allocated(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)


def test_peak_of_known_allocations() -> None:
    before = allocated(50_000_000)

    def function() -> None:
        first = allocated(1_000_000)
        second = allocated(4_000_000)
        del second
        third = allocated(2_000_000)
        allocated(500_000)
        del first, third
        allocated(3_000_000)

    assert peak_bytes(function, CPU) == 5_000_000
    assert peak_bytes(lambda: None, CPU) == 0
    assert peak_bytes(lambda: before[::2], CPU) == 0, "a view"
    kept: list[torch.Tensor] = []
    assert peak_bytes(lambda: kept.append(allocated(7_000_000)), CPU) == 7_000_000, "a tensor that is kept counts"


def kept_by(model: nn.Module, *shape: int, grad: bool = True) -> int:
    x = torch.randn(*shape)
    with torch.set_grad_enabled(grad), saved_for_backward(model) as saved:
        model(x)
    return saved.total


def test_saved_by_a_known_model() -> None:
    """A Linear keeps its input and its weight, which is a parameter. ReLU and the square keep the ReLU's output."""

    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Square())
    assert kept_by(model, 5, 4) == 4 * (5 * 4 + 5 * 8)
    assert kept_by(model, 5, 4, grad=False) == 0
    assert kept_by(model.requires_grad_(False), 5, 4) == 0


def test_saved_by_batch_norm() -> None:
    """Weight and statistics belong to the model. BatchNorm costs the convolution's output."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
    assert kept_by(model, 2, 3, 8, 8) == 4 * 2 * (3 * 8 * 8 + 6 * 6 * 6)
    model[1].weight.requires_grad_(False)
    assert kept_by(model, 2, 3, 8, 8) >= 4 * 2 * 3 * 8 * 8


def test_saved_counts_a_storage_whole_and_once() -> None:
    """A view keeps its whole storage alive."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2)
            return first * self.scale + second * self.scale

    assert kept_by(Halves(), 10, 3) == 4 * 10 * 3
    with saved_for_backward(nn.Identity()) as saved:
        for _ in range(3):  # the freed memory must not be reused, or it would count once
            torch.randn(100).requires_grad_().exp()
    assert saved.total == 3 * 4 * 100


def test_replay_keeps_its_tensors() -> None:
    """A CUDA graph has only addresses. Freed memory would be reused."""
    tensor = torch.zeros(3)
    known = weakref.ref(tensor)

    def call(held: torch.Tensor = tensor) -> None:
        held.add_(1)

    stand_ins = {name: mock.MagicMock() for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph")}
    with mock.patch.multiple(torch.cuda, **stand_ins):
        replay = replayable(call, torch.device("cuda"))
    del tensor, call
    gc.collect()
    assert known() is not None
    replay()
    stand_ins["CUDAGraph"].return_value.replay.assert_called_once_with()
    del replay
    gc.collect()
    assert known() is None
    assert replayable(gc.collect, CPU) is gc.collect
