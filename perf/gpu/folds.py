"""Time the folds of a model, and compare their bandwidth with copies on the same GPU."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from triton_convbn.kernels.spec import Needs

from triton_convbn import ConvBNPass
from triton_convbn.ops.library import fold_backward, fold_op
from triton_convbn.ops.packed_pairs import OPTIONAL, PackedPairs

from ..results import Key, Quantiles, Report
from .bench import Bench, by_kernel
from .models import subject_of

Call = tuple[Key, Callable[[], object], int]
"""A key, the call to time, and the bytes that it must move."""


def groups_of(model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> list[PackedPairs]:
    """Return the groups that the pass folds together, with the model's tensors. dtype: of autocast, or None."""
    groups: list[PackedPairs] = []

    class Interpreter(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is fold_op:
                groups.append(PackedPairs(*args))
            return super().call_function(target, args, kwargs)

    def backend(gm: fx.GraphModule, _inputs: Sequence[Tensor]) -> Callable[..., Any]:
        ConvBNPass(when="always")(gm.graph)
        gm.recompile()
        return lambda *inputs: Interpreter(gm).run(*inputs)

    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        torch.compile(model, backend=backend)(x)
    torch._dynamo.reset()
    if not groups:
        raise RuntimeError("the pass folded nothing")
    return [group._replace(weights=[w.detach() for w in group.weights]) for group in groups]


def calls_of(key: Key, columns: PackedPairs) -> list[Call]:
    """Return the calls of a group's fold and of its backward, after one run of each by its kernel."""
    with torch.no_grad(), by_kernel():
        folded = fold_op(*columns)
        own = columns.by_pair(folded)
        grads = [(torch.randn_like(weight), torch.randn_like(bias)) for weight, bias, _ in own]
        powers = [power for *_, power in own if power is not None]
        has = [[bool(mask >> bit & 1) for bit in range(len(OPTIONAL))] for mask in columns.present]
        needs = [Needs(True, *present) for present in has]

        def forward() -> object:
            return fold_op(*columns)

        def backward() -> list[list[Tensor | None]]:
            return fold_backward(columns, grads, needs, powers)

        written = [t for gradients in backward() for t in gradients if t is not None]
    inputs = _bytes(columns.weights) + _bytes(columns.vectors)
    # Backward does not read bn_bias, so this counts a few bytes a channel too many.
    moved = inputs + _bytes([t for pair in grads for t in pair]) + _bytes(written)
    return [
        (key._replace(mode="forward"), forward, inputs + _bytes(folded)),
        (key._replace(mode="backward"), backward, moved),
    ]


def fold_calls(bench: Bench, report: Report, model: str | None) -> list[Call]:
    """Return the calls of all groups of the model, in fp32 and under autocast."""
    subject = subject_of(bench, model, "train", "float32", 1)
    calls: list[Call] = []
    for dtype, name in ((None, "float32"), (torch.bfloat16, "autocast_bfloat16")):
        case = Key(f"{subject.key.case}_folds", dtype=name)
        with report.keeping(case, "launches", "launches"):
            groups = groups_of(subject.model, subject.x, dtype)
            report.measured(case, "launches", "launches", len(groups))
            report.measured(case, "pairs_folded", "pairs", sum(len(group.weights) for group in groups))
            for index, group in enumerate(groups):
                calls += calls_of(case._replace(case=f"{subject.key.case}_fold_group_{index}"), group)
    return calls


def folds(bench: Bench, report: Report, model: str | None) -> Iterator[None]:
    """Time each group in a CUDA graph, without the host, and the host's part of a call by itself."""
    calls = fold_calls(bench, report, model)
    yield
    large = _copy(bench, 2**20 if bench.dry else 2**30)
    case = Key("copy", "torch", "forward", "float32")
    report.measured(case, "gpu_time", "ms", large)
    report.measured(case, "bandwidth", "GB/s", _over(2**21 / 1e6 if bench.dry else 2**31 / 1e6, large))
    for key, function, moved in calls:
        with report.keeping(key, "gpu_time", "ms"), torch.no_grad():
            report.measured(key, "bytes_moved", "bytes", moved)
            spent = bench.gpu_milliseconds(function)
            report.measured(key, "gpu_time", "ms", spent)
            report.measured(key, "bandwidth", "GB/s", _over(moved / 1e6, spent))
            share = moved / (2**21 if bench.dry else 2**31) * large[0]
            report.measured(key, "share_of_copy_bandwidth", "1", _over(share, spent))
            same = _copy(bench, moved // 2)[0]
            report.measured(key, "share_of_copy_of_same_size", "1", _over(same, spent))
            report.measured(key, "host", "us", bench.host_microseconds(function))


def _copy(bench: Bench, size: int) -> Quantiles:
    """Time a copy that reads and writes `size` bytes."""
    source = torch.randint(100, (size,), dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    return bench.gpu_milliseconds(lambda: target.copy_(source))


def _over(value: float, spent: Quantiles) -> Quantiles:
    """Return value over time. Percentiles swap, as a longer time is a lower rate."""
    return value / spent[0], value / spent[2], value / spent[1]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
