"""Test a run: its metrics, its paired ratios, and its rows for a wrong provider."""

import itertools
import math
import re
import statistics
from collections.abc import Callable

import pytest
import torch
from bench_kit import (
    MODES,
    OnCall,
    Scaled,
    case,
    out_of_luck,
    small,
    subject,
)
from torch import Tensor, nn
from triton_convbn.perf import runner
from triton_convbn.perf.providers import PROVIDERS, Eager, PreparedModel, Provider
from triton_convbn.perf.results import Report, Row
from triton_convbn.perf.runner import measure
from triton_convbn.perf.subject import Subject


def report_of(each: Subject, *chosen: Provider, count: int = 1, cold: bool = False) -> Report:
    report = Report(None, "a CPU")
    measure(each, chosen, report, count, cold)
    return report


def metrics(report: Report, provider: str) -> dict[str, Row]:
    return {row.metric: row for row in report.rows if row.provider == provider}


def test_new_provider_is_one_class() -> None:
    class Slow(Provider):
        name = "slow"

        def prepare(self, subject: Subject) -> PreparedModel:
            return PreparedModel(lambda x: subject.model(x), subject.model)

    found = metrics(report_of(subject(), Eager(), Slow(), count=2), "slow")
    assert {row.status for row in found.values()} == {"ok"}
    assert found["pairs_folded"].p50 == 0
    assert found["output_error"].p50 < 1e-5
    assert found["time"].p50 > 0
    assert found["time"].key == ("small", "slow", "train", "float32", "contiguous", 2)


UNITS = {
    "pairs_folded": "pairs",
    "output_error": "1",
    "gradient_error": "1",
    "saved_for_backward": "bytes",
    "peak_memory": "bytes",
    "compile_time": "s",
    "time": "ms",
    "time_min": "ms",
    "time_rounds": "1",
    "time_over_eager": "1",
}


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_metrics_of_each_mode(mode: str, cold: bool) -> None:
    report = report_of(subject(mode=mode), Eager(), Scaled(), count=2, cold=cold)
    expected = set(UNITS) - (set() if cold else {"compile_time"})
    if mode == "infer":
        expected -= {"gradient_error", "saved_for_backward"}
    assert set(metrics(report, "scaled")) == expected
    assert set(metrics(report, "eager")) == expected - {"time_over_eager"}
    assert report.failures == 0
    for each in report.rows:
        assert each.unit == UNITS[each.metric]
        assert all(map(math.isfinite, (each.p50, each.p20, each.p80)))
        assert each.p20 <= each.p50 <= each.p80
        assert (each.mode, each.device, each.torch, each.error) == (mode, "a CPU", torch.__version__, "")
    # Known bytes: the input of (2, 3, 8, 8), and what Tanh and Linear keep, which are inputs of the next layer.
    if mode == "train":
        maps = 2 * (3 * 8 * 8 + 2 * 4 * 6 * 6 + 2 * 6 * 2 * 2)
        assert metrics(report, "eager")["saved_for_backward"].p50 == 4 * maps


