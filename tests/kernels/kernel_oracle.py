"""The fold in plain torch and fp64, what counts as equal to it, and random pairs to try it on."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton_convbn.kernels.inputs import FoldInputs
from triton_convbn.kernels.spec import Needs

# Error allowed, in ulps of the dtype that is written. fp32: five roundings (var + eps, sqrt, reciprocal, two products),
# at most 1.85 ulp in 40 million random values. bf16 would be 1/2, but the interpreter truncates.
ULPS = {torch.float32: 2.0, torch.float16: 1.0, torch.bfloat16: 1.0, torch.float64: 1.0}

MIXES = [
    # weight, conv bias, BatchNorm affine, statistics, output (None: the weight's)
    (torch.float32, torch.float32, torch.float32, torch.float32, None),
    (torch.float16, torch.float16, torch.float16, torch.float16, None),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16, None),
    (torch.float64, torch.float64, torch.float64, torch.float64, None),
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, None),
    (torch.float16, torch.float16, torch.float32, torch.float32, None),
    (torch.float32, torch.float32, torch.float32, torch.float32, torch.float16),
    (torch.float32, torch.float32, torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float64, torch.float32, torch.bfloat16),
    (torch.float16, torch.float16, torch.bfloat16, torch.float32, torch.float32),
]

KINDS = ("linear", "conv1d", "conv2d", "conv3d", "depthwise", "transposed1d", "transposed2d", "transposed3d")


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """eps * |x|, not less than the smallest subnormal; x in fp64."""
    info = torch.finfo(dtype)
    return info.eps * x.abs().clamp(min=info.tiny)


class Oracle(NamedTuple):
    weight: Tensor  # fp64, the weight's shape
    bias: Tensor  # fp64, [C_out]
    bias_terms: Tensor  # |(b - mean) * s| + |beta|, what the error of `bias` is relative to


def per_weight(channel_values: Tensor, inputs: FoldInputs) -> Tensor:
    """One number a channel, broadcast to the weight's shape."""
    shape = inputs.weight.shape
    taps = (1,) * (len(shape) - 2)
    if not inputs.transposed:
        return channel_values.view(-1, 1, *taps).expand(shape)
    rows, groups = shape[0], inputs.groups
    spread = channel_values.view(groups, 1, shape[1], *taps)
    return spread.expand(groups, rows // groups, *shape[1:]).reshape(shape)


def oracle(inputs: FoldInputs, power: Tensor | None = None) -> Oracle:
    """W' and b' in fp64, over q where that is given; differentiable if the inputs are fp64 and require gradients."""
    over = torch.ones_like(inputs.running_var) if power is None else power
    scale = torch.rsqrt(inputs.running_var.double() + inputs.eps) / over.double()
    if inputs.bn_weight is not None:
        scale = inputs.bn_weight.double() * scale
    centred = -inputs.running_mean.double()
    if inputs.bias is not None:
        centred = inputs.bias.double() + centred
    centred = centred * scale
    shift = torch.zeros_like(centred) if inputs.bn_bias is None else inputs.bn_bias.double() / over.double()
    return Oracle(inputs.weight.double() * per_weight(scale, inputs), centred + shift, centred.abs() + shift.abs())


def arithmetic(inputs: FoldInputs) -> torch.dtype:
    wide = torch.float64 in {inputs.out_dtype, *(t.dtype for t in inputs if isinstance(t, Tensor))}
    return torch.float64 if wide else torch.float32


def assert_headroom(inputs: FoldInputs, power: Tensor) -> None:
    """Powers of two of each channel, as small as they may be: |s / q| <= 1/2, |beta / q| <= 1024, between 2**-14 and
    2**15."""
    assert (power.dtype, power.shape) == (torch.float16, inputs.running_mean.shape)
    mantissa, exponent = torch.frexp(power.double())
    assert (mantissa == 0.5).all()
    q = power.double()
    scale = torch.rsqrt(inputs.running_var.double() + inputs.eps)
    scale = (scale if inputs.bn_weight is None else scale * inputs.bn_weight.double()).abs()
    beta = torch.zeros_like(scale) if inputs.bn_bias is None else inputs.bn_bias.double().abs()
    near = 1 + 1e-6  # of a power of two, where rounding decides
    assert ((exponent >= -13) & (exponent <= 16)).all()
    assert ((scale <= q / 2 * near) | (q == 2**15)).all()
    assert ((beta <= q * 1024 * near) | (q == 2**15)).all()
    assert ((scale * near > q / 4) | (beta * near > q * 512) | (q == 2**-14)).all()


def assert_folded(inputs: FoldInputs, out_weight: Tensor, out_bias: Tensor, out_power: Tensor | None = None) -> None:
    """W' within ULPS of the oracle; b' too, its ulps counted on the terms that cancel in it."""
    assert (out_power is not None) is inputs.prescale
    if out_power is not None:
        assert_headroom(inputs, out_power)
    want = oracle(inputs, out_power)
    dtype, compute = inputs.out_dtype or inputs.weight.dtype, arithmetic(inputs)
    assert out_weight.dtype is out_bias.dtype is dtype
    assert out_weight.shape == inputs.weight.shape
    for got, exact, slack in (
        (out_weight, want.weight, 0.0),
        (out_bias, want.bias, ULPS[compute] * ulp(want.bias_terms, compute)),
    ):
        error = (got.double() - exact).abs()
        allowed = ULPS[dtype] * ulp(exact, dtype) + slack
        # `not (<=)`, so that a NaN left from before the launch fails too.
        wrong = ~(error <= allowed)
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {wrong.numel()} off, first {wrong.nonzero()[0].tolist()}: {inputs}"
        )


