"""Run a model by one provider in one setting, each in a process of its own.

TF32 and cuDNN settings are torch's defaults for all providers. Errors are compared with those of eager.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from triton_convbn.models import randomize

from ..providers import PROVIDERS, Compiled
from ..results import Report, percentiles
from ..runner import check_errors, first_step, limits_of, report_memory
from ..subject import LAYOUTS, Subject, subject
from ..workloads import Case, Setting, whole
from .device import kernels, step_milliseconds

CUDA_GRAPHS = "_reduce_overhead"
"""Suffix of a provider that uses CUDA graphs, as torch.compile does with mode="reduce-overhead"."""

MUST_FOLD = {
    "train": ("inductor_efficient_conv_bn", "triton_convbn"),
    "infer": ("triton_convbn_always", "triton_convbn_freezing"),
}
"""Providers that fold pairs whether it is profitable or not, by mode."""

TURNS = 4
"""The number of times that each provider is measured, in turn with the others of its setting. On an H200 machine
the host time of one step went from 17 to 24 ms between two turns."""


def tiny() -> nn.Module:
    """Return a model of two pairs for a dry run. No ReLU, see `runner.limits_of`."""
    first = nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.Tanh()
    return randomize(nn.Sequential(*first, nn.Conv2d(4, 8, 3, 2), nn.BatchNorm2d(8), nn.Flatten()).eval())


def subject_of(device: torch.device, model: str | None, mode: str, dtype: str, batch: int) -> Subject:
    """Return the named model in channels_last; by default ResNet-50, or a tiny model in a dry run.

    Raises: UsageError for an unknown name.
    """
    torch.manual_seed(0)
    dry = device.type == "cpu"
    case = Case("tiny", tiny, (3, 16, 16)) if dry and not model else whole(model or "resnet50", 64 if dry else None)
    one = subject(case, Setting(mode, dtype, "channels_last", 1), device)  # batch 1, as it runs on the CPU
    x = torch.randn(batch, *case.shape).to(device, one.x.dtype, memory_format=LAYOUTS["channels_last"])
    return replace(one, x=x, key=one.key._replace(batch=batch))


def run(
    device: torch.device,
    report: Report,
    model: str | None,
    mode: str,
    dtype: str,
    batch: int,
    provider: str,
    exact: str,
) -> Iterator[None]:
    """Compile, time in turns, then measure memory and kernels, and log the slowest kernels.

    exact: File of the results in fp64, and of the limits that eager's own errors set. The first process writes it.
    """
    plain = provider.removesuffix(CUDA_GRAPHS)
    graphs, chosen = plain != provider, PROVIDERS[plain]
    if graphs and isinstance(chosen, Compiled):
        chosen = Compiled(provider, chosen.backend, **chosen.options, **{"triton.cudagraphs": True})
    own = subject_of(device, model, mode, dtype, batch)
    key = own.key._replace(provider=provider)
    dry = device.type == "cpu"
    with report.keeping(key, "run"):
        way, _, pairs = first_step(own, chosen)
        own.step(way.call, way.model)  # the second call records the CUDA graph
        found = {name: t.detach().to("cpu", copy=True) for name, t in own.step(way.call, way.model).items()}
        step = own.timed_step(way.call, way.model)
        way.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        yield
        report.measured(key, "pairs_folded", "pairs", pairs)
        if plain in MUST_FOLD[mode] and not pairs:
            raise RuntimeError("no pair was folded")
        with report.keeping(key, "output_error", "1"):
            path = Path(exact)
            if not path.exists():
                results = own.exact()
                draft = path.with_suffix(".draft")
                torch.save((results, limits_of(own, results)), draft)
                draft.rename(path)
            check_errors(report, key, found, *torch.load(path))
        spent: dict[str, list[float]] = {}
        for turn in range(1, TURNS + 1):
            step_milliseconds(step, 1 if dry else 3, device)  # warm again
            for metric, times in step_milliseconds(step, 2 if dry else 10, device).items():
                report.measured(key, f"{metric}_turn_{turn}", "ms", percentiles(times))
                spent.setdefault(metric, []).extend(times)
            yield
        for metric, times in spent.items():
            report.measured(key, metric, "ms", percentiles(times))
        way.model.zero_grad(set_to_none=True)
        if graphs:
            report.skipped(key, "peak_memory", "bytes", "memory is in the CUDA graphs' pool")
        else:
            report_memory(report, key, own, way)
        every = kernels(step, 1 if dry else 3, device)
        fold = {name: each for name, each in every.items() if name.startswith("fold")}
        for prefix, few in (("", every), ("fold_", fold)):
            report.measured(key, f"{prefix}gpu_time", "ms", sum(milliseconds for milliseconds, _ in few.values()))
            report.measured(key, f"{prefix}kernels", "launches", sum(count for _, count in few.values()))
        for name, (milliseconds, count) in sorted(every.items(), key=lambda each: -each[1][0])[:12]:
            report.say(f"{key.provider}: {1e3 * milliseconds:9.1f} us {count:6.1f} launches  {name[:100]}")
