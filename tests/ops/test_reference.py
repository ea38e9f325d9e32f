"""The reference fold compared with convolution and BatchNorm, in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from checking import TOLERANCES, scramble
from torch import nn
from versions import EPS

from triton_convbn import conv_bn_eval
from triton_convbn.ops.reference import fold_reference

CONVS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}
KINDS = [
    ("linear", 0, False, 1),
    *[("conv", n, False, g) for n in (1, 2, 3) for g in (1, 2, 4)],
    *[("transposed", n, True, g) for n in (1, 2, 3) for g in (1, 2, 4)],
]


def tensors(n, transposed, groups, dtype=torch.float64, c_in=4, c_out=8):
    shape = (c_in, c_out // groups) if transposed else (c_out, c_in if n == 0 else c_in // groups)
    made = {
        "weight": torch.randn(*shape, *[3] * n, dtype=dtype),
        "bias": torch.randn(c_out, dtype=dtype),
        "bn_weight": torch.randn(c_out, dtype=dtype),
        "bn_bias": torch.randn(c_out, dtype=dtype),
        "running_mean": torch.randn(c_out, dtype=dtype),
        "running_var": torch.rand(c_out, dtype=dtype) * 2 + 0.05,
    }
    return made, torch.randn(3, c_in, *[7] * n, dtype=dtype)


def convolve(n, transposed, groups, x, weight, bias):
    if n == 0:
        return F.linear(x, weight, bias)
    return (TRANSPOSED if transposed else CONVS)[n](x, weight, bias, stride=2, groups=groups)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("kind", "n", "transposed", "groups"), KINDS)
def test_fold_is_exact_for_every_kind(kind, n, transposed, groups, eps):
    made, x = tensors(n, transposed, groups)
    for bias, bn_weight, bn_bias in itertools.product((True, False), repeat=3):
        t = made | {
            name: made[name] if on else None
            for name, on in (("bias", bias), ("bn_weight", bn_weight), ("bn_bias", bn_bias))
        }
        mean, var = t["running_mean"], t["running_var"]
        y = convolve(n, transposed, groups, x, t["weight"], t["bias"])
        want = F.batch_norm(y, mean, var, t["bn_weight"], t["bn_bias"], False, 0.1, eps)
        weight, shift = fold_reference(*t.values(), eps, transposed=transposed, groups=groups)
        got = convolve(n, transposed, groups, x, weight, shift)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "n", "transposed", "groups"), KINDS)
def test_gradients(kind, n, transposed, groups):
    made, _ = tensors(n, transposed, groups, c_out=4)
    leaves = [t.requires_grad_(name not in ("running_mean", "running_var")) for name, t in made.items()]

    def f(*arguments):
        return fold_reference(*arguments, 1e-3, transposed=transposed, groups=groups)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bn_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_rounding(dtype, bn_dtype):
    """The arithmetic is in fp32 for all these dtypes, so it differs from fp64 by one rounding."""
    made, _ = tensors(2, False, 1, torch.float32)
    cast = {name: t.to(dtype if name in ("weight", "bias") else bn_dtype) for name, t in made.items()}
    exact = fold_reference(*[t.double() for t in cast.values()], 1e-5)
    for got, want in zip(fold_reference(*cast.values(), 1e-5), exact, strict=True):
        assert got.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
        else:  # correctly rounded, except ties that the error of fp32 decides: at most one element in a thousand
            assert (got != want.to(dtype)).double().mean() < 0.01


def test_rounds_to_dtype_and_gradients_keep_theirs():
    made, _ = tensors(2, False, 1, torch.float32)
    leaves = [t.requires_grad_() for t in made.values()]
    weight, bias = fold_reference(*leaves, 1e-5, dtype=torch.bfloat16)
    assert weight.dtype == bias.dtype == torch.bfloat16
    (weight.sum() + bias.sum()).backward()
    assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_keeps_channels_last(transposed, groups):
    made, _ = tensors(2, transposed, groups, torch.float32)
    made["weight"] = made["weight"].to(memory_format=torch.channels_last)
    weight, _ = fold_reference(*made.values(), 1e-5, transposed=transposed, groups=groups)
    assert weight.stride() == made["weight"].stride()


@pytest.mark.parametrize("name", ["weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
def test_unsupported_dtype_raises(name, dtype):
    made, _ = tensors(2, False, 1, torch.float32)
    made[name] = made[name].to(dtype)
    with pytest.raises(TypeError, match=f"{name.removeprefix('running_')} is {dtype}"):
        fold_reference(*made.values(), 1e-5)


def test_mismatched_shapes_raise():
    made, _ = tensors(2, False, 1, torch.float32)
    with pytest.raises(ValueError, match=r"mean has shape \(3,\); the convolution has 8 channels"):
        fold_reference(*(made | {"running_mean": torch.zeros(3)}).values(), 1e-5)
    with pytest.raises(ValueError, match="do not divide into 3 groups"):
        fold_reference(*made.values(), 1e-5, transposed=True, groups=3)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        fold_reference(*(made | {"weight": torch.zeros(8)}).values(), 1e-5)
    with pytest.raises(TypeError, match=r"cannot round to torch\.int8"):
        fold_reference(*made.values(), 1e-5, dtype=torch.int8)


MODULES = [
    (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    (nn.Conv1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6, affine=False), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding=2, stride=2, dilation=2), nn.SyncBatchNorm(6), (2, 4, 9, 8)),
    (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 5, 6, 7)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm1d(6), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), nn.BatchNorm2d(6), (2, 4, 5, 6)),
    (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6), (2, 4, 9, 8)),
]


@pytest.mark.parametrize(("conv", "bn", "shape"), MODULES, ids=lambda m: type(m).__name__)
def test_conv_bn_eval_on_modules(conv, bn, shape):
    scramble(nn.Sequential(conv, bn).eval(), 1e-3)
    x = torch.randn(*shape)
    got, want = conv_bn_eval(conv, bn, x), bn(conv(x))
    error = (got - want).abs().max() / want.abs().max()
    assert error < TOLERANCES[torch.float32]


def test_conv_bn_eval_errors():
    conv, bn, x = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="training mode"):
        conv_bn_eval(conv, nn.BatchNorm2d(4), x)
    with pytest.raises(ValueError, match="running statistics"):
        conv_bn_eval(conv, nn.BatchNorm2d(4, track_running_stats=False).eval(), x)
    with pytest.raises(ValueError, match="unbatched"):
        conv_bn_eval(conv, bn, x[0])
    with pytest.raises(ValueError, match="not 2-D"):
        conv_bn_eval(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), torch.randn(2, 4, 3))
    with pytest.raises(ValueError, match="expected 4D input"):  # in the BatchNorm's own words
        conv_bn_eval(nn.Conv1d(3, 4, 3), bn, torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match="different numbers of channels"):
        conv_bn_eval(nn.Conv2d(3, 5, 3), bn, x)
    for other, named in ((torch.float64, "float32, float64"), (torch.bfloat16, "bfloat16, float32")):
        with pytest.raises(ValueError, match=f"do not fold: {named}"):
            conv_bn_eval(conv, nn.BatchNorm2d(4).eval().to(other), x)
    with pytest.raises(TypeError, match="ReLU is no convolution"):
        conv_bn_eval(nn.ReLU(), bn, x)
    with pytest.raises(TypeError, match="ReLU is no BatchNorm"):
        conv_bn_eval(conv, nn.ReLU(), x)
    with pytest.raises(TypeError, match="BatchNorm2d is no convolution"):
        conv_bn_eval(bn, conv, x)
    with pytest.raises(ValueError, match="call both once"):
        conv_bn_eval(conv, nn.LazyBatchNorm2d().eval(), x)

    class Doubled(nn.BatchNorm2d):
        def __call__(self, x):
            return 2 * super().__call__(x)

    with pytest.raises(ValueError, match="forward of its own"):
        conv_bn_eval(conv, Doubled(4).eval(), x)
    conv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        conv_bn_eval(conv, bn, x)
