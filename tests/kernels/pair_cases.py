"""Random pairs for the kernel tests, and assertions on folded pairs."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from triton_convbn.kernels.inputs import FoldInputs
from triton_convbn.kernels.spec import Needs
from triton_convbn.kernels.testing import exact_fold, out_of_bounds, wrong_powers

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


def assert_folded(inputs: FoldInputs, out_weight: Tensor, out_bias: Tensor, out_power: Tensor | None = None) -> None:
    """Assert that W', b' and the powers of two are right, and W' and b' have the output dtype and shape."""
    assert (out_power is not None) is inputs.prescale
    if out_power is not None:
        assert_powers(inputs, out_power)
    assert out_weight.dtype is out_bias.dtype is (inputs.out_dtype or inputs.weight.dtype)
    assert out_weight.shape == inputs.weight.shape
    for got, exact in zip((out_weight, out_bias), exact_fold(inputs, out_power), strict=True):
        wrong = out_of_bounds(got, exact)
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {wrong.numel()} off, first {wrong.nonzero()[0].tolist()}: {inputs}"
        )


def assert_powers(inputs: FoldInputs, power: Tensor) -> None:
    """Assert that the powers of two of a fold with prescale are in fp16, one a channel, and the smallest that fit."""
    assert (power.dtype, power.shape) == (torch.float16, inputs.running_mean.shape)
    assert not wrong_powers(inputs, power).any()


def pair(*shape: int, channels: int | None = None, dtype: torch.dtype = torch.float32, **more: Any) -> FoldInputs:
    """Return a pair with every parameter, for tests of shapes and memory rather than values."""
    generator = torch.Generator().manual_seed(sum(shape))
    n = shape[0] if channels is None else channels

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    base = FoldInputs(normal(*shape), normal(n), normal(n), normal(n), normal(n), normal(n).abs() + 0.1, 1e-5)
    return base._replace(**more)


def random_inputs(rng: random.Random, kind: str | None = None, largest: int = 40) -> FoldInputs:
    """Return a pair of any kind, dtype mix, layout and combination of optional parameters."""
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
    """Return powers of two that a fold with prescale may have written, none so small that gradients overflow."""
    if not inputs.prescale:
        return None
    return torch.tensor([2.0 ** rng.randint(-2, 15) for _ in inputs.running_mean], dtype=torch.float16)


def random_needs(rng: random.Random) -> Needs:
    """Return which gradients are needed, each with probability 0.7."""
    return Needs(*(rng.random() < 0.7 for _ in range(4)))
