"""The benchmark: its cases, its providers, what it reports of the wrong ones, and that a run goes on where it ended."""

import copy
import csv
import io
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from benchmark_rows import failed, row
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from triton_convbn.perf import cases, environment, providers, run, show
from triton_convbn.perf.cases import Case
from triton_convbn.perf.frame import read
from triton_convbn.perf.providers import PROVIDERS, Eager, Provider, Way
from triton_convbn.perf.report import Report
from triton_convbn.perf.run import measure
from triton_convbn.perf.subject import DTYPES, LAYOUTS, MODES, Setting, Subject
from triton_convbn.perf.subject import subject as make_subject
from triton_convbn.perf.table import COLUMNS, Key, Log, Row, locked

from triton_convbn.cli import main
from triton_convbn.errors import UsageError
from triton_convbn.models import randomize

CPU = torch.device("cpu")


def case(*modules: nn.Module, shape: tuple[int, ...] = (3, 8, 8), inner: bool = False, name: str = "case") -> Case:
    model = randomize(nn.Sequential(*modules)).eval()
    return Case(name, lambda: copy.deepcopy(model), shape, inner)


def small(inner: bool = False) -> Case:
    """Two pairs and a Linear. No ReLU, so that every gradient is as precise as the arithmetic."""
    torch.manual_seed(1)
    first = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh()
    second = nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6, eps=0.1), nn.Tanh()
    return case(*first, *second, nn.Flatten(), nn.Linear(24, 5), inner=inner, name="small")


def subject(
    of: Case | None = None,
    mode: str = "train",
    dtype: str = "float32",
    layout: str = "contiguous",
    batch: int = 2,
) -> Subject:
    return make_subject(of or small(), Setting(mode, dtype, layout, batch), CPU)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def operators(function: Callable[[], object]) -> Counter[str]:
    """What a call runs, by the name of the operator."""
    found: Counter[str] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        function()
    return found


# ---- cases ---------------------------------------------------------------------------------------------------------


def shapes_of(model: nn.Module) -> set[tuple[str, tuple[int, ...]]]:
    """Of every convolution of a network in which a BatchNorm follows each: itself, and the shape of its input."""
    found = set()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.add((repr(module), tuple(inputs[0].shape[1:])))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(hook)
    model(torch.randn(1, 3, 224, 224))
    return found


@pytest.mark.parametrize(("name", "count"), [("resnet50", 23), ("mobilenet_v2", 30)])
def test_layers_of_a_network(name: str, count: int) -> None:
    torchvision = pytest.importorskip("torchvision")
    found = cases.layers(name)
    blocks = [each.build() for each in found]
    assert len(found) == count == len({each.name for each in found})
    assert {(repr(block[0]), each.shape) for each, block in zip(found, blocks, strict=True)} == shapes_of(
        getattr(torchvision.models, name)().eval()
    )
    convolutions = {
        path for path, module in torchvision.models.get_model(name).named_modules() if isinstance(module, nn.Conv2d)
    }
    assert {each.name.removeprefix(f"{name}/") for each in found} <= convolutions
    for each, block in zip(found, blocks, strict=True):
        assert [type(module) for module in block] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
        works(each)


