"""Test the providers of the benchmark: each does what its name says, or refuses."""

import copy
import sys

import pytest
import torch
from bench_kit import (
    MODES,
    case,
    error,
    operators,
    small,
    subject,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from triton_convbn.perf.cli import DEFAULT, MORE
from triton_convbn.perf.providers import PROVIDERS
from triton_convbn.perf.subject import LAYOUTS
from triton_convbn.perf.workloads import Case

from triton_convbn.errors import UsageError
from triton_convbn.models import DTYPES

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
    """The output is eager's, and no BatchNorm and no fold runs."""
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


def test_eager_folded_does_not_change_the_model() -> None:
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
    assert ran["rsqrt"] == 2, "they are not folded away"
    assert not any(isinstance(module, _BatchNorm) for module in way.model.modules())
    assert sum(isinstance(module, _BatchNorm) for module in each.model.modules()) == 2


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_merged_once(mode: str) -> None:
    blocks = pytest.importorskip("timm.models.byobnet")
    each = subject(case(blocks.MobileOneBlock(3, 3, 3, num_conv_branches=2), nn.Conv2d(3, 2, 1)), mode)
    provider = PROVIDERS["merged_once"]
    assert provider.refuses(each) is None
    want = each.step(each.model)
    way = provider.prepare(each)
    got = each.step(way.call, way.model)
    assert operators(lambda: way.call(each.x))["convolution"] == 2
    common = {"", "1.weight", "1.bias"} if mode == "train" else {""}
    assert got.keys() & want.keys() == common
    assert all(error(got[name], want[name]) < 1e-5 for name in common)
    assert any(isinstance(module, _BatchNorm) for module in each.model.modules()), "the subject's model stays"


def test_merged_once_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.utils.model", None)
    with pytest.raises(UsageError, match="merged_once needs timm: pip install"):
        PROVIDERS["merged_once"].prepare(subject())


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
    *[(name, "infer", small(), "no module") for name in ("merged_once", "inductor_merged_once")],
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
    """The help of bench names each of them."""
    assert all(name == provider.name for name, provider in PROVIDERS.items())
    assert {*DEFAULT, *MORE} == set(PROVIDERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inductor", "triton_convbn"])
def test_freezing_freezes_after_the_same_model_ran_without(name: str) -> None:
    """A frozen model is made of constants: its output stays when a parameter changes."""
    each = subject(small(), "infer")
    plain = PROVIDERS[name].prepare(each)
    each.step(plain.call, plain.model)
    frozen = PROVIDERS[f"{name}_freezing"].prepare(each)
    before = each.step(frozen.call, frozen.model)[""].clone()
    with torch.no_grad():
        for parameter in frozen.model.parameters():
            parameter.mul_(2)
    assert torch.equal(each.step(frozen.call, frozen.model)[""], before)
