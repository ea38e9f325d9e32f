"""The fold of a BatchNorm into the convolution after it: values, gradients, rounding, range, and what is saved."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap

from triton_convbn.ops.input_norm import Norm, fold_input_norm
from triton_convbn.ops.input_norm_autograd import conv_with_input_norm

EPS = 1e-3


def vectors(channels: int, dtype: torch.dtype = torch.float64, affine: bool = True, trains: bool = True) -> Norm:
    """Return a BatchNorm with random affine parameters and statistics."""
    weight, bias = (torch.randn(channels, dtype=dtype).requires_grad_(trains) if affine else None for _ in "ab")
    mean, var = torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) * 2 + 0.05
    return weight, bias, mean, var, EPS


def normalize(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    weight, bias, mean, var, eps = norm
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def unfolded(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, after: Norm | None, groups: int) -> Tensor:
    z = normalize(x, norm)
    return normalize(F.linear(z, weight, bias) if weight.ndim == 2 else F.conv2d(z, weight, bias, groups=groups), after)


def inputs(groups: int, linear: bool, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    x = torch.randn(3, 4, *(() if linear else (5, 6)), dtype=dtype).requires_grad_()
    weight = torch.randn(6, 4 // groups, *(() if linear else (3, 2)), dtype=dtype).requires_grad_()
    return x, weight, torch.randn(6, dtype=dtype).requires_grad_() if bias else None  # type: ignore[return-value]


CASES = [
    (groups, linear, bias, affine, after)
    for groups, linear, bias, affine, after in itertools.product((1, 2), (False, True), *[(False, True)] * 3)
    if groups == 1 or not linear
]


@pytest.mark.parametrize(("groups", "linear", "bias", "affine", "after"), CASES)
def test_gradients(groups: int, linear: bool, bias: bool, affine: bool, after: bool) -> None:
    """Values, gradients and second derivatives are those of the layers one after another, in fp64."""
    torch.manual_seed(0)
    x, weight, b = inputs(groups, linear, bias)
    norm, second = vectors(4, affine=affine), vectors(6, affine=affine) if after else None
    leaves = [x, weight, b, *norm[:2], *(second or ())[:2]]
    leaves = [each for each in leaves if each is not None]

    def differentiated(output: Tensor) -> list[Tensor]:
        ramp = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)
        first = torch.autograd.grad((output.sin() * ramp).sum(), leaves, create_graph=True)
        return [output, *first, *torch.autograd.grad(sum(each.cos().sum() for each in first), leaves)]

    found = differentiated(conv_with_input_norm(x, weight, b, *norm, groups=groups, after=second))
    want = differentiated(unfolded(x, weight, b, norm, second, groups))
    for one, other in zip(found, want, strict=True):
        assert (one - other).abs().max() <= 1e-8 * other.abs().max()  # cosines of gradients of up to 100


def test_subsets_of_gradients() -> None:
    """Each tensor alone gets its gradient, and the others get none."""
    x, weight, bias = (each.detach() for each in inputs(1, False, True))
    norm, after = vectors(4, trains=False), vectors(6, trains=False)
    every = [x, weight, bias, *norm[:2], *after[:2]]
    for index in range(len(every)):
        for each in every:
            each.grad = None
            each.requires_grad_(each is every[index])
        conv_with_input_norm(x, weight, bias, *norm, after=after).square().sum().backward()
        found = every[index].grad
        (want,) = torch.autograd.grad(unfolded(x, weight, bias, norm, after, 1).square().sum(), [every[index]])
        torch.testing.assert_close(found, want)


def test_saves_the_input_alone() -> None:
    """Autograd saves x and parameters: neither bn(x) nor the folded weight."""
    x, weight, bias = inputs(1, False, True)
    norm = vectors(4)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        conv_with_input_norm(x, weight, bias, *norm)
    known = {each.data_ptr() for each in (x, weight, bias, *norm[:4]) if isinstance(each, Tensor)}
    assert {each.data_ptr() for each in saved} == known


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("after", [False, True])
def test_rounds_once(dtype: torch.dtype, after: bool) -> None:
    """The folded weight is the exact one, rounded: at most half a unit in the last place away."""
    weight, bias = torch.randn(6, 4, 3, 3).to(dtype), torch.randn(6).to(dtype)
    norm = vectors(4, torch.float32, trains=False)
    second = vectors(6, torch.float32, trains=False) if after else None
    double = [each.double() if isinstance(each, Tensor) else each for each in norm]
    twice = None if second is None else tuple(each.double() if isinstance(each, Tensor) else each for each in second)
    exact, _ = fold_input_norm(weight.double(), bias.double(), *double, after=twice)  # type: ignore[arg-type, misc]
    found, _ = fold_input_norm(weight, bias, *norm, after=second, prescale=False)
    assert found.dtype == dtype
    half = torch.finfo(dtype).eps / 2
    assert bool(((found.double() - exact).abs() <= exact.abs() * half * 1.001 + 1e-7).all())


@pytest.mark.parametrize("after", [False, True])
def test_fp16_stays_in_range(after: bool) -> None:
    """The fold is finite where the layers are: W * s is not, with a variance of 1e-8, nor is the bias."""
    torch.manual_seed(0)
    x = (torch.randn(8, 4) * 1e-4 + 3).half()
    weight = (torch.randn(6, 4) * 8).half()
    mean, var = torch.full((4,), 3.0), torch.full((4,), 1e-8)
    norm: Norm = torch.ones(4), torch.randn(4), mean, var, 0.0
    second = vectors(6, torch.float32, trains=False) if after else None
    plain, _ = fold_input_norm(weight, None, *norm, after=second, prescale=False)
    assert not torch.isfinite(plain).all()
    folded, shift, power = fold_input_norm(weight, None, *norm, after=second)
    assert bool(torch.isfinite(folded).all() and torch.isfinite(shift).all())
    assert bool((power.log2() == power.log2().round()).all())
    assert torch.isfinite(conv_with_input_norm(x, weight, None, *norm, after=second)).all()


def test_fp16_gradients() -> None:
    x, weight, bias = (each.detach() for each in inputs(2, False, True, torch.float32))
    norm, after = vectors(4, torch.float32, trains=False), vectors(6, torch.float32, trains=False)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        cast = lambda each: each.to(dtype).requires_grad_() if isinstance(each, Tensor) else each  # noqa: E731
        mine, second = ((*map(cast, each[:2]), *(v.to(dtype) for v in each[2:4]), EPS) for each in (norm, after))
        leaves = [*map(cast, (x, weight, bias)), *mine[:2], *second[:2]]
        output = conv_with_input_norm(*leaves[:3], *mine, groups=2, after=second)  # type: ignore[arg-type]
        return [each.double() for each in torch.autograd.grad(output.float().square().sum(), leaves)]

    for found, want in zip(gradients(torch.float16), gradients(torch.float64), strict=True):
        assert (found - want).norm() < 0.02 * want.norm()


def test_transforms() -> None:
    x, weight, bias = (each.detach() for each in inputs(2, False, True))
    norm = vectors(4, trains=False)

    def folded(x: Tensor, weight: Tensor) -> Tensor:
        return conv_with_input_norm(x, weight, bias, *norm, groups=2)

    def want(x: Tensor, weight: Tensor) -> Tensor:
        return unfolded(x, weight, bias, norm, None, 2)

    tangents = x.cos(), weight.cos()
    torch.testing.assert_close(jvp(folded, (x, weight), tangents), jvp(want, (x, weight), tangents))
    batch = torch.stack([x, x * 2])
    torch.testing.assert_close(vmap(folded, (0, None))(batch, weight), vmap(want, (0, None))(batch, weight))


def test_statistics_with_gradients() -> None:
    x, weight, bias = inputs(1, False, True)
    gamma, beta, mean, var, eps = vectors(4)
    norm = gamma, beta, mean.requires_grad_(), var.requires_grad_(), eps
    found = torch.autograd.grad(conv_with_input_norm(x, weight, bias, *norm).square().sum(), [mean, var])
    scale = gamma / (var + eps).sqrt()  # type: ignore[operator]
    z = (x - mean[:, None, None]) * scale[:, None, None] + beta[:, None, None]  # type: ignore[index]
    want = torch.autograd.grad(F.conv2d(z, weight, bias).square().sum(), [mean, var])
    torch.testing.assert_close(found, want)


def test_reports_writes_through_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CONVBN_CHECK_DATA", "1")
    x, weight, bias = inputs(1, False, True)
    norm = vectors(4)
    output = conv_with_input_norm(x, weight, bias, *norm)
    norm[2].data.add_(1)
    with pytest.raises(RuntimeError, match="running_mean changed"):
        output.sum().backward()


def test_errors() -> None:
    weight, norm = torch.randn(6, 4, 3, 3), vectors(4, torch.float32)
    with pytest.raises(ValueError, match="reads 8 channels"):
        fold_input_norm(weight, None, *norm, groups=2)
    with pytest.raises(TypeError, match="complex64"):
        fold_input_norm(weight.to(torch.complex64), None, *norm)
