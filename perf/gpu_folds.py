"""The part of the GPU check that times the folds of a model, and holds them against the copy bandwidth of that GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from triton_convbn.kernels.spec import Needs

from triton_convbn import ConvBNPass
from triton_convbn.ops import FOLD, OPTIONAL, Columns, fold_backward

from .gpu_bench import Bench, by_kernel
from .report import Report
from .subject import Subject
from .table import Key


def groups_of(model: nn.Module, x: Tensor, dtype: torch.dtype | None) -> list[Columns]:
    """The groups that the pass makes of a model, with the model's own tensors. dtype: that of autocast, or None."""
    groups: list[Columns] = []

    class Interpreter(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is FOLD:
                groups.append(Columns(*args))
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
        raise RuntimeError("the pass has put no fold into the graph")
    return [group._replace(weights=[w.detach() for w in group.weights]) for group in groups]


def copy_bandwidth(bench: Bench, report: Report) -> float | None:
    """GB/s of a copy that is large against every cache, read and written."""
    case = Key("copy", "torch", "forward", "float32")
    with report.keeping(case, "bandwidth", "GB/s"):
        size = 2**18
        if not bench.dry:
            free, _ = torch.cuda.mem_get_info()
            size = min(2**28, free // 16)  # elements: 1 GiB, or a quarter of what is free for the two
        source = torch.randn(size, device=bench.device)
        target = torch.empty_like(source)
        p50, p20, p80 = bench.milliseconds(lambda: target.copy_(source))
        report.measured(case, "time", "ms", (p50, p20, p80))
        rate = 2 * source.nbytes / 1e6
        report.measured(case, "bandwidth", "GB/s", (rate / p50, rate / p80, rate / p20))
        return rate / p50
    return None


def folds(bench: Bench, report: Report, subject: Subject) -> None:
    """Each group, forward and backward: as the operator is called, and without the host, in a CUDA graph."""
    copy = copy_bandwidth(bench, report)
    bench.free()
    for dtype, name in ((None, "float32"), (torch.bfloat16, "autocast_bfloat16")):
        case = Key(f"{subject.key.case}_folds", dtype=name)
        with report.keeping(case, "time", "ms"):
            groups = groups_of(subject.model, subject.x[:1], dtype)
            report.measured(case, "launches", "launches", len(groups))
            report.measured(case, "pairs_folded", "pairs", sum(len(group.weights) for group in groups))
            for index, group in enumerate(groups):
                each = case._replace(case=f"{subject.key.case}_fold_group_{index}")
                _time_group(bench, report, each, group, copy)


def _time_group(bench: Bench, report: Report, case: Key, columns: Columns, copy: float | None) -> None:
    with torch.no_grad():
        with report.keeping(case._replace(mode="forward"), "time", "ms"):

            def forward() -> list[Tensor]:
                return list(FOLD(*columns))

            with by_kernel():
                folded = forward()
            moved = _bytes(columns.weights) + _bytes(columns.vectors) + _bytes(folded)
            _time(bench, report, case._replace(mode="forward"), forward, moved, copy)
        with report.keeping(case._replace(mode="backward"), "time", "ms"):
            folded = forward()
            own = columns.by_pair(folded)
            pairs = [(torch.randn_like(weight), torch.randn_like(bias)) for weight, bias, _ in own]
            powers = [power for *_, power in own if power is not None]
            del folded, own
            has = [[bool(mask >> bit & 1) for bit in range(len(OPTIONAL))] for mask in columns.present]
            needs = [Needs(True, *present) for present in has]

            def backward() -> list[list[Tensor | None]]:
                return fold_backward(columns, pairs, needs, powers)

            with by_kernel():
                found = backward()
            written = [t for gradients in found for t in gradients if t is not None]
            read = [*columns.weights, *columns.vectors, *(t for pair in pairs for t in pair)]
            # bn_bias is among the vectors, and its values are not read: a few bytes a channel too many.
            _time(bench, report, case._replace(mode="backward"), backward, _bytes(read) + _bytes(written), copy)


def _time(
    bench: Bench, report: Report, case: Key, function: Callable[[], object], moved: int, copy: float | None
) -> None:
    report.measured(case, "bytes_moved", "bytes", moved)
    for provider, way in (
        ("triton_convbn", lambda: function),
        ("triton_convbn_cuda_graph", lambda: bench.replayable(function)),
    ):
        each = case._replace(provider=provider)
        with report.keeping(each, "time", "ms"):
            p50, p20, p80 = bench.milliseconds(way())
            report.measured(each, "time", "ms", (p50, p20, p80))
            rates = tuple(moved / 1e6 / t for t in (p50, p80, p20))
            report.measured(each, "bandwidth", "GB/s", (rates[0], rates[1], rates[2]))
            if copy is not None:
                shares = (rates[0] / copy, rates[1] / copy, rates[2] / copy)
                report.measured(each, "share_of_copy_bandwidth", "1", shares)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
