"""One case in one setting, run in every way: errors, memory, compile time, and times in paired rounds."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

from triton_convbn.measure import clock_of, median_interval, peak_bytes, ratios, rounds, saved_for_backward

from .providers import PreparedModel, Provider
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
    if report.row(subject_key._replace(provider="all"), "run"):
        return True
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

    A provider that fails is a row with its error under the metric `run`, and the others go on without it; where there
    is nothing to compare with, it is a row of the provider `all`. What has such a row already is not tried again.

    Args:
        count: timed rounds.
        cold: compile with empty caches, so that `compile_time` is what a first run takes; not reported otherwise.
        progress: wraps the timed rounds.
    """
    torch._dynamo.reset()
    # Every provider compiles the same forward, each under its own guard.
    with dynamo_config.patch(recompile_limit=4 * len(providers) + 8):
        report.say(f"{_text(subject.key)}: eager in fp64")
        exact: dict[str, Tensor] = {}
        with report.keeping(subject.key._replace(provider="all"), "run"):
            exact = subject.exact()
        if not exact:
            return
        limits = limits_of(subject, exact)
        steps: dict[str, Callable[[], object]] = {}
        for provider in providers:
            key = subject.key._replace(provider=provider.name)
            if report.row(key, "run"):
                continue
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


def first_step(subject: Subject, provider: Provider) -> tuple[PreparedModel, dict[str, Tensor], int]:
    """Prepare the provider and run a step, which compiles. Returns also what the step gave, and the folded pairs."""
    # A graph out of a cache skips the pass, and with it the count of its pairs.
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        before = counters["inductor"]["efficient_conv_bn_eval"]
        way = provider.prepare(subject)
        found = subject.step(way.call, way.model)
        _synchronize(subject.x.device)
    counted = counters["inductor"]["efficient_conv_bn_eval"] - before
    return way, found, counted if way.pairs is None else way.pairs


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
    with fresh_cache() if cold else nullcontext():
        start = time.perf_counter()
        way, found, pairs = first_step(subject, provider)
        first = time.perf_counter() - start

    def step(way: PreparedModel = way) -> object:
        return subject.step(way.call, way.model)

    check_errors(report, key, found, exact, limits)
    del found
    report.measured(key, "pairs_folded", "pairs", pairs)
    again = clock_of(device)(step)
    way.model.zero_grad(set_to_none=True)
    if cold:
        report.measured(key, "compile_time", "s", max(0.0, first - again))
    # What a step leaves behind, on the provider's model and on the subject, the next one would free at its start.
    subject.clear()
    if subject.trains:
        with saved_for_backward(way.model) as saved:
            subject.forward(way.call)
        report.measured(key, "saved_for_backward", "bytes", saved.total)
    report.measured(key, "peak_memory", "bytes", peak_bytes(step, device))
    return step


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_errors(
    report: Report, key: Key, found: dict[str, Tensor], exact: dict[str, Tensor], limits: dict[str, float]
) -> None:
    """The largest error of the output and of any gradient, relative to the largest magnitude of the exact tensor."""
    for metric, (name, error) in _worst(found, exact).items():
        report.checked(key, metric, "1", error, limits.get(metric, 1.0), name)


def _worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, tuple[str, float]]:
    """The error of the output, and the largest of any gradient, with whose it is."""
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
    return worst


def limits_of(subject: Subject, exact: dict[str, Tensor]) -> dict[str, float]:
    """The errors that are allowed here, by eager's own, whether eager is among the providers or not."""
    try:
        worst = _worst(subject.step(subject.model), exact)
    except Exception:  # where eager is among them, this is its row
        worst = {}
    subject.clear()
    return {metric: allowed(metric, error) for metric, (_, error) in worst.items()}


def _times(
    subject: Subject, steps: dict[str, Callable[[], object]], report: Report, count: int, progress: Progress
) -> None:
    for provider, seconds in (measured := _rounds(subject, steps, report, count, progress)).items():
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


class _Failed(Exception):
    """A step that has run before has failed in the rounds, as for lack of memory. The argument is whose it is."""


def _rounds(
    subject: Subject, steps: dict[str, Callable[[], object]], report: Report, count: int, progress: Progress
) -> dict[str, list[float]]:
    """The seconds of all that go through; from the beginning again without one that fails."""

    def named(name: str, step: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            try:
                return step()
            except Exception as error:
                raise _Failed(name) from error

        return call

    running = {name: named(name, step) for name, step in steps.items()}
    while running:
        try:
            return rounds(running, count, progress, clock_of(subject.x.device))
        except _Failed as failed:
            (name,) = failed.args
            with report.keeping(subject.key._replace(provider=name), "run"):
                raise failed.__cause__ or failed from None
        del running[name]
        subject.clear()
    return {}
