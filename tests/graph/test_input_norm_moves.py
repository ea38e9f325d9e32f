"""Calls between a BatchNorm and the convolution that reads it which move elements: the fold follows the channels."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import Calls
from checking import check, counted, dynamo, inductor, randn_like_model, scramble
from torch import Tensor, nn
from torch.export import export

from triton_convbn import fold_exported

X = (2, 4, 6, 5)
Call = Callable[[nn.Module, Tensor], Tensor]


def tokens(m: nn.Module, x: Tensor) -> Tensor:
    """Return the queries of an attention block, as FastViT has it: (N, H * W, C_out)."""
    return m.linear(m.bn(x).flatten(2).transpose(-2, -1))


FOLDS: dict[str, Call] = {
    "tokens": tokens,
    "tokens of a transposed input": lambda m, x: tokens(m, x.transpose(2, 3)),
    "tokens by permute": lambda m, x: m.linear(m.bn(x).permute(0, 2, 3, 1)),
    "moved away and back": lambda m, x: m.conv(m.bn(x).transpose(1, 2).contiguous().transpose(1, 2)),
    "moved and padded": lambda m, x: m.conv(F.pad(m.bn(x).transpose(2, 3), (1, 1, 2, 0), "reflect")),
    "wrappers": lambda m, x: m.conv1d(F.pad(m.bn(x).flatten(2).mT.mT, (2, 1), "reflect")),
    "cropped": lambda m, x: m.conv(m.bn(x)[:, :, 1:]),
    "flipped": lambda m, x: m.conv(m.bn(x).flip(3)),
    "view": lambda m, x: m.conv1d(m.bn(x[:, :, ::2]).view(2, 4, -1)),
    "batch norm after": lambda m, x: m.after(m.conv(F.dropout(m.bn(x).transpose(2, 3), 0.5, m.training))),
    "written to": lambda m, x: tokens(m, x).add_(1).sin_(),
}


STAYS: dict[str, tuple[Call, str]] = {
    "linear over space": (lambda m, x: m.over(m.bn(x).flatten(2)), "linear_rank"),
    "channels last of three": (lambda m, x: m.conv1d(m.bn(x)[:, :, :4].permute(0, 2, 1, 3)[..., 0]), "channels_moved"),
    "zeros": (lambda m, x: m.conv(F.pad(m.bn(x).transpose(2, 3), (1, 1))), "pads_zeros"),
    "half of the channels": (lambda m, x: m.two(m.bn(x)[:, :2]), "input_not_conv"),
    "channels flattened": (lambda m, x: m.flat(m.bn(x).flatten(1)), "input_not_conv"),
    "channels padded": (
        lambda m, x: m.linear(F.pad(m.bn(x).flatten(2).mT, (1, 1), "reflect")[..., 1:5]),
        "input_not_conv",
    ),
}


def make(call: Call) -> nn.Module:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {"bn": nn.BatchNorm2d(4), "after": nn.BatchNorm2d(6), "linear": nn.Linear(4, 7)}
    layers |= {"conv": nn.Conv2d(4, 6, 2), "conv1d": nn.Conv1d(4, 6, 3), "over": nn.Linear(30, 3)}
    layers |= {"two": nn.Conv2d(2, 6, 2), "flat": nn.Linear(120, 3)}
    return scramble(Calls(lambda m, x: call(m, x.tanh()), **layers).eval(), 1e-3)


@pytest.mark.parametrize("codegen", [True, False])
@pytest.mark.parametrize("name", FOLDS)
def test_folds(name: str, codegen: bool) -> None:
    model, x = make(FOLDS[name]), randn_like_model(X)
    check(dynamo(model, codegen=codegen), model, x)
    assert counted() == (1 + (name == "batch norm after"), {})


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    call, reason = STAYS[name]
    model, x = make(call), randn_like_model(X)
    check(dynamo(model), model, x)
    assert counted() == (0, {reason: 1})


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", ["tokens of a transposed input", "wrappers", "view"])
def test_exported(name: str, decomposed: bool) -> None:
    model, x = make(FOLDS[name]), randn_like_model(X)
    program = export(model, (x,))
    folded = fold_exported(program.run_decompositions() if decomposed else program)
    torch.testing.assert_close(folded.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokens of a transposed input", "wrappers"])
def test_inductor(name: str) -> None:
    model, x = make(FOLDS[name]), randn_like_model(X)
    check(inductor(model), model, x)


@pytest.mark.parametrize("shape", [(2, 4, 1, 5), (2, 4, 5, 1), (2, 4, 1, 1)])
def test_strides_of_dimensions_of_size_one(shape: tuple[int, ...]) -> None:
    """An eager BatchNorm sets them, and by them the convolution after it chooses its layout."""
    model = scramble(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)).eval(), 1e-3)
    batch, channels, *space = shape
    x = torch.randn(batch, *reversed(space), channels).permute(0, 3, 2, 1)
    run = dynamo(model, codegen=False)
    assert run(x).stride() == model(x).stride()
    assert counted() == (1, {})
