"""Convolutions whose output is scaled instead of their weight: which ones, and that results do not change."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from checking import check, errors, results, scramble
from torch import Tensor, fx, nn

from triton_convbn.ops.library import fold_op
from triton_convbn.post_grad import manager
from triton_convbn.post_grad.manager import PostGradPass
from triton_convbn.post_grad.scale_conv_output import scale_conv_outputs

pytestmark = pytest.mark.slow

aten = torch.ops.aten


@contextmanager
def graphs() -> Iterator[list[fx.Graph]]:
    """Yield a list that collects copies of the graphs after the passes, forward and backward."""
    found: list[fx.Graph] = []
    original = PostGradPass.__call__

    def call(self: PostGradPass, graph: fx.Graph, is_inference: bool = False) -> None:
        original(self, graph, is_inference)
        graph.lint()
        found.append(copy.deepcopy(graph))

    with mock.patch.object(PostGradPass, "__call__", call), torch._inductor.config.patch(force_disable_caches=True):
        yield found


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="triton_convbn", options=options)


def trained(model: nn.Module, x: Tensor, **options: Any) -> tuple[fx.Graph, fx.Graph]:
    """Check outputs and gradients against fp64. Return the graphs of forward and backward."""
    with graphs() as found:
        check(compiled(model, **options), model, x)
    forward, backward = found
    return forward, backward


def weights_made(graph: fx.Graph) -> int:
    """Return how many convolutions use a weight that the graph computes."""
    convolutions = [node for node in graph.nodes if node.target is aten.convolution.default]
    assert convolutions
    return sum(not _is_parameter(node.args[1]) for node in convolutions)


def _is_parameter(node: fx.Node) -> bool:
    while node.target is aten.as_strided.default:  # added by strides.preserve_strides
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "placeholder"


def folded(graph: fx.Graph) -> list[int]:
    """Return the number of pairs of each fold operator."""
    return [len(node.args[0]) for node in graph.nodes if node.target is fold_op]


def stack(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return scramble(nn.Sequential(*layers).eval(), 3e-2)


def pair(inputs: int, outputs: int, taps: int = 1, **options: Any) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, taps, **options), nn.BatchNorm2d(outputs), nn.ReLU()]


X = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_one_tap(bias: bool, affine: bool) -> None:
    model = stack(nn.Conv2d(6, 8, 1, bias=bias), nn.BatchNorm2d(8, affine=affine), nn.ReLU())
    forward, _ = trained(model, X, when="always")
    assert weights_made(forward) == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_one_tap_by_the_operator(bias: bool, affine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = stack(nn.Conv2d(6, 8, 1, bias=bias), nn.BatchNorm2d(8, affine=affine), nn.ReLU())
    forward, _ = trained(model, X, when="always", kernel="triton")
    assert weights_made(forward) == 0
    assert folded(forward) == []


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_the_rest_of_a_group_is_folded(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The middle one of three has one tap. The others are turned channels_last by their folds, so that those stay."""
    if kernel == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = stack(*pair(6, 64, 3, padding=1), *pair(64, 64), *pair(64, 64, 3, padding=1, bias=False))
    forward, backward = trained(model, X, kernel=kernel)
    assert weights_made(forward) == 2
    if kernel == "triton":
        assert folded(forward) == [2]
        assert folded(backward) == [3]
        (fold,) = (node for node in forward.nodes if node.target is fold_op)
        assert [value.shape for value in fold.meta["val"]] == [(64, 6, 3, 3), (64,), (64, 64, 3, 3), (64,)]
        assert all(value.is_contiguous(memory_format=torch.channels_last) for value in fold.meta["val"][::2])


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_weights_in_channels_last(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = stack(*pair(6, 16, 3, padding=1), *pair(16, 8, 3, groups=2)).to(memory_format=torch.channels_last)
    forward, _ = trained(model, X.to(memory_format=torch.channels_last), kernel=kernel)
    assert weights_made(forward) == 0


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv1d(6, 8, 1), nn.BatchNorm1d(8)], (2, 6, 9)),
        ([nn.Conv3d(6, 4, 1), nn.BatchNorm3d(4)], (2, 6, 3, 4, 5)),
        ([nn.ConvTranspose2d(6, 4, 1), nn.BatchNorm2d(4)], (2, 6, 5, 5)),
        ([nn.ConvTranspose2d(6, 4, 1, groups=2), nn.BatchNorm2d(4)], (2, 6, 5, 5)),
        ([nn.Conv2d(6, 6, 1, groups=6), nn.BatchNorm2d(6)], (2, 6, 5, 5)),
    ],
)
def test_every_kind_of_convolution(
    layers: list[nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    forward, _ = trained(stack(*layers, nn.ReLU()), torch.randn(shape), kernel="triton")
    assert (weights_made(forward), folded(forward)) == (0, [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16 bits the output is rounded before it is scaled, as without a fold."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = stack(*pair(6, 8)).to(dtype)
    forward, _ = trained(model, X.to(dtype), kernel="triton")
    assert weights_made(forward) == 0


def test_a_scale_of_zero_gets_its_gradient() -> None:
    model = stack(*pair(6, 8))
    with torch.no_grad():
        model[1].weight[:4] = 0
        model[1].bias.abs_()
    forward, _ = trained(model, X)
    assert weights_made(forward) == 0
    assert (model[1].weight.grad[:4] != 0).all()


def left_alone(why: str) -> tuple[nn.Module, dict[str, Any]]:
    conv, bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
    if why == "what it returns is convolved":
        return stack(conv, bn, nn.Conv2d(6, 4, 3), nn.ReLU()), {}
    if why == "what it returns is the output":
        return stack(conv, bn), {}
    if why == "the folded weight is kept":
        return stack(conv, bn, nn.ReLU()), {"recompute": False}
    if why == "contiguous, and wanted in channels_last":
        return stack(nn.Conv2d(6, 64, 3), nn.BatchNorm2d(64), nn.ReLU()), {}
    raise ValueError(why)


@pytest.mark.parametrize(
    "why",
    [
        "what it returns is convolved",
        "what it returns is the output",
        "the folded weight is kept",
        "contiguous, and wanted in channels_last",
    ],
)
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_weight_stays_folded(why: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, options = left_alone(why)
    forward, _ = trained(model, X, kernel=kernel, **options)
    assert weights_made(forward) == 1


def test_fold_that_casts_the_weight_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = stack(*pair(6, 8))
    with graphs() as found, torch.autocast("cpu", torch.bfloat16):
        compiled(model, kernel="triton")(X)
    assert folded(found[0]) == [1]


class Mixed(nn.Module):
    """Return three pairs that one launch folds, the middle one in fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = stack(*pair(6, 8)), stack(*pair(8, 64, 3))
        self.middle = stack(*pair(8, 8)).half()

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x).to(self.middle[0].weight.dtype))
        return self.last(x.to(self.first[0].weight.dtype))


def test_fold_with_prescale_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its convolution is multiplied by q, which only the fold computes."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = Mixed()
    double = copy.deepcopy(model).double()
    with graphs() as found:
        got = results(compiled(model, kernel="triton"), model, X)
    forward, backward = found
    assert (folded(forward), folded(backward)) == ([2], [3])
    (fold,) = (node for node in forward.nodes if node.target is fold_op)
    half, single = torch.float16, torch.float32
    assert [value.dtype for value in fold.meta["val"]] == [half, half, single, single, half]
    assert max(errors(got, results(double, double, X.double())).values()) < 1e-2


def test_weight_scaled_by_the_model_is_unchanged() -> None:
    """Its own product stays where it is, beside a pair whose weight is no longer made."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv2d(6, 6, 1), nn.Parameter(torch.randn(6))
            self.layers = stack(*pair(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.conv.weight * self.scale.reshape(-1, 1, 1, 1)
            return self.layers(torch.relu(torch.conv2d(x, weight, self.conv.bias)))

    forward, _ = trained(Scaled(), X)
    assert weights_made(forward) == 1


def test_weights_are_folded_without_the_pass() -> None:
    """The tests above can fail: without the pass the weight is folded."""
    others = [run for run in manager.PASSES if run is not scale_conv_outputs]
    with mock.patch.object(manager, "PASSES", others):
        forward, _ = trained(stack(*pair(6, 8)), X)
    assert weights_made(forward) == 1
