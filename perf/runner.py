"""Measure one subject with every provider: errors, memory, compile time, and times in paired rounds."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

from triton_convbn.measure import clock_of, median_interval, peak_bytes, rounds, saved_for_backward

from .providers import PreparedModel, Provider
from .results import Key, Report, percentiles
from .subject import Subject, relative_errors

BASELINES = ("eager", "inductor", "inductor_efficient_conv_bn")
"""The times of the other providers are divided by theirs, round by round."""

Progress = Callable[[Iterable[int]], Iterable[int]]
Results = dict[str, Tensor]


def is_done(key: Key, providers: Sequence[Provider], report: Report) -> bool:
    """Return True if the report has a time of every provider, or why there is none."""
    if report.row(key._replace(provider="all"), "run"):
        return True
    keys = [key._replace(provider=provider.name) for provider in providers]
    return all(report.row(each, "time") or report.row(each, "run") for each in keys)


def measure(
    subject: Subject,
    providers: Sequence[Provider],
    report: Report,
    count: int,
    cold: bool = False,
    progress: Progress = iter,
) -> None:
    """Measure a subject with every provider, and report a row for each metric.

    A provider that fails gets a row of the metric `run` with its error, and the others continue. If eager fails in
    fp64, that is a row of the provider `all`. A provider that has such a row already is not tried again.

    Args:
        count: Number of timed rounds.
        cold: Compile with empty caches and report `compile_time`, the time of a first run.
        progress: Wraps the timed rounds.
    """
    name = "{0} {2} {3} {4} batch {5}".format(*subject.key)
    torch._dynamo.reset()
    # Every provider compiles the same forward, each under its own guard.
    with dynamo_config.patch(recompile_limit=4 * len(providers) + 8):
        report.say(f"{name}: eager in fp64")
        exact: Results = {}
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
            report.say(f"{name}: {provider.name}")
            with report.keeping(key, "run"):
                steps[provider.name] = _measure_provider(subject, provider, report, exact, limits, cold)
            subject.clear()
        report.say(f"{name}: {count} rounds")
        running = ""

        def named(name: str) -> None:
            nonlocal running
            running = name
            steps[name]()

        while steps:  # if one fails, as for lack of memory, start again without it
            calls: dict[str, Callable[[], object]] = {name: partial(named, name) for name in steps}
            try:
                times = rounds(calls, count, progress, clock_of(subject.x.device))
            except Exception as error:
                report.failed(subject.key._replace(provider=running), "run", "", error)
                del steps[running]
                subject.clear()
            else:
                _report_times(subject.key, times, report)
                break
        subject.clear()
    torch._dynamo.reset()


def first_step(subject: Subject, provider: Provider) -> tuple[PreparedModel, dict[str, Tensor], int]:
    """Prepare the provider and run a step, which compiles. Return also the step's results and the folded pairs."""
    # A graph from a cache skips the pass, and with it the count of its pairs.
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        before = counters["inductor"]["efficient_conv_bn_eval"]
        prepared = provider.prepare(subject)
        found = subject.step(prepared.call, prepared.model)
        if subject.x.device.type == "cuda":
            torch.cuda.synchronize(subject.x.device)
    counted = counters["inductor"]["efficient_conv_bn_eval"] - before
    return prepared, found, counted if prepared.pairs is None else prepared.pairs


def _measure_provider(
    subject: Subject, provider: Provider, report: Report, exact: Results, limits: dict[str, float], cold: bool
) -> Callable[[], object]:
    """Report everything but the times. Return the step that is to be timed."""
    key = subject.key._replace(provider=provider.name)
    with fresh_cache() if cold else nullcontext():
        start = time.perf_counter()
        prepared, found, pairs = first_step(subject, provider)
        first = time.perf_counter() - start
    step = subject.timed_step(prepared.call, prepared.model)
    if provider.other_parameters:
        common = found.keys() & exact.keys()
        found, exact = ({name: each[name] for name in common} for each in (found, exact))
    check_errors(report, key, found, exact, limits)
    del found
    report.measured(key, "pairs_folded", "pairs", pairs)
    again = clock_of(subject.x.device)(step)
    prepared.model.zero_grad(set_to_none=True)
    if cold:
        report.measured(key, "compile_time", "s", max(0.0, first - again))
    # The next step would free the gradients of this one at its start, and so make room.
    subject.clear()
    report_memory(report, key, subject, prepared)
    return step


def report_memory(report: Report, key: Key, subject: Subject, prepared: PreparedModel) -> None:
    """Report the bytes kept for backward, if the subject trains, and those at the peak of a step."""
    if subject.trains:
        with saved_for_backward(prepared.model) as saved:
            subject.forward(prepared.call)
        report.measured(key, "saved_for_backward", "bytes", saved.total)
    step = partial(subject.step, prepared.call, prepared.model)
    report.measured(key, "peak_memory", "bytes", peak_bytes(step, subject.x.device))


def check_errors(report: Report, key: Key, found: Results, exact: Results, limits: dict[str, float]) -> None:
    """Report the largest error of the output and of any gradient, which fail above their limits."""
    for metric, (name, error) in _worst(found, exact).items():
        report.checked(key, metric, "1", error, limits.get(metric, 1.0), name)


def limits_of(subject: Subject, exact: Results) -> dict[str, float]:
    """Return the largest allowed errors. They follow from eager's own, even if eager is not among the providers.

    A wrong fold is off by about 1. Rounding differs between providers. A ReLU whose input then crosses zero changes a
    gradient by far more than rounding does.
    """
    try:
        worst = _worst(subject.step(subject.model), exact)
    except Exception:  # becomes a failed row if eager is among the providers
        worst = {}
    subject.clear()
    loose = {metric: max(0.5, 2 * error) for metric, (_, error) in worst.items()}
    if "output_error" in worst:
        loose["output_error"] = max(1e-4, min(10 * worst["output_error"][1], loose["output_error"]))
    return loose


def _worst(found: Results, exact: Results) -> dict[str, tuple[str, float]]:
    """Return by metric the largest error of any output, and of any gradient, with the tensor's name.

    An error is the largest difference, relative to the largest magnitude of the exact tensor.
    """
    worst = {}
    metrics = "output_error", "gradient_error"
    for metric, errors in zip(metrics, relative_errors(found, exact, math.inf), strict=True):
        if errors:
            name, error = max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
            worst[metric] = (name or "output", error)
    return worst


def report_ratios(report: Report, key: Key, baselines: Sequence[str], times: dict[str, list[float]]) -> None:
    """Report the ratios of a provider's times to each baseline's, round by round, and the interval of their median."""
    for baseline in baselines:
        if baseline in times and baseline != key.provider:
            paired = [a / b for a, b in zip(times[key.provider], times[baseline], strict=True)]
            report.measured(key, f"time_over_{baseline}", "1", percentiles(paired))
            for end, value in zip(("low", "high"), median_interval(paired), strict=True):
                if not math.isnan(value):
                    report.measured(key, f"time_over_{baseline}_{end}", "1", value)


def _report_times(key: Key, measured: dict[str, list[float]], report: Report) -> None:
    """Report times and their ratios to the baselines."""
    for provider, seconds in measured.items():
        key = key._replace(provider=provider)
        report_ratios(report, key, BASELINES, measured)
        milliseconds = [1e3 * second for second in seconds]
        report.measured(key, "time_min", "ms", min(milliseconds))
        report.measured(key, "time_rounds", "1", len(seconds))
        report.measured(key, "time", "ms", percentiles(milliseconds))  # last, as it marks the provider as done
