"""Test the subjects of the benchmark: modes, dtypes, layouts, and the exact results."""

import re
from collections.abc import Callable

import pytest
import torch
from bench_kit import MODES, case, error, small, subject
from torch import Tensor, nn
from triton_convbn.perf.cli import Dtype, Layout
from triton_convbn.perf.subject import LAYOUTS
from triton_convbn.perf.workloads import Case

from triton_convbn.errors import UsageError
from triton_convbn.models import DTYPES

WEIGHTS = {"0.weight", "3.weight", "3.bias", "7.weight", "7.bias"}


AFFINE = {"1.weight", "1.bias", "4.weight", "4.bias"}


GRADIENTS = {"infer": set(), "train": WEIGHTS | AFFINE, "train-frozen": WEIGHTS, "input-grad": {"input"}}


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_modes(mode: str, inner: bool) -> None:
    """Check which tensors get a gradient. The input of a piece of a network gets one in training."""
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
    """Otherwise only rounding errors would be left of the gradient of a last bias."""
    each = subject(case(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    exact, found = each.exact(), each.step(each.model)
    assert all(error(found[name], exact[name]) < 1e-5 for name in exact)


def test_step_uses_the_weighted_loss() -> None:
    """With equal weights, gradients before a softmax or another BatchNorm would vanish."""
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
def test_dtypes_and_layouts(dtype: str, layout: str) -> None:
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
    assert list(Dtype) == list(DTYPES)
    assert list(Layout) == list(LAYOUTS)
    for name, (own, autocast) in DTYPES.items():
        assert str(autocast or own) == f"torch.{name.removeprefix('autocast_')}"
        assert (autocast is not None) == name.startswith("autocast_")


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_is_fp64_of_the_same_parameters(dtype: str) -> None:
    """16-bit parameters are rounded first, so the error is that of the arithmetic."""
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
    # The model itself keeps its dtype and has no gradients.
    assert {p.dtype for p in each.model.parameters()} == {DTYPES[dtype][0]}
    assert all(tensor.grad is None for tensor in (each.x, *each.model.parameters()))


class Reduced(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.conv(x))


UNSUITABLE = {
    "input does not fit": (case(nn.Conv2d(5, 4, 3)), "case does not run on an input of shape (2, 3, 8, 8): "),
    "indices": (case(Reduced(torch.argmax)), "case returns no floating-point tensor, which gives no loss"),
    "no parameter": (case(nn.ReLU()), "case has nothing to train"),
}


@pytest.mark.parametrize(("of", "words"), UNSUITABLE.values(), ids=UNSUITABLE)
def test_unsuitable_model_is_a_usage_error(of: Case, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        subject(of)
