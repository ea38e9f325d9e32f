"""Time the folds of a model, and compare their bandwidth with copies on the same GPU."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from triton_convbn.kernels.kernel_call import random_pair
from triton_convbn.kernels.spec import Needs

from triton_convbn.kernel_view import kernels_of
from triton_convbn.measure import cpu_clock
from triton_convbn.ops.library import fold_backward, fold_op
from triton_convbn.ops.packed_pairs import PackedPairs
from triton_convbn.options import Options

from ..results import Key, Quantiles, Report, percentiles
from .device import by_kernel, cold_milliseconds, synchronize
from .models import subject_of

Call = tuple[Key, Callable[[], object], int]
"""A key, the call to time, and the bytes that it must move."""


def fold_calls(device: torch.device, report: Report, model: str | None) -> list[Call]:
    """Return the folds of the model and their backward, in fp32 and under autocast, in the groups of the pass."""
    subject = subject_of(device, model, "train", "float32", 1)
    generator = torch.Generator().manual_seed(0)
    calls: list[Call] = []
    for dtype, autocast in (("float32", False), ("autocast_bfloat16", True)):
        case = Key(f"{subject.key.case}_folds", dtype=dtype)
        with report.keeping(case, "launches", "launches"):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                views = kernels_of(subject.model, [subject.x], Options.of(when="always"))
            groups = [view.specs for view in views if view.direction == "forward"]
            report.measured(case, "launches", "launches", len(groups))
            report.measured(case, "pairs_folded", "pairs", sum(map(len, groups)))
            for index, specs in enumerate(groups):
                pairs = [random_pair(spec, device, generator) for spec in specs]
                key = case._replace(case=f"{subject.key.case}_fold_group_{index}")
                calls += _calls_of(key, PackedPairs.pack(pairs))
    return calls


def _calls_of(key: Key, packed: PackedPairs) -> list[Call]:
    """Return the fold of a group and its backward, after one run of each by its kernel."""
    needs = [Needs(*(p is not None for p in pair[:4])) for pair in packed.unpack()]
    with torch.no_grad(), by_kernel():
        folded = fold_op(*packed)
        grads = [(torch.randn_like(weight), torch.randn_like(bias)) for weight, bias, _ in packed.by_pair(folded)]
        powers = folded[2 * len(grads) :]
        gradients = fold_backward(packed, grads, needs, powers)
    inputs = _bytes([*packed.weights, *packed.vectors])
    # Backward does not read bn_bias, so this counts a few bytes a channel too many.
    moved = inputs + sum(map(_bytes, (*grads, *gradients)))
    return [
        (key._replace(mode="forward"), lambda: fold_op(*packed), inputs + _bytes(folded)),
        (key._replace(mode="backward"), lambda: fold_backward(packed, grads, needs, powers), moved),
    ]


def _bytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def folds(device: torch.device, report: Report, model: str | None) -> Iterator[None]:
    """Time each group in a CUDA graph, without the host, and the host's part of a call by itself."""
    calls = fold_calls(device, report, model)
    yield
    size, rounds = (2**30, 20) if device.type == "cuda" else (2**20, 2)
    large = _copy(device, size)
    case = Key("copy", "torch", "forward", "float32")
    report.measured(case, "gpu_time", "ms", large)
    report.measured(case, "bandwidth", "GB/s", _over(2 * size / 1e6, large))
    for key, function, moved in calls:
        with report.keeping(key, "gpu_time", "ms"), torch.no_grad():
            report.measured(key, "bytes_moved", "bytes", moved)
            spent = cold_milliseconds(function, device)
            report.measured(key, "gpu_time", "ms", spent)
            report.measured(key, "bandwidth", "GB/s", _over(moved / 1e6, spent))
            report.measured(key, "share_of_copy_bandwidth", "1", _over(moved / (2 * size) * large[0], spent))
            same = _copy(device, moved // 2)[0]
            report.measured(key, "share_of_copy_of_same_size", "1", _over(same, spent))
            function()
            synchronize(device)
            report.measured(key, "host", "us", percentiles([1e6 * cpu_clock(function) for _ in range(rounds)]))
            synchronize(device)


def _copy(device: torch.device, size: int) -> Quantiles:
    """Time a copy that reads and writes `size` bytes."""
    source = torch.randint(100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return cold_milliseconds(lambda: target.copy_(source), device)


def _over(value: float, spent: Quantiles) -> Quantiles:
    """Return value over time. Percentiles swap, as a longer time is a lower rate."""
    return value / spent[0], value / spent[2], value / spent[1]
