"""Gradients of large weights under Inductor's C++: contiguous, and no copies in between."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from checking import scramble
from torch import Tensor, nn
from torch._inductor import config


def pair(channels: int, kernel: int = 3, **options: Any) -> nn.Module:
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class Branches(nn.Module):
    """``bn(conv3(x)) + bn(conv1(x)) + bn(x)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.large, self.small, self.norm = pair(channels), pair(channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x) + self.norm(x)


Call = tuple[Tensor, Tensor, tuple[bool, ...]]


def run(model: nn.Module, x: Tensor) -> list[Call]:
    """Return the gradient, the input and the mask of each convolution's backward. Check all gradients."""
    model = scramble(model.eval())
    want, exact = copy.deepcopy(model).double(), x.detach().double().requires_grad_(x.requires_grad)
    want(exact).sin().sum().backward()
    calls: list[Call] = []
    convolution_backward = torch.ops.aten.convolution_backward.default

    def recorded(*arguments: Any) -> Any:
        calls.append((*arguments[:2], tuple(arguments[-1])))
        return convolution_backward(*arguments)

    with config.patch(force_disable_caches=True):
        compiled = torch.compile(model, backend="triton_convbn")
        compiled(x).sum().backward()
    model.zero_grad()
    x.grad = None
    # The code looks the operator up on every call.
    with mock.patch.object(torch.ops.aten.convolution_backward, "default", recorded):
        compiled(x).sin().sum().backward()
    leaves, others = [*model.parameters(), x], [*want.parameters(), exact]
    for leaf, other in zip(leaves, others, strict=True):
        if other.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-4, atol=1e-5 * other.grad.abs().max())
            assert leaf.grad.stride() == leaf.stride()
    return calls


def layouts(call: Call) -> tuple[bool, tuple[bool, ...]]:
    """Return whether the input of a call is contiguous, and its mask. If it is, so has to be the gradient."""
    grad, x, mask = call
    assert grad.is_contiguous() or not x.is_contiguous()
    return x.is_contiguous(), mask


OF_X, OF_WEIGHT = (False, (True, False, False)), (True, (False, True, True))
TOGETHER = (False, (True, True, True))


@pytest.mark.parametrize(("make", "channels"), [(pair, 64), (Branches, 16)])  # sums of more are contiguous
def test_a_large_weight_is_apart(make: Any, channels: int) -> None:
    """The first convolution has a small weight, and an input without a gradient."""
    model = nn.Sequential(nn.Conv2d(4, channels, 3, 2, 1), nn.BatchNorm2d(channels), make(channels), nn.ReLU())
    calls = [layouts(call) for call in run(model, torch.randn(2, 4, 10, 9))]
    assert sorted(calls) == sorted([OF_X, OF_WEIGHT, (False, (False, True, True))])


def test_only_the_weight_trains() -> None:
    model = nn.Sequential(pair(64), nn.ReLU())
    assert [layouts(call) for call in run(model, torch.randn(2, 64, 5, 4))] == [OF_WEIGHT]


OTHERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "large_activations": (lambda: pair(16), (4, 16, 10, 9)),
    "one_element": (lambda: pair(64, 1), (2, 64, 3, 2)),
    "depthwise": (lambda: pair(64, groups=64), (2, 64, 4, 3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left(name: str) -> None:
    make, shape = OTHERS[name]
    model = nn.Sequential(make(), nn.ReLU())
    assert [mask for *_, mask in run(model, torch.randn(shape, requires_grad=True))] == [(True, True, True)]


def test_channels_last_parameters() -> None:
    """Their gradients are to be channels_last as well."""
    model = nn.Sequential(pair(64), nn.ReLU()).to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    assert [layouts(call) for call in run(model, x)] == [TOGETHER]


def test_other_dtypes() -> None:
    model = nn.Sequential(pair(64), nn.ReLU()).double()
    x = torch.randn(2, 64, 5, 4, dtype=torch.float64, requires_grad=True)
    assert [mask for *_, mask in run(model, x)] == [(True, True, True)]


def test_a_weight_that_does_not_train() -> None:
    model = nn.Sequential(pair(64), nn.ReLU())
    model[0][0].requires_grad_(False)
    calls = run(model, torch.randn(2, 64, 5, 4, requires_grad=True))
    assert sorted(map(layouts, calls)) == [OF_X, OF_WEIGHT], "BatchNorm's scale needs dW'"


@pytest.mark.filterwarnings("error:Raw SymInt")
def test_dynamic_sizes() -> None:
    """Torch warns about strides in the graph that are symbols."""
    model = scramble(nn.Sequential(pair(64), nn.ReLU(), pair(64)).eval())
    with config.patch(force_disable_caches=True):
        torch.compile(model, backend="triton_convbn", dynamic=True)(torch.randn(2, 64, 5, 4)).sum().backward()


def test_a_dynamic_batch_is_not_limited() -> None:
    """A guard on the batch would violate its range. From 16 images on torch itself chooses another convolution."""
    model = scramble(nn.Sequential(pair(64), nn.ReLU(), pair(64)).eval())
    x = torch.randn(2, 64, 5, 4)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=15)
    with config.patch(force_disable_caches=True):
        torch.compile(model, backend="triton_convbn")(x).sum().backward()