SENTINEL = 7.0
BAND = 64


class Guarded(NamedTuple):
    """A tensor of NaNs in the middle of a buffer of sentinels."""

    tensor: Tensor
    buffer: Tensor

    def assert_untouched_around(self) -> None:
        before, after = self.buffer[:BAND], self.buffer[-BAND:]
        assert (before == SENTINEL).all()
        assert (after == SENTINEL).all()


def guarded(
    like: Tensor, dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None
) -> Guarded:
    shape = torch.empty_like(like, device="meta", memory_format=memory_format or torch.preserve_format)
    buffer = torch.full((like.numel() + 2 * BAND,), SENTINEL, dtype=dtype or like.dtype)
    inner = buffer[BAND : BAND + like.numel()]
    inner.fill_(math.nan)
    return Guarded(inner.as_strided(shape.shape, shape.stride(), BAND), buffer)


def pair(*shape: int, channels: int | None = None, dtype: torch.dtype = torch.float32, **more: Any) -> FoldInputs:
    """A pair with every parameter, for tests that look at shapes and memory more than at values."""
    generator = torch.Generator().manual_seed(sum(shape))
    n = shape[0] if channels is None else channels

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    base = FoldInputs(normal(*shape), normal(n), normal(n), normal(n), normal(n), normal(n).abs() + 0.1, 1e-5)
    return base._replace(**more)


def random_inputs(rng: random.Random, kind: str | None = None, largest: int = 40) -> FoldInputs:
    """A pair of any kind, dtype mix, layout and combination of optional parameters, from one seed."""
    kind = kind or rng.choice(KINDS)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    weight_dtype, bias_dtype, bn_dtype, stats_dtype, out_dtype = rng.choice(MIXES)
    transposed = kind.startswith("transposed")
    dims = int(kind[-2]) if kind[-1] == "d" else 2 if kind == "depthwise" else 0
    kernel = [rng.choice((1, 1, 2, 3, 3, 5)) for _ in range(dims)]
    groups = rng.choice((1, 1, 2, 3))
    rows, cols = rng.randint(1, largest), rng.randint(1, largest)
    if kind == "depthwise":
        cols = 1
    if transposed:
        rows *= groups
    channels = cols * groups if transposed else rows

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weight = normal(rows, cols, *kernel, dtype=weight_dtype)
    layouts: list[torch.memory_format | None] = [None, torch.preserve_format, torch.contiguous_format]
    if dims in (2, 3):
        last = torch.channels_last if dims == 2 else torch.channels_last_3d
        layouts.append(last)
        if rng.random() < 0.5:
            weight = weight.contiguous(memory_format=last)
    spread = torch.empty(channels, dtype=torch.float64).uniform_(-8, 8, generator=generator)
    return FoldInputs(
        weight=weight,
        bias=normal(channels, dtype=bias_dtype) if rng.random() < 0.5 else None,
        bn_weight=normal(channels, dtype=bn_dtype) if rng.random() < 0.8 else None,
        bn_bias=normal(channels, dtype=bn_dtype) if rng.random() < 0.8 else None,
        running_mean=normal(channels, dtype=stats_dtype),
        running_var=spread.exp().to(stats_dtype),
        eps=rng.choice((1e-3, 1e-5, 0.0)),
        transposed=transposed,
        groups=groups,
        out_dtype=out_dtype,
        memory_format=rng.choice(layouts),
        prescale=rng.random() < 0.3,
    )


def alike(inputs: FoldInputs, seed: int) -> FoldInputs:
    """Return a pair of the same spec with other values."""
    generator = torch.Generator().manual_seed(seed)
    changed: dict[str, Any] = {}
    for name in ("weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var"):
        t: Tensor | None = getattr(inputs, name)
        if t is not None:
            factors = torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5
            changed[name] = torch.empty_like(t).copy_(t.double() * factors)  # in the strides that it has
    return inputs._replace(**changed)


def random_power(rng: random.Random, inputs: FoldInputs) -> Tensor | None:
    """Powers of two that a fold with prescale may have written, none so small that gradients overflow."""
    if not inputs.prescale:
        return None
    return torch.tensor([2.0 ** rng.randint(-2, 15) for _ in inputs.running_mean], dtype=torch.float16)


def random_needs(rng: random.Random) -> Needs:
    return Needs(*(rng.random() < 0.7 for _ in range(4)))
