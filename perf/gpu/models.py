"""Run a model by one provider in one setting, each in a process of its own.

TF32 and cuDNN settings are torch's defaults for all providers. Errors are compared with those of eager.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from triton_convbn.measure import peak_bytes, saved_for_backward
from triton_convbn.models import randomize

from ..providers import PROVIDERS, Compiled, Provider
from ..results import Key, Report, percentiles
from ..runner import check_errors, first_step, limits_of
from ..workloads import LAYOUTS, Case, Setting, Subject, subject, whole
from .bench import Bench

FOLDING = {
    "train": {"inductor_efficient_conv_bn", "triton_convbn"},
    "infer": {"triton_convbn_always", "triton_convbn_freezing"},
}
"""Providers that must fold pairs, by mode. The others fold only where it is profitable."""

TURNS = 4
"""Times each provider is measured, in turn with the others of its setting. On an H200 machine the host time of one step
went from 17 to 24 ms between two turns."""


def tiny() -> nn.Module:
    """Return a model of two pairs for a dry run. No ReLU, see `run.allowed`."""
    first = nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.Tanh()
    return nn.Sequential(*first, nn.Conv2d(4, 8, 3, 2), nn.BatchNorm2d(8), nn.Flatten()).eval()


def subject_of(bench: Bench, model: str | None, mode: str, dtype: str, batch: int) -> Subject:
    """Return the named model in channels_last; by default ResNet-50, or a tiny model in a dry run.

    Raises: UsageError for an unknown name.
    """
    torch.manual_seed(0)
    if model is None and bench.dry:
        case = Case("tiny", lambda: copy.deepcopy(randomize(tiny())), (3, 16, 16))
    else:
        case = whole(model or "resnet50", 64 if bench.dry else None)
    one = subject(case, Setting(mode, dtype, "channels_last", 1), bench.device)  # batch 1, as it runs on the CPU
    x = torch.randn(batch, *case.shape).to(bench.device, one.x.dtype, memory_format=LAYOUTS["channels_last"])
    return replace(one, x=x, key=one.key._replace(batch=batch))


def provider_of(name: str, cuda_graphs: bool) -> Provider:
    """Return the named provider. cuda_graphs: as with torch.compile's mode="reduce-overhead"."""
    plain = PROVIDERS[name]
    if not cuda_graphs or not isinstance(plain, Compiled):
        return plain
    return Compiled(f"{name}_reduce_overhead", plain.backend, **plain.options, **{"triton.cudagraphs": True})


def run(
    bench: Bench,
    report: Report,
    model: str | None,
    mode: str,
    dtype: str,
    batch: int,
    provider: str,
    cuda_graphs: bool,
    exact: str,
) -> Iterator[None]:
    """Compile, time in turns, then measure memory and kernels. exact: file of fp64 results, which eager writes."""
    chosen, own = provider_of(provider, cuda_graphs), subject_of(bench, model, mode, dtype, batch)
    key = own.key._replace(provider=chosen.name)
    with report.keeping(key, "run"):
        way, _, pairs = first_step(own, chosen)

        def step() -> object:
            return own.step(way.call, way.model)

        step()  # the second call records the CUDA graph
        found = {name: t.detach().to("cpu", copy=True) for name, t in own.step(way.call, way.model).items()}
        way.model.zero_grad(set_to_none=True)
        bench.free()
        yield
        report.measured(key, "pairs_folded", "pairs", pairs)
        if provider in FOLDING[mode] and not pairs:
            raise RuntimeError("no pair was folded")
        with report.keeping(key, "output_error", "1"):
            if provider == "eager":
                _save_exact(own, Path(exact))
            exact_values, limits = torch.load(exact)
            check_errors(report, key, found, exact_values, limits)
        spent: dict[str, list[float]] = {}
        for turn in range(1, TURNS + 1):
            bench.step_milliseconds(step, 1 if bench.dry else 3)  # warm again
            for metric, times in bench.step_milliseconds(step, 2 if bench.dry else 10).items():
                report.measured(key, f"{metric}_turn_{turn}", "ms", percentiles(times))
                spent.setdefault(metric, []).extend(times)
            yield
        for metric, times in spent.items():
            report.measured(key, metric, "ms", percentiles(times))
        way.model.zero_grad(set_to_none=True)
        if cuda_graphs:
            report.skipped(key, "peak_memory", "bytes", "memory is in the CUDA graphs' pool")
        else:
            if own.trains:
                with saved_for_backward(way.model) as saved:
                    own.forward(way.call)
                report.measured(key, "saved_for_backward", "bytes", saved.total)
            report.measured(key, "peak_memory", "bytes", peak_bytes(step, bench.device))
        _kernels(bench, report, key, bench.kernels(step, 1 if bench.dry else 3))


def _save_exact(own: Subject, path: Path) -> None:
    """Save the results of the step in fp64, and the limits that eager's own errors set."""
    exact = own.exact()
    draft = path.with_suffix(".draft")
    torch.save((exact, limits_of(own, exact)), draft)
    draft.rename(path)


def _kernels(bench: Bench, report: Report, key: Key, found: dict[str, tuple[float, float]]) -> None:
    """Report time and number of all kernels and of the folds, and log the slowest."""
    fold = [each for name, each in found.items() if name.startswith("fold")]
    for metric, few in (("gpu_time", list(found.values())), ("fold_gpu_time", fold)):
        report.measured(key, metric, "ms", sum(milliseconds for milliseconds, _ in few))
        report.measured(key, metric.replace("gpu_time", "kernels"), "launches", sum(count for _, count in few))
    for name, (milliseconds, count) in sorted(found.items(), key=lambda each: -each[1][0])[:12]:
        report.say(f"{key.provider}: {1e3 * milliseconds:9.1f} us {count:6.1f} launches  {name[:100]}")