def test_each_shape_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution and the shape of its input, by the first name; a convolution without a BatchNorm is none."""

    def block() -> list[nn.Module]:
        return [nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh()]

    model = nn.Sequential(*block(), *block(), nn.MaxPool2d(2), *block(), nn.Conv2d(3, 3, 3)).eval()
    monkeypatch.setattr(cases, "load", lambda _name: model)
    found = cases.of_model("some", 16)
    assert [(each.name, each.shape) for each in found] == [("some/0", (3, 16, 16)), ("some/7", (3, 8, 8))]


def works(each: Case) -> None:
    """A model that runs on its shape, made anew every time, in evaluation, with statistics that are not fresh."""
    assert each.inner
    model, again = each.build(), each.build()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in again.parameters()}
    assert not any(module.training for module in model.modules())
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert norms
    for norm in norms:
        assert not torch.allclose(norm.running_mean, torch.zeros(()), atol=0.1)
        assert not torch.allclose(norm.running_var, torch.ones(()), atol=0.1)
        assert not torch.allclose(norm.weight, torch.ones(()), atol=0.1)
        assert not torch.allclose(norm.bias, torch.zeros(()), atol=0.1)
    with torch.no_grad():
        output = model(torch.randn(2, *each.shape))
    assert isinstance(output, Tensor)
    assert len(output) == 2
    assert output.isfinite().all()


@pytest.mark.parametrize(
    ("name", "found"),
    [("resnext", ["block_32x4d"]), ("decoder", ["three_transposed"]), ("heads", ["simclr", "byol"])],
)
def test_other_layers(name: str, found: list[str]) -> None:
    made = cases.layers(name)
    assert [each.name for each in made] == [f"{name}/{piece}" for piece in found]
    for each in made:
        works(each)


def test_unknown_layers() -> None:
    with pytest.raises(UsageError, match=r"^no such layers: vgg; choose one of resnet50, mobilenet_v2, resnext"):
        cases.layers("vgg")


def test_whole_model_at_another_size_is_another_case() -> None:
    """Or its figures would pass for those of the model at its own size in a file that a later run adds to."""
    pytest.importorskip("torchvision")
    assert [(each.name, each.shape, each.inner) for each in (cases.whole("resnet18"), cases.whole("resnet18", 64))] == [
        ("resnet18", (3, 224, 224), False),
        ("resnet18@64", (3, 64, 64), False),
    ]
    assert cases.whole("resnet18", 224).name == "resnet18"
    with pytest.raises(UsageError, match="resnet81"):
        cases.whole("resnet81")


# ---- subjects ------------------------------------------------------------------------------------------------------

WEIGHTS = {"0.weight", "3.weight", "3.bias", "7.weight", "7.bias"}
AFFINE = {"1.weight", "1.bias", "4.weight", "4.bias"}
GRADIENTS = {"infer": set(), "train": WEIGHTS | AFFINE, "train-frozen": WEIGHTS, "input-grad": {"input"}}


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, inner: bool) -> None:
    """Which tensors get a gradient; a piece of a network hands one on to what comes before it."""
    each = subject(small(inner), mode)
    found = each.step(each.model)
    wanted = GRADIENTS[mode] | ({"input"} if inner and mode.startswith("train") else set())
    assert set(found) == {""} | wanted
    assert each.trains == (mode != "infer")
    assert not any(tensor.requires_grad for tensor in found.values())
    assert all(tensor.abs().max() > 0 for tensor in found.values())
    each.clear()
    assert all(tensor.grad is None for tensor in (each.x, *each.model.parameters()))


def test_every_mode_is_tested() -> None:
    assert set(GRADIENTS) == set(MODES)


def test_the_loss_does_not_cancel() -> None:
    """Of a map without a ReLU behind it, or what is left of a bias' gradient would be rounding alone."""
    each = subject(case(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    exact, found = each.exact(), each.step(each.model)
    assert all(error(found[name], exact[name]) < 1e-5 for name in exact)


def test_a_step_is_that_of_the_loss() -> None:
    """A weighted sum: with equal weights a gradient before a softmax or another BatchNorm would vanish."""
    each = subject()
    found = each.step(each.model)
    model = small().build()
    output = model(each.x)
    (output * torch.linspace(-1, 2, 5)).sum().backward()
    assert torch.equal(found[""], output)
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.grad), name
    again = each.step(each.model)
    assert all(torch.equal(found[name], again[name]) for name in found), "gradients do not add up"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_layouts_arrive(dtype: str, layout: str) -> None:
    each = subject(dtype=dtype, layout=layout)
    own, autocast = DTYPES[dtype]
    assert {tensor.dtype for tensor in (each.x, *each.model.parameters())} == {own}
    assert each.autocast == autocast
    assert each.key == ("small", "", "train", dtype, layout, 2)
    tensors = [each.x, each.model[0].weight, each.model[3].weight]
    for known, format_ in LAYOUTS.items():
        assert all(tensor.is_contiguous(memory_format=format_) for tensor in tensors) == (known == layout)
    with torch.no_grad():
        assert each.forward(each.model).dtype == (autocast or own)


def test_names_of_dtypes() -> None:
    for name, (own, autocast) in DTYPES.items():
        assert str(autocast or own) == f"torch.{name.removeprefix('autocast_')}"
        assert (autocast is not None) == name.startswith("autocast_")


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_is_fp64_of_the_same_parameters(dtype: str) -> None:
    """Of the rounded ones in 16 bit: what is measured is the arithmetic, and not what a parameter has lost before."""
    each = subject(small(inner=True), dtype=dtype)
    exact = each.exact()
    model = small().build().to(DTYPES[dtype][0]).double()
    x = each.x.detach().double().requires_grad_()
    output = model(x)
    (output * torch.linspace(-1, 2, 5, dtype=torch.float64)).sum().backward()
    wanted = {"": output, "input": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    assert set(exact) == set(wanted)
    for name, tensor in wanted.items():
        assert exact[name].dtype == torch.float64
        assert torch.equal(exact[name], tensor), name
    # And the model is as it was: its own dtype, no gradient.
    assert {p.dtype for p in each.model.parameters()} == {DTYPES[dtype][0]}
    assert all(tensor.grad is None for tensor in (each.x, *each.model.parameters()))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), x


class Reduced(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.conv(x))


NOT_TO_BE_RUN = {
    "input does not fit": (case(nn.Conv2d(5, 4, 3)), "case does not run on an input of shape (2, 3, 8, 8): "),
    "two outputs": (case(Two()), "case returns tuple; what is compared is a single tensor"),
    "a number": (case(Reduced(torch.sum)), "case returns a torch.float32 tensor of shape (); no loss is made of that"),
    "indices": (case(Reduced(torch.argmax)), "case returns a torch.int64 tensor of shape (); no loss"),
    "no parameter": (case(nn.ReLU()), "case has nothing to train"),
}


@pytest.mark.parametrize(("of", "words"), NOT_TO_BE_RUN.values(), ids=NOT_TO_BE_RUN)
def test_what_cannot_be_run_says_so(of: Case, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        subject(of)


# ---- providers -----------------------------------------------------------------------------------------------------

FOLDABLE = {
    "conv": (case(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 1),
    "two": (small(), 2),
    "depthwise": (case(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6, affine=False)), 1),
    "transposed": (case(nn.ConvTranspose2d(3, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()), 1),
    "head": (case(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3), shape=(7,)), 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("of", "pairs"), FOLDABLE.values(), ids=FOLDABLE)
def test_eager_folded(of: Case, pairs: int, layout: str) -> None:
    """It is eager's output, without a BatchNorm and without a fold: that was done beforehand."""
    each = subject(of, "infer", layout=layout)
    way = PROVIDERS["eager_folded"].prepare(each)
    assert way.pairs == pairs
    want, got = each.step(each.model), each.step(way.call, way.model)
    assert set(got) == {""}
    assert error(got[""], want[""]) < 1e-5
    assert operators(lambda: each.model(each.x))["native_batch_norm"] == pairs
    ran = operators(lambda: way.call(each.x))
    assert set(ran) <= {"convolution", "addmm", "t", "view", "relu", "tanh", "detach", "clone", "_unsafe_view"}
    assert ran["convolution"] + ran["addmm"] >= pairs


def test_eager_folded_keeps_the_model() -> None:
    each = subject(mode="infer")
    before = copy.deepcopy(each.model.state_dict())
    PROVIDERS["eager_folded"].prepare(each)
    assert all(torch.equal(value, before[name]) for name, value in each.model.state_dict().items())
    assert len(before) == len(each.model.state_dict())


@pytest.mark.parametrize("name", ["eager_folded", "frozen_bn"])
@pytest.mark.parametrize("dtype", ["bfloat16", "autocast_bfloat16", "float64"])
def test_in_other_dtypes(name: str, dtype: str) -> None:
    if name == "frozen_bn":
        pytest.importorskip("torchvision")
    each = subject(mode="input-grad", dtype=dtype)
    way = PROVIDERS[name].prepare(each)
    got, exact = each.step(way.call, way.model), each.exact()
    assert set(got) == {"", "input"}
    assert got[""].dtype == (DTYPES[dtype][1] or DTYPES[dtype][0])
    assert all(error(got[key], exact[key]) < (1e-13 if dtype == "float64" else 0.1) for key in exact)


@pytest.mark.parametrize("mode", ["train-frozen", "input-grad", "infer"])
def test_frozen_bn(mode: str) -> None:
    pytest.importorskip("torchvision")
    each = subject(small(inner=True), mode)
    want = each.step(each.model)
    provider = PROVIDERS["frozen_bn"]
    assert provider.refuses(each) is None
    way = provider.prepare(each)
    got = each.step(way.call, way.model)
    assert way.pairs == 0
    assert set(got) == set(want)
    assert all(error(got[name], want[name]) < 1e-5 for name in want)
    ran = operators(lambda: way.call(each.x))
    assert not [name for name in ran if "batch_norm" in name]
    assert ran["rsqrt"] == 2, "they are there, and not folded away"
    assert not any(isinstance(module, _BatchNorm) for module in way.model.modules())
    assert sum(isinstance(module, _BatchNorm) for module in each.model.modules()) == 2


BARE = case(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
HEAD = FOLDABLE["head"][0]
REFUSALS = [
    *[("eager_folded", mode, small(), "parameters that train") for mode in ("train", "train-frozen")],
    *[("eager_folded", mode, small(), None) for mode in ("infer", "input-grad")],
    ("frozen_bn", "train", small(), "no affine parameters that train"),
    ("frozen_bn", "train-frozen", HEAD, "two dimensions"),
    ("frozen_bn", "infer", HEAD, "two dimensions"),
    ("frozen_bn", "infer", BARE, "running statistics"),
    *[("frozen_bn", mode, small(), None) for mode in ("train-frozen", "infer", "input-grad")],
    *[(f"{name}_freezing", "train", small(), "inference") for name in ("inductor", "triton_convbn")],
    *[(f"{name}_freezing", "input-grad", small(), "inference") for name in ("inductor", "triton_convbn")],
    *[(f"{name}_freezing", "infer", small(), None) for name in ("inductor", "triton_convbn")],
    *[(name, mode, HEAD, None) for name in ("eager", "inductor", "triton_convbn") for mode in MODES],
]


@pytest.mark.parametrize(("name", "mode", "of", "words"), REFUSALS)
def test_refusals(name: str, mode: str, of: Case, words: str | None) -> None:
    why = PROVIDERS[name].refuses(subject(of, mode))
    if words is None:
        assert why is None
    else:
        assert why is not None
        assert words in why
        assert "\n" not in why


def test_names_of_providers() -> None:
    assert all(name == provider.name for name, provider in PROVIDERS.items())
    found = providers.providers(["inductor", "eager", "inductor"])
    assert [provider.name for provider in found] == ["inductor", "eager"]
    with pytest.raises(UsageError, match=r"^no such provider: easy, quick; choose from eager, eager_folded") as refused:
        providers.providers(["quick", "eager", "easy"])
    assert "\n" not in str(refused.value)


# ---- a run ---------------------------------------------------------------------------------------------------------


class Scaled(Provider):
    """Eager, with something done to its output: what a new provider takes."""

    name = "scaled"

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda y: y, name: str = "scaled") -> None:
        self.name = name  # type: ignore[misc]
        self.change = change

    def prepare(self, subject: Subject) -> Way:
        return Way(lambda x: self.change(subject.model(x)), subject.model)


class OnCall(Provider):
    """Eager that calls `then` at its n-th call and ever after. A step before the rounds is checked, one is timed, one
    counted for what it keeps in training, one for its peak, and one warms up."""

    name = "on_call"
    BEFORE: ClassVar = 5

    def __init__(self, then: Callable[[], object], at: int, name: str = "on_call") -> None:
        self.name = name  # type: ignore[misc]
        self.then, self.at, self.calls, self.prepared = then, at, 0, 0

    def prepare(self, subject: Subject) -> Way:
        self.prepared += 1

        def call(x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls >= self.at:
                self.then()
            return subject.model(x)

        return Way(call, subject.model, 0)


def nothing() -> None:
    pass


def out_of_luck() -> None:
    raise RuntimeError("out of\nluck")


def interrupt() -> None:
    raise KeyboardInterrupt


def report_of(each: Subject, *chosen: Provider, count: int = 1, cold: bool = False) -> Report:
    report = Report(None, "a CPU")
    measure(each, chosen, report, count, cold)
    return report


def metrics(report: Report, provider: str) -> dict[str, Row]:
    return {row.metric: row for row in report.rows if row.provider == provider}


def test_a_new_provider_is_one_class() -> None:
    """And a ratio to eager: of paired rounds, with an interval where there are six of them."""
    clock = {"seconds": 1.0}

    class Slow(Provider):
        name = "slow"

        def prepare(self, subject: Subject) -> Way:
            def call(x: Tensor) -> Tensor:
                clock["seconds"] = 3.0
                return subject.model(x)

            return Way(call, subject.model)

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
    # A number that is known: (2, 3, 8, 8) and what the Tanh's and the Linear keep, which are the next one's inputs.
    if mode == "train":
        maps = 2 * (3 * 8 * 8 + 2 * 4 * 6 * 6 + 2 * 6 * 2 * 2)
        assert metrics(report, "eager")["saved_for_backward"].p50 == 4 * maps


@pytest.mark.parametrize("count", [1, 5, 6, 9])
def test_times_and_paired_ratios(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that slows down from call to call: the rounds are paired, or the ratios would spread."""
    cost = {"eager": 1.0, "scaled": 2.0}
    last = []

    class Named(Scaled):
        def prepare(self, subject: Subject) -> Way:
            def call(x: Tensor) -> Tensor:
                last.append(self.name)
                return subject.model(x)

            return Way(call, subject.model)

    calls = itertools.count(1)

    def clock(function: Callable[[], object]) -> float:
        function()
        return cost[last[-1]] * 2.0 ** (next(calls) // 2)

    monkeypatch.setattr(run, "clock_of", lambda _device: clock)
    report = report_of(subject(mode="infer"), Named(name="eager"), Named(name="scaled"), count=count)
    found = metrics(report, "scaled")
    # Two calls of the clock before the rounds: the first round has 3 and 4, of which an even one begins.
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
    """In backward alone."""
    return y + (y - y.detach()) if y.requires_grad else y


class Missing(Provider):
    name = "missing"

    def prepare(self, subject: Subject) -> Way:
        cut = {"4.weight": subject.model[4].weight.detach()}
        return Way(lambda x: torch.func.functional_call(subject.model, cut, (x,)), subject.model)


class NoPrepare(Provider):
    name = "no_prepare"

    def prepare(self, subject: Subject) -> Way:
        out_of_luck()
        raise AssertionError


WRONG: dict[str, tuple[Provider, dict[str, str]]] = {
    "output": (Scaled(lambda y: 1.001 * y), {"output_error": r"^output: 0\.001 1, 0\.0001 allowed$"}),
    "gradient": (Scaled(doubled), {"gradient_error": r"^[0-7]\.(weight|bias): 1 1, 0\.5 allowed$"}),
    "nothing but zeros": (Scaled(lambda y: 0 * y), {"output_error": "output: 1 1", "gradient_error": ": 1 1"}),
    "NaN": (Scaled(lambda y: y * math.nan), {"output_error": "output: nan", "gradient_error": "nan"}),
    "infinity": (Scaled(lambda y: y / 0), {"output_error": "output: inf", "gradient_error": ""}),
    "missing gradient": (Missing(), {"run": "^RuntimeError: gradients differ in presence: 4.weight$"}),
    "raises in prepare": (NoPrepare(), {"run": "^RuntimeError: out of luck$"}),
    "raises at once": (OnCall(out_of_luck, 1), {"run": "^RuntimeError: out of luck$"}),
    "raises later": (OnCall(out_of_luck, 4), {"run": "^RuntimeError: out of luck$"}),
    "raises as it warms up": (OnCall(out_of_luck, OnCall.BEFORE), {"run": "^RuntimeError: out of luck$"}),
    "raises in the rounds": (OnCall(out_of_luck, OnCall.BEFORE + 2), {"run": "^RuntimeError: out of luck$"}),
}


@pytest.mark.parametrize(("wrong", "errors"), WRONG.values(), ids=WRONG)
def test_a_wrong_provider_is_a_failed_row(wrong: Provider, errors: dict[str, str]) -> None:
    """It stays in the report, and the others go on, before it and after it."""
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


def test_a_wrong_provider_without_eager_beside_it() -> None:
    """What is allowed follows from eager's own error, whether eager is measured or not."""
    report = report_of(subject(), Scaled(lambda y: 1.001 * y))
    assert [(each.metric, each.status) for each in report.rows if each.status != "ok"] == [("output_error", "failed")]
    assert report_of(subject(dtype="bfloat16"), Scaled(lambda y: 1.001 * y)).failures == 0


def test_nothing_to_compare_with_is_a_failed_row() -> None:
    """A model that does not run in fp64. The next setting is measured."""

    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise RuntimeError("single precision alone")
            return x

    each, report = subject(case(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Single())), Report(None, "a CPU")
    measure(each, [Eager()], report, 1)
    assert [(row.provider, row.metric, row.status) for row in report.rows] == [("all", "run", "failed")]
    assert report.rows[0].error == "RuntimeError: single precision alone"
    assert run.is_done(each.key, [Eager()], report)


def test_refused_is_a_skipped_row() -> None:
    report = report_of(subject(), Eager(), PROVIDERS["eager_folded"], PROVIDERS["inductor_freezing"])
    for name in ("eager_folded", "inductor_freezing"):
        (skipped,) = metrics(report, name).values()
        assert (skipped.metric, skipped.status) == ("run", "skipped")
        assert skipped.error
        assert math.isnan(skipped.p50)
    assert report.failures == 0


def test_a_step_at_its_peak_finds_no_gradient_to_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one of an earlier step on parameters that are the provider's own: on a GPU it would make room."""
    pytest.importorskip("torchvision")
    found = []

    class Watched(type(PROVIDERS["frozen_bn"])):  # type: ignore[misc]
        def prepare(self, subject: Subject) -> Way:
            self.way = super().prepare(subject)
            return self.way

    def peak(_function: Callable[[], object], _device: torch.device) -> int:
        tensors = [each.x, *each.model.parameters(), *watched.way.model.parameters()]
        found.append(sum(tensor.grad is not None for tensor in tensors))
        return 0

    each, watched = subject(small(inner=True), mode="train-frozen"), Watched()
    monkeypatch.setattr(run, "peak_bytes", peak)
    report = report_of(each, watched)
    assert report.failures == 0
    assert found == [0]


def test_pairs_are_counted_in_what_is_compiled() -> None:
    """Of Inductor's own pass, too, in the dry run of the GPU check. This is the one compilation here."""
    pairs = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
    (ours,) = providers.providers(["triton_convbn"])
    report = report_of(subject(case(*pairs)), Eager(), ours)
    assert report.failures == 0
    assert metrics(report, "triton_convbn")["pairs_folded"].p50 == 2
    assert metrics(report, "eager")["pairs_folded"].p50 == 0
    kept = [metrics(report, name)["saved_for_backward"].p50 for name in ("triton_convbn", "eager")]
    assert 0 < kept[0] < kept[1]


# ---- a file that a run adds to -------------------------------------------------------------------------------------


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small case for the command line, by the name of its layers, and another."""
    monkeypatch.setitem(cases.LAYERS, "small", lambda: [small(inner=True)])
    other = case(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), name="other", inner=True)
    monkeypatch.setitem(cases.LAYERS, "other", lambda: [other])


Add = Callable[[Provider], None]


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Add:
    """Makes a provider known by its name."""
    return lambda provider: monkeypatch.setitem(PROVIDERS, provider.name, provider)


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(["bench", *arguments])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def keys_of(path: Path) -> list[tuple[str, ...]]:
    return [tuple(each[name] for name in (*Key._fields, "metric")) for each in rows_of(path)]


RUN = ["--layers", "small", "--provider", "eager", "--provider", "on_call", "--batch", "2", "--rounds", "2"]


@pytest.mark.usefixtures("layers")
def test_a_second_run_measures_nothing(tmp_path: Path, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    path, counted = tmp_path / "new" / "rows.csv", OnCall(nothing, 10**9)
    add(counted)
    arguments = [*RUN, "--mode", "train", "--mode", "infer", "--csv", str(path)]
    assert bench(*arguments, "--json") == 0
    first, content = json.loads(capsys.readouterr().out), path.read_bytes()
    assert counted.prepared == 2
    assert len(set(keys_of(path))) == len(keys_of(path)) == len(first["rows"])
    assert bench(*arguments, "--json") == 0
    assert counted.prepared == 2
    assert path.read_bytes() == content
    assert json.loads(capsys.readouterr().out) == first
    # What is new is measured, and no more: another mode, and then another provider.
    assert bench(*arguments, "--mode", "input-grad") == 0
    assert counted.prepared == 3
    assert path.read_bytes().startswith(content)
    assert {each["mode"] for each in rows_of(path)[len(first["rows"]) :]} == {"input-grad"}
    content = path.read_bytes()
    add(Scaled())
    assert bench(*RUN, "--provider", "scaled", "--csv", str(path)) == 0
    assert path.read_bytes().startswith(content)
    new = path.read_bytes()[len(content) :].decode()
    assert {line.split(",")[1] for line in new.splitlines()} == {"scaled"}
    assert len(set(keys_of(path))) == len(keys_of(path))


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("at", [2, OnCall.BEFORE, OnCall.BEFORE + 2])
def test_an_interrupted_run_is_completed(at: int, tmp_path: Path, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it was: while it was prepared, in its memory, and inside the rounds."""
    path = tmp_path / "rows.csv"
    add(OnCall(interrupt, at))
    assert bench(*RUN, "--csv", str(path)) == 130
    out, err = capsys.readouterr()
    said = err.strip().splitlines()[-1]
    kept = rows_of(path)
    assert said == f"interrupted; {len(kept)} rows are in {path}: run it again to go on"
    assert "small, train, float32, contiguous, batch 2" in out, "what there is, is shown"
    assert {"pairs_folded", "output_error", "gradient_error"} <= {
        each["metric"] for each in kept if each["provider"] == ("eager" if at == 2 else "on_call")
    }
    assert not any(each["metric"].startswith("time") for each in kept)
    assert {each["status"] for each in kept} == {"ok"}
    content = path.read_bytes()

    add(OnCall(nothing, at))
    assert bench(*RUN, "--csv", str(path)) == 0
    assert path.read_bytes().startswith(content)
    keys = keys_of(path)
    assert len(set(keys)) == len(keys)
    found = {(each["provider"], each["metric"]) for each in rows_of(path)}
    assert {(name, metric) for name in ("eager", "on_call") for metric in ("time", "time_min", "time_rounds")} <= found
    assert ("on_call", "time_over_eager") in found


@pytest.mark.usefixtures("layers")
def test_interrupted_without_a_file(add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    add(OnCall(interrupt, 3))
    assert bench(*RUN, "--json") == 130
    out, err = capsys.readouterr()
    assert out == "", "half an object is none"
    assert re.fullmatch(r"interrupted; \d+ rows", err.strip().splitlines()[-1])


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("changed", range(4))
def test_another_commit_or_device_is_measured_again(
    changed: int, tmp_path: Path, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another torch or triton. Both are kept."""
    path, counted = tmp_path / "rows.csv", OnCall(nothing, 10**9)
    add(counted)
    where = ["a CPU", "2.14.1", "3.8.0", "c0ffee0"]
    monkeypatch.setattr("triton_convbn.perf.report.environment", lambda _device: tuple(where))
    assert bench(*RUN, "--csv", str(path)) == 0
    before = rows_of(path)
    where[changed] += "+"
    for _ in range(2):
        assert bench(*RUN, "--csv", str(path)) == 0
        assert counted.prepared == 2
    rows = rows_of(path)
    assert rows[: len(before)] == before
    assert Counter(keys_of(path)) == dict.fromkeys(keys_of(path), 2)
    column = ("device", "torch", "triton", "commit")[changed]
    assert [each[column] for each in rows] == [where[changed][:-1]] * len(before) + [where[changed]] * len(before)


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("at", [1, OnCall.BEFORE + 1])
def test_failed_rows_are_kept_and_not_tried_again(
    at: int, tmp_path: Path, add: Add, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not where everything else is there, and not where something is still to be measured."""
    path, broken = tmp_path / "rows.csv", OnCall(out_of_luck, at)
    add(broken)
    assert bench(*RUN, "--csv", str(path)) == 1
    content = path.read_bytes()
    assert bench(*RUN, "--csv", str(path), "--json") == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(each["provider"], each["error"]) for each in rows if each["status"] == "failed"] == [
        ("on_call", "RuntimeError: out of luck")
    ]
    assert path.read_bytes() == content
    add(Scaled())
    assert bench(*RUN, "--provider", "scaled", "--csv", str(path)) == 1
    assert broken.prepared == 1
    assert path.read_bytes().startswith(content)
    assert len(set(keys_of(path))) == len(keys_of(path))
    assert any(each["provider"] == "scaled" and each["metric"] == "time" for each in rows_of(path))


@pytest.mark.usefixtures("layers")
def test_a_failed_check_is_written_once(tmp_path: Path, add: Add) -> None:
    """Also where the run that found it is completed by another, which finds it again."""
    path = tmp_path / "rows.csv"
    add(Scaled(lambda y: 1.01 * y))
    add(OnCall(interrupt, 1))
    arguments = [*RUN, "--csv", str(path)]
    arguments[2:2] = ["--provider", "scaled"]
    assert bench(*arguments) == 130
    add(OnCall(nothing, 1))
    assert bench(*arguments) == 1
    assert len(set(keys_of(path))) == len(keys_of(path))
    assert [each["metric"] for each in rows_of(path) if each["status"] == "failed"] == ["output_error"]


@pytest.mark.usefixtures("layers")
def test_failures_of_another_bench_are_its_own(tmp_path: Path, add: Add) -> None:
    path = str(tmp_path / "rows.csv")
    add(OnCall(out_of_luck, 1))
    assert bench(*RUN, "--csv", path) == 1
    assert bench("--layers", "other", "--provider", "eager", "--rounds", "1", "--csv", path) == 0


def test_what_fails_after_it_was_measured_is_written(tmp_path: Path) -> None:
    log = Log(tmp_path / "rows.csv")
    report = Report(log, "a CPU")
    report.measured(Key("a"), "output_error", "1", 0.0)
    for _ in range(2):
        report.checked(Key("a"), "output_error", "1", math.nan, 1.0)
    report.measured(Key("a"), "output_error", "1", 0.0)
    log.close()
    assert [each["status"] for each in rows_of(log.path)] == ["ok", "failed"]
    assert [each.status for each in report.rows] == ["failed"]


LAST = failed("run", 'RuntimeError: of "two", über')


def test_a_last_line_that_was_cut_short(tmp_path: Path) -> None:
    """Wherever it was cut, through a quotation or a character: what was before it counts, and after the next run
    everything can read the file."""
    path = tmp_path / "rows.csv"
    first, third = row("time", 10.0), row("time", 30.0, batch=3)
    log = Log(path)
    log.append(first)
    begin = path.stat().st_size
    log.append(LAST)
    log.close()
    content = path.read_bytes()
    lost = 0
    for end in range(begin, len(content) + 1):
        path.write_bytes(content[:end])
        log = Log(path)
        assert log.earlier[0] == first
        log.append(third)
        log.close()
        found = read([path], lambda text: pytest.fail(text))
        assert (found["batch"].iloc[0], found["batch"].iloc[-1]) == (8, 3)
        # It is there, with a commit that may have lost its end, or it is not.
        back = Log(path).earlier
        assert [each.error for each in back[1:-1]] in ([], [LAST.error])
        assert "\n\n" not in path.read_text()
        lost += len(back) == 2
    assert lost == len(content) - begin - len(LAST.commit) - 1


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", ",".join(COLUMNS)[:-3], "\n", "\0\n", ",".join(COLUMNS) + ",more\n", '"']
)
@pytest.mark.usefixtures("layers")
def test_a_foreign_file_is_left_alone(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text)
    assert bench(*RUN[:4], "--csv", str(path)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"triton-convbn: {path} ")
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_too_wide_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text('"' + "a" * 200_000 + '"\n')
    with pytest.raises(ValueError, match="is no CSV file"):
        Log(path)


def test_a_file_whose_last_line_has_no_end_loses_nothing(tmp_path: Path) -> None:
    """As an editor may leave it."""
    path = tmp_path / "rows.csv"
    log = Log(path)
    log.append(row("time", 10.0))
    log.close()
    path.write_text(path.read_text().removesuffix("\n"))
    log = Log(path)
    log.append(row("time", 20.0, batch=2))
    log.close()
    assert [each["p50"] for each in rows_of(path)] == ["10.0", "20.0"]


APPEND = """
import sys, time
from dataclasses import replace
from pathlib import Path
from triton_convbn.perf import environment
from triton_convbn.perf.report import Report
from triton_convbn.perf.table import Key, Log

path, ready, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
(ready / name).touch()
while len(list(ready.iterdir())) < 2:
    time.sleep(0.001)
for part in range(4):
    log = Log(path)
    environment.note(path)
    report = Report(log, "a CPU")
    for index in range(20):
        report.checked(Key(f"{name} {part} {index}"), "time", "ms", 2.0, 1.0, "of " + name * 400)
    log.close()
"""


def test_two_processes_begin_one_file(tmp_path: Path) -> None:
    path, ready = tmp_path / "rows.csv", tmp_path / "ready"
    ready.mkdir()
    running = [
        subprocess.Popen([sys.executable, "-c", APPEND, str(path), str(ready), name], stderr=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    for process in running:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
    lines = path.read_text().splitlines()
    assert lines.count(",".join(COLUMNS)) == 1
    assert lines[0] == ",".join(COLUMNS)
    cases_ = [each["case"] for each in rows_of(path)]
    assert sorted(cases_) == sorted(
        f"{name} {part} {index}" for name in "ab" for part in range(4) for index in range(20)
    )
    assert all(each["error"].startswith("of " + each["case"][0] * 400) for each in rows_of(path))
    assert all(each["status"] == "failed" and None not in each and None not in each.values() for each in rows_of(path))
    assert len(json.loads(environment.beside(path).read_text())) == 8, "nor does one lose the other's entry"


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_no_row_is_written_while_another_opens_the_file(tmp_path: Path) -> None:
    """Which would take what it sees of the row for one that was cut short, and take it out."""
    log = Log(tmp_path / "rows.csv")
    content = log.path.read_bytes()
    writer = threading.Thread(target=log.append, args=[row("time", 1)])
    with log.path.open("a+") as other, locked(other):
        writer.start()
        writer.join(0.1)
        assert writer.is_alive()
        assert log.path.read_bytes() == content
    writer.join(10)
    assert len(rows_of(log.path)) == 1


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [
        row("time", 0.1, 1 / 3, 1e-300),
        row("time", math.nan, math.inf, 5, status="failed", error='a "b", c', device="a CPU, with a comma", batch=0),
    ]
    log = Log(tmp_path / "rows.csv")
    for each in rows:
        log.append(each)
    log.close()
    back = Log(log.path).earlier
    assert back[0] == rows[0]
    assert (back[1].error, back[1].device, back[1].p80) == (rows[1].error, rows[1].device, 5)
    assert math.isnan(back[1].p50)
    assert math.isnan(back[1].p20), "there is no infinity in the file"


@pytest.mark.usefixtures("layers")
def test_environment_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    arguments = ["--layers", "other", "--provider", "eager", "--rounds", "1", "--csv", str(path)]
    monkeypatch.setenv("OMP_SOMETHING", "1")
    for times in (1, 2):
        assert bench(*arguments) == 0
        text = (tmp_path / "rows.environment.json").read_text()
        entries = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in it"))
        assert len(entries) == times
    entry = entries[-1]
    assert entry["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (entry["threads"], entry["variables"]["OMP_SOMETHING"]) == (torch.get_num_threads(), "1")
    assert entry["command"][1:] == sys.argv[1:]
    assert entry["commit"] == rows_of(path)[0]["commit"]
    assert entry["processor"] == rows_of(path)[0]["device"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["rows.csv", "rows.environment.json"]


@pytest.mark.parametrize("text", ['{"not": "a list"}', "3", "no JSON", ""])
@pytest.mark.usefixtures("layers")
def test_an_environment_that_is_none_is_left_alone(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "rows.environment.json"
    other.write_text(text)
    assert bench(*RUN[:4], "--csv", str(tmp_path / "rows.csv")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"triton-convbn: {other} is no list of runs"
    assert other.read_text() == text


# ---- the command line ----------------------------------------------------------------------------------------------

REFUSED = {
    "nothing to do": ([], ["--model NAME", "--layers NAME", "--compare"]),
    "unknown model": (["--model", "resnet81"], ["'resnet81'", "did you mean"]),
    "unknown layers": (["--layers", "vgg"], ["vgg", "decoder"]),
    "unknown mode": (["--layers", "other", "--mode", "test"], ["mode: test", "train-frozen"]),
    "unknown dtype": (["--layers", "other", "--dtype", "int8"], ["dtype: int8", "autocast_bfloat16"]),
    "unknown layout": (["--layers", "other", "--layout", "nhwc"], ["layout: nhwc", "channels_last"]),
    "unknown provider": (["--layers", "other", "--provider", "easy"], ["provider: easy", "triton_convbn_keep"]),
    "no device": (["--layers", "other", "--device", "gpu"], ["device: gpu"]),
    "device without a clock": (["--layers", "other", "--device", "meta"], ["--device meta", "cpu and cuda"]),
    "batch of zero": (["--layers", "other", "--batch", "0"], ["--batch"]),
    "rounds of zero": (["--layers", "other", "--rounds", "0"], ["--rounds"]),
    "size of zero": (["--model", "resnet18", "--size", "0"], ["--size"]),
    "unknown flag": (["--colour"], ["--colour"]),
    "tolerance that is none": (["--compare", "a.csv", "b.csv", "--tolerance", "-1"], ["--tolerance"]),
    "nothing to compare": (["--compare", "a.csv", "b.csv"], ["a.csv"]),
    "compared with nothing": (["--compare", "a.csv"], ["--compare"]),
    "file that is a folder": (["--layers", "other", "--csv", "."], ["directory"]),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.usefixtures("layers")
def test_refused(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("triton-convbn: ")
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "words"), [("cuda", "no GPU"), ("cuda:1", "no GPU"), ("cuda:2", "no GPU")])
@pytest.mark.usefixtures("layers")
def test_no_gpu(name: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("--layers", "other", "--device", name) == 2
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("layers")
def test_no_such_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert bench("--layers", "other", "--device", "cuda:2") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "triton-convbn: --device cuda:2: there are 2 GPUs, counted from 0"


@pytest.mark.usefixtures("layers")
def test_json_and_csv(tmp_path: Path, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    """One object on stdout, what is being done on stderr, and the same rows in the file."""
    add(Scaled())
    path = tmp_path / "rows.csv"
    settings = ["--layers", "other", "--mode", "infer", "--mode", "train", "--batch", "1", "--batch", "3"]
    chosen = ["--provider", "eager", "--provider", "scaled", "--provider", "eager_folded"]
    assert bench(*settings, "--layers", "small", *chosen, "--rounds", "6", "--json", "--csv", str(path)) == 0
    out, err = capsys.readouterr()
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in it"))
    assert set(found) == {"device", "csv", "rows"}
    assert found["csv"] == str(path)
    in_file = rows_of(path)
    assert [{key: "" if value is None else str(value) for key, value in each.items()} for each in found["rows"]] == [
        dict(each) for each in in_file
    ]
    times = {
        (each["case"], each["mode"], each["batch"], each["provider"]) for each in in_file if each["metric"] == "time"
    }
    runs = set(itertools.product(("other", "small"), ("infer", "train"), "13", ("eager", "scaled", "eager_folded")))
    assert times == {key for key in runs if key[1::2] != ("train", "eager_folded")}
    assert all(each["device"] == found["device"] for each in found["rows"])
    assert "other train float32 contiguous batch 3: scaled" in err


@pytest.mark.usefixtures("layers")
def test_a_failed_row_is_exit_code_1(add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    add(OnCall(out_of_luck, 1))
    assert bench(*RUN) == 1
    out, err = capsys.readouterr()
    assert "failed: on_call run: RuntimeError: out of luck" in out
    assert "failed: small on_call train float32 contiguous 2 run: RuntimeError: out of luck" in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("layers")
def test_all_cases_are_tried_before_one_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cases.LAYERS, "broken", lambda: [case(nn.Conv2d(5, 4, 3), name="broken")])
    path = tmp_path / "rows.csv"
    assert bench("--layers", "other", "--layers", "broken", "--provider", "eager", "--csv", str(path)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("triton-convbn: broken does not run on an input of shape (1, 3, 8, 8)")
    assert not path.exists()


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 where nothing is worse, 1 where something is, and the tolerance decides."""
    paths = []
    for name, figure in (("a", 10.0), ("b", 10.8), ("c", 14.0)):
        log = Log(tmp_path / f"{name}.csv")
        log.append(row("time", figure, figure, figure))
        log.close()
        paths.append(str(log.path))
    a, b, c = paths
    assert bench("--compare", a, c) == 1
    assert "regression" in capsys.readouterr().out
    assert bench("--compare", c, a) == 0
    assert bench("--compare", a, a) == 0
    assert bench("--compare", a, b) == 1
    assert bench("--compare", a, b, "--tolerance", "0.1") == 0
    capsys.readouterr()
    assert bench("--compare", a, c, "--json") == 1
    assert json.loads(capsys.readouterr().out)["regression"] == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--help") == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--model", "--layers", "--provider", "--compare", "--cold"))


# ---- what is shown -------------------------------------------------------------------------------------------------

SETTING = Key("small", "", "train", "float32", "contiguous", 8)


def shown(report: Report, console: Console | None = None, **options: Any) -> str:
    out = io.StringIO()
    show.show(report, [SETTING], console or Console(file=out, **options))
    return out.getvalue()


def full_report() -> Report:
    """With every column and every provider."""
    report = Report(None, "Some Processor(R) with a Long Name CPU @ 2.90GHz")
    for index, name in enumerate(PROVIDERS):
        key = SETTING._replace(provider=name)
        for column in show.COLUMNS:
            report.measured(key, column.metric, "", 123.456e6 if column.scale == 1e-6 else 1234.5 + index)
        for end in ("", "_low", "_high"):
            report.measured(key, f"time_over_inductor{end}", "1", 1.0 + index / 1000)
        report.measured(key, "time_rounds", "1", 10)
    return report


def test_table_in_a_pipe_is_wide_enough(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rich takes a pipe for a terminal of 80 columns, into which this does not fit."""
    monkeypatch.delenv("COLUMNS", raising=False)
    show.show(full_report(), [SETTING])
    lines = capsys.readouterr().out.splitlines()
    assert 80 < max(map(len, lines)) <= 140
    for index, name in enumerate(PROVIDERS):
        (line,) = (line for line in lines if re.match(rf"[│ ]+{name} ", line))
        assert line.count("123.5") == 2
        assert f"{1234.5 + index:.1f}" in line
        assert ("1.003 to 1.003" in lines[lines.index(line) + 1]) == (index == 3) or name == "inductor"
    assert "…" not in "".join(lines)


def test_table() -> None:
    report = Report(None, "a CPU")
    for name, ratio in (("inductor", None), ("triton_convbn", 0.5)):
        key = SETTING._replace(provider=name)
        report.measured(key, "pairs_folded", "pairs", 2)
        report.measured(key, "saved_for_backward", "bytes", 1.25e6)
        report.measured(key, "time", "ms", (12.34, 12.0, 13.0))
        report.measured(key, "time_rounds", "1", 7)
        if ratio:
            report.measured(key, "time_over_inductor", "1", ratio)
    report.checked(SETTING._replace(provider="triton_convbn"), "output_error", "1", 0.5, 0.1, "output")
    report.skipped(SETTING._replace(provider="frozen_bn"), "run", "", "no [torchvision] here")
    with report.keeping(SETTING._replace(provider="broken"), "run"):
        raise RuntimeError("[red]no luck")
    report.measured(SETTING._replace(case="another", provider="eager"), "time_rounds", "1", 99)
    text = shown(report, width=200)
    cells = {line.split()[1]: re.split(r" *│ *", line)[2:-1] for line in text.splitlines() if line.startswith("│")}
    assert cells["inductor"] == ["2", "", "1.2", "12.3", "1"]
    assert cells["triton_convbn"] == ["2", "5.0e-01 !", "1.2", "12.3", "0.500"]
    assert cells["broken"] == [""] * 5
    assert "frozen_bn" not in cells
    assert "compile" not in text
    assert "skipped: frozen_bn run: no [torchvision] here" in text
    assert "failed: broken run: RuntimeError: [red]no luck" in text
    assert "failed: triton_convbn output_error: output: 0.5 1, 0.1 allowed" in text
    assert "medians of 7 rounds" in text
    assert "measured on a CPU, torch" in text


def test_table_of_nothing() -> None:
    """As where a run was interrupted before it came to this, and where no provider can run it."""
    report = Report(None, "a CPU")
    text = shown(report, width=200)
    assert text.startswith("Errors: ")
    assert "medians of no rounds" in text
    report.skipped(SETTING._replace(provider="frozen_bn"), "run", "", "no reason")
    assert shown(report, width=200).splitlines()[:3] == [
        "small, train, float32, contiguous, batch 8",
        f"measured on a CPU, torch {torch.__version__}",
        "skipped: frozen_bn run: no reason",
    ]
