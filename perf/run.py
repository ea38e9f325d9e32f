"""One case in one setting, run in every way: errors, memory, compile time, and times in paired rounds."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

from triton_convbn.measure import clock_of, median_interval, peak_bytes, ratios, rounds, saved_for_backward

from .providers import Provider, Way
from .report import Report
from .subject import Subject
from .table import Key, percentiles

BASELINES = ("eager", "inductor", "inductor_efficient_conv_bn")
"""Whose times the others' are divided by, round by round."""

Progress = Callable[[Iterable[int]], Iterable[int]]


def allowed(metric: str, eager: float) -> float:
    """The relative error that others may have where eager has this one. A wrong fold is off by about 1. Rounding
    differs from way to way, and in a gradient a ReLU that decides otherwise on the last bit makes far more of that."""
    loose = max(0.5, 2 * eager)
    return loose if metric == "gradient_error" else max(1e-4, min(10 * eager, loose))


def is_done(subject_key: Key, providers: Sequence[Provider], report: Report) -> bool:
    """Whether the report has this setting already: a time of every provider, or why there is none."""
    keys = [subject_key._replace(provider=provider.name) for provider in providers]
    return all(report.row(key, "time") or report.row(key, "run") for key in keys)


def measure(
    subject: Subject,
    providers: Sequence[Provider],
    report: Report,
    count: int,
    cold: bool = False,
    progress: Progress = iter,
) -> None:
    """Measure a subject with every provider, and report a row for each metric.

    A provider that fails is a row with its error under the metric `run`, and the others go on without it.

    Args:
        count: timed rounds.
        cold: compile with empty caches, so that `compile_time` is what a first run takes; not reported otherwise.
        progress: wraps the timed rounds.
    """
    torch._dynamo.reset()
    # Every provider compiles the same forward, each under its own guard.
    with dynamo_config.patch(recompile_limit=4 * len(providers) + 8):
        report.say(f"{_text(subject.key)}: eager in fp64")
        exact = subject.exact()
        steps: dict[str, Callable[[], object]] = {}
        limits: dict[str, float] = {}
        for provider in providers:
            key = subject.key._replace(provider=provider.name)
            why = provider.refuses(subject)
            if why is not None:
                report.skipped(key, "run", "", why)
                continue
            report.say(f"{_text(subject.key)}: {provider.name}")
            with report.keeping(key, "run"):
                steps[provider.name] = _provider(subject, provider, key, exact, limits, report, cold)
            subject.clear()
        report.say(f"{_text(subject.key)}: {count} rounds")
        _times(subject, steps, report, count, progress)
        subject.clear()
    torch._dynamo.reset()


def _text(key: Key) -> str:
    return f"{key.case} {key.mode} {key.dtype} {key.layout} batch {key.batch}"


def _provider(
    subject: Subject,
    provider: Provider,
    key: Key,
    exact: dict[str, Tensor],
    limits: dict[str, float],
    report: Report,
    cold: bool,
) -> Callable[[], object]:
    """Everything but the times; returns what is to be timed."""
    device = subject.x.device
    with ExitStack() as caches:
        if cold:
            caches.enter_context(fresh_cache())
        # A graph out of a cache skips the pass, and with it the count of its pairs.
        caches.enter_context(inductor_config.patch(fx_graph_cache=False))
        caches.enter_context(functorch_config.patch(enable_autograd_cache=False))
        before, start = counters["inductor"]["efficient_conv_bn_eval"], time.perf_counter()
        way = provider.prepare(subject)
        found = subject.step(way.call, way.model)
        _synchronize(device)
        first = time.perf_counter() - start
    counted = counters["inductor"]["efficient_conv_bn_eval"] - before

    def step(way: Way = way) -> object:
        return subject.step(way.call, way.model)

    _check(report, key, found, exact, limits)
    del found
    report.measured(key, "pairs_folded", "pairs", counted if way.pairs is None else way.pairs)
    again = clock_of(device)(step)
    if cold:
        report.measured(key, "compile_time", "s", max(0.0, first - again))
    if subject.trains:
        subject.clear()
        with saved_for_backward(way.model) as saved:
            subject.forward(way.call)
        report.measured(key, "saved_for_backward", "bytes", saved.total)
    subject.clear()
    report.measured(key, "peak_memory", "bytes", peak_bytes(step, device))
    return step


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check(
    report: Report, key: Key, found: dict[str, Tensor], exact: dict[str, Tensor], limits: dict[str, float]
) -> None:
    """The largest error of the output and of any gradient, relative to the largest magnitude of the exact tensor."""
    if found.keys() != exact.keys():
        raise RuntimeError(f"gradients differ in presence: {', '.join(sorted(found.keys() ^ exact.keys()))}")
    errors = {
        name: ((t.cpu().double() - exact[name]).abs().max() / exact[name].abs().max().clamp_min(1e-300)).item()
        for name, t in found.items()
    }
    worst = {"output_error": ("output", errors.pop(""))}
    if errors:
        name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        worst["gradient_error"] = (name, errors[name])
    for metric, (name, error) in worst.items():
        if key.provider == "eager":
            limits[metric] = allowed(metric, error)
        report.checked(key, metric, "1", error, limits.get(metric, 1.0), name)


def _times(
    subject: Subject, steps: dict[str, Callable[[], object]], report: Report, count: int, progress: Progress
) -> None:
    with report.keeping(subject.key._replace(provider="all"), "run"):
        measured = rounds(steps, count, progress, clock_of(subject.x.device))
        for provider, seconds in measured.items():
            key = subject.key._replace(provider=provider)
            for baseline in BASELINES:
                if baseline in measured and baseline != provider:
                    metric, paired = f"time_over_{baseline}", ratios(seconds, measured[baseline])
                    low, high = median_interval(paired)
                    report.measured(key, metric, "1", percentiles(paired))
                    if not math.isnan(low):
                        report.measured(key, f"{metric}_low", "1", low)
                        report.measured(key, f"{metric}_high", "1", high)
            milliseconds = [1e3 * second for second in seconds]
            report.measured(key, "time_min", "ms", min(milliseconds))
            report.measured(key, "time_rounds", "1", count)
            report.measured(key, "time", "ms", percentiles(milliseconds))  # the last: it says that the rest is there
