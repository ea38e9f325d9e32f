"""`conv_bn_eval`, `bn_conv_eval` and `conv_sum_eval` under compilers, and with tensors of inference mode."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checking import scramble
from torch import Tensor, nn
from versions import TORCH

from triton_convbn import bn_conv_eval, conv_bn_eval, conv_sum_eval


class ByHand(nn.Module):
    """The functions by name, and in `forward` what they stand for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.conv, self.point = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.second, self.third = (nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "conv_bn_eval":
            return self.norm(self.conv(x))
        if self.name == "bn_conv_eval":
            return self.point(self.norm(x))
        return self.norm(self.conv(x)) + self.second(self.point(x)) + self.third(x)

    def folded(self, x: Tensor) -> Tensor:
        if self.name == "conv_bn_eval":
            return conv_bn_eval(self.conv, self.norm, x)
        if self.name == "bn_conv_eval":
            return bn_conv_eval(self.norm, self.point, x)
        branches = [nn.Sequential(self.conv, self.norm), nn.Sequential(self.point, self.second), self.third]
        return conv_sum_eval(branches, x)


NAMES = ["conv_bn_eval", "bn_conv_eval", "conv_sum_eval"]


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> ByHand:
    return scramble(ByHand(request.param).double().eval())


def image() -> Tensor:
    return torch.linspace(-1, 1, 2 * 8 * 5 * 6, dtype=torch.float64).view(2, 8, 5, 6)


@pytest.mark.parametrize("way", ["by hand", "backend"])
def test_input_that_was_made_in_inference_mode(model: ByHand, way: str) -> None:
    """With a frozen convolution autograd has nothing to save of it, so eager trains the BatchNorms."""
    model.conv.requires_grad_(False)
    model.point.requires_grad_(False)
    model.third.requires_grad_(False)  # eager's BatchNorm saves the input itself
    if model.name == "bn_conv_eval":
        model.norm.requires_grad_(False)
        model.point.bias.requires_grad_()
    run = model.folded if way == "by hand" else torch.compile(model, backend="triton_convbn_eager")
    with torch.inference_mode():
        x = image()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), trained, allow_unused=True)
    found = torch.autograd.grad(run(x).square().sum(), trained, allow_unused=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", ["by hand", "backend"])
def test_gradients_enabled_in_inference_mode(model: ByHand, way: str) -> None:
    """Inference mode wins: nothing is recorded, and nothing may be saved."""
    run = model.folded if way == "by hand" else torch.compile(model, backend="triton_convbn_eager")
    with torch.inference_mode(), torch.enable_grad():
        expected, found = model(image()), run(image())
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def skip_on_the_oldest_torch(model: ByHand) -> None:
    if model.name == "conv_sum_eval" and TORCH < (2, 12):
        pytest.skip("its Dynamo knows no max with a key")


def test_one_graph(model: ByHand) -> None:
    skip_on_the_oldest_torch(model)
    x = image().requires_grad_()
    run: Callable[[Tensor], Tensor] = torch.compile(model.folded, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x), model(x))
    leaves = [x, *(each for each in model.parameters() if each.requires_grad)]
    expected = torch.autograd.grad(model(x).square().sum(), leaves, allow_unused=True)
    found = torch.autograd.grad(run(x).square().sum(), leaves, allow_unused=True)
    torch.testing.assert_close(found, expected)


class Exported(nn.Module):
    def __init__(self, model: ByHand) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.folded(x)


@pytest.mark.parametrize("strict", [False, True])
def test_export(model: ByHand, strict: bool) -> None:
    if strict:
        skip_on_the_oldest_torch(model)
    program = torch.export.export(Exported(model), (image(),), strict=strict)
    torch.testing.assert_close(program.module()(image()), model(image()))


def test_trace(model: ByHand, tmp_path: Path) -> None:
    """A trace that calls no Python can be saved."""
    traced = torch.jit.trace(Exported(model), (image(),))
    torch.jit.save(traced, tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    torch.testing.assert_close(loaded(image()), model(image()))