@pytest.mark.parametrize("count", [1, 5, 6, 9])
def test_times_and_paired_ratios(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock slows down from call to call: without paired rounds, the ratios would spread."""
    cost = {"eager": 1.0, "scaled": 2.0}
    last = []

    class Named(Scaled):
        def prepare(self, subject: Subject) -> PreparedModel:
            def call(x: Tensor) -> Tensor:
                last.append(self.name)
                return subject.model(x)

            return PreparedModel(call, subject.model)

    calls = itertools.count(1)

    def clock(function: Callable[[], object]) -> float:
        function()
        return cost[last[-1]] * 2.0 ** (next(calls) // 2)

    monkeypatch.setattr(runner, "clock_of", lambda _device: clock)
    report = report_of(subject(mode="infer"), Named(name="eager"), Named(name="scaled"), count=count)
    found = metrics(report, "scaled")
    # The clock is called twice before the rounds: the first round has calls 3 and 4.
    seconds = {name: [] for name in cost}
    for call in range(count):
        order = list(cost)[:: -1 if call % 2 else 1]
        for at, name in enumerate(order):
            seconds[name].append(cost[name] * 2.0 ** ((3 + 2 * call + at) // 2))
    ratios = sorted(a / b for a, b in zip(seconds["scaled"], seconds["eager"], strict=True))
    assert found["time_over_eager"].p50 == statistics.median(ratios)
    assert found["time_min"].p50 == 1e3 * min(seconds["scaled"])
    assert found["time"].p50 == 1e3 * statistics.median(seconds["scaled"])
    assert found["time"].p20 == 1e3 * sorted(seconds["scaled"])[round(0.2 * (count - 1))]
    assert found["time_rounds"].p50 == count
    interval = {metric for metric in found if metric.endswith(("_low", "_high"))}
    assert interval == ({"time_over_eager_low", "time_over_eager_high"} if count >= 6 else set())
    if count in (6, 9):
        at = {6: 0, 9: 1}[count]
        assert found["time_over_eager_low"].p50 == ratios[at]
        assert found["time_over_eager_high"].p50 == ratios[-1 - at]


def doubled(y: Tensor) -> Tensor:
    """Double the gradient only."""
    return y + (y - y.detach()) if y.requires_grad else y


class Missing(Provider):
    name = "missing"

    def prepare(self, subject: Subject) -> PreparedModel:
        cut = {"4.weight": subject.model[4].weight.detach()}
        return PreparedModel(lambda x: torch.func.functional_call(subject.model, cut, (x,)), subject.model)


class NoPrepare(Provider):
    name = "no_prepare"

    def prepare(self, subject: Subject) -> PreparedModel:
        out_of_luck()
        raise AssertionError


WRONG: dict[str, tuple[Provider, dict[str, str]]] = {
    "output": (Scaled(lambda y: 1.001 * y), {"output_error": r"^output: 0\.001 1, 0\.0001 allowed$"}),
    "gradient": (Scaled(doubled), {"gradient_error": r"^[0-7]\.(weight|bias): 1 1, 0\.5 allowed$"}),
    "nothing but zeros": (Scaled(lambda y: 0 * y), {"output_error": "output: 1 1", "gradient_error": ": 1 1"}),
    "NaN": (Scaled(lambda y: y * math.nan), {"output_error": "output: nan", "gradient_error": "nan"}),
    "infinity": (Scaled(lambda y: y / 0), {"output_error": "output: inf", "gradient_error": ""}),
    "missing gradient": (Missing(), {"run": "^RuntimeError: not the same gradients: 4.weight$"}),
    "raises in prepare": (NoPrepare(), {"run": "^RuntimeError: out of luck$"}),
    "raises at once": (OnCall(out_of_luck, 1), {"run": "^RuntimeError: out of luck$"}),
    "raises later": (OnCall(out_of_luck, 4), {"run": "^RuntimeError: out of luck$"}),
    "raises as it warms up": (OnCall(out_of_luck, OnCall.BEFORE), {"run": "^RuntimeError: out of luck$"}),
    "raises in the rounds": (OnCall(out_of_luck, OnCall.BEFORE + 2), {"run": "^RuntimeError: out of luck$"}),
}


@pytest.mark.parametrize(("wrong", "errors"), WRONG.values(), ids=WRONG)
def test_wrong_provider_is_a_failed_row(wrong: Provider, errors: dict[str, str]) -> None:
    """It stays in the report, and the providers before and after it are measured."""
    for attribute in ("calls", "prepared"):
        if hasattr(wrong, attribute):
            setattr(wrong, attribute, 0)
    other = Scaled(name="other")
    report = report_of(subject(), Eager(), wrong, other, count=3)
    found = {metric: each.error for metric, each in metrics(report, wrong.name).items() if each.status == "failed"}
    assert set(found) == set(errors)
    assert report.failures == len(errors)
    for metric, pattern in errors.items():
        assert re.search(pattern, found[metric]), found
    assert ("time" in metrics(report, wrong.name)) == ("run" not in errors)
    for name in ("eager", "other"):
        assert {"time", "peak_memory", "saved_for_backward"} <= set(metrics(report, name))
        assert {each.status for each in metrics(report, name).values()} == {"ok"}


def test_wrong_provider_without_eager() -> None:
    """The limits follow from eager's own error, even if eager is not measured."""
    report = report_of(subject(), Scaled(lambda y: 1.001 * y))
    assert [(each.metric, each.status) for each in report.rows if each.status != "ok"] == [("output_error", "failed")]
    assert report_of(subject(dtype="bfloat16"), Scaled(lambda y: 1.001 * y)).failures == 0


def test_model_without_fp64_is_a_failed_row() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise RuntimeError("single precision only")
            return x

    each, report = subject(case(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Single())), Report(None, "a CPU")
    measure(each, [Eager()], report, 1)
    assert [(row.provider, row.metric, row.status) for row in report.rows] == [("all", "run", "failed")]
    assert report.rows[0].error == "RuntimeError: single precision only"
    assert runner.is_done(each.key, [Eager()], report)


def test_refused_subject_is_a_skipped_row() -> None:
    report = report_of(subject(), Eager(), PROVIDERS["eager_folded"], PROVIDERS["inductor_freezing"])
    for name in ("eager_folded", "inductor_freezing"):
        (skipped,) = metrics(report, name).values()
        assert (skipped.metric, skipped.status) == ("run", "skipped")
        assert skipped.error
        assert math.isnan(skipped.p50)
    assert report.failures == 0


def test_peak_is_measured_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that frees gradients of an earlier one would make room, also on a provider's own parameters."""
    pytest.importorskip("torchvision")
    found = []

    class Watched(type(PROVIDERS["frozen_bn"])):  # type: ignore[misc]
        def prepare(self, subject: Subject) -> PreparedModel:
            self.way = super().prepare(subject)
            return self.way

    def peak(_function: Callable[[], object], _device: torch.device) -> int:
        tensors = [each.x, *each.model.parameters(), *watched.way.model.parameters()]
        found.append(sum(tensor.grad is not None for tensor in tensors))
        return 0

    each, watched = subject(small(inner=True), mode="train-frozen"), Watched()
    monkeypatch.setattr(runner, "peak_bytes", peak)
    report = report_of(each, watched)
    assert report.failures == 0
    assert found == [0]


def test_pairs_of_a_compiled_model() -> None:
    pairs = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
    report = report_of(subject(case(*pairs)), Eager(), PROVIDERS["triton_convbn_eager"])
    assert report.failures == 0
    assert metrics(report, "triton_convbn_eager")["pairs_folded"].p50 == 2
    assert metrics(report, "eager")["pairs_folded"].p50 == 0
    kept = [metrics(report, name)["saved_for_backward"].p50 for name in ("triton_convbn_eager", "eager")]
    assert 0 < kept[0] < kept[1]
