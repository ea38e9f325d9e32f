"""Launch the fold of a group of pairs: one launch, or several if the tuned configuration splits it.

    s = bn_weight * rsqrt(running_var + eps)     W' = weight * s     b' = (bias - running_mean) * s + bn_bias

Source: "Tune mode" of arXiv 2305.11624. With prescale, W' and b' are divided by powers of two q, [C_out], which are a
third output. The device code is templates/fold.py; this file checks, allocates and launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .codegen import KernelConfig, KernelSource, generate
from .config import split_launches
from .inputs import POWER_DTYPE, FoldInputs, device_of, is_channels_last, spec_of
from .launch import launch
from .spec import GradSpec, PairSpec
from .tuned import config_for

Folded = tuple[Tensor, ...]
"""(W', b') of one pair, or (W' / q, b' / q, q) with prescale."""

OUTPUTS = ("out_weight", "out_bias", "out_power")


def kernels_for(
    specs: tuple[PairSpec, ...] | tuple[GradSpec, ...], device: torch.device, config: KernelConfig | None = None
) -> list[tuple[slice, KernelSource]]:
    """Return the kernels of a call, forward or backward, each with the slice of pairs that it computes."""
    config = config or config_for(specs, device)
    return [(part, generate(specs[part], config)) for part in split_launches(specs, config)]


def _empty_outputs(inputs: FoldInputs) -> Folded:
    """Allocate the outputs of one pair. The weight's strides are kept unless `memory_format` is set."""
    weight = inputs.weight
    dtype = inputs.out_dtype or weight.dtype
    layout = inputs.memory_format or torch.preserve_format
    channels = weight.shape[1] * inputs.groups if inputs.transposed else weight.shape[0]
    outs = torch.empty_like(weight, dtype=dtype, memory_format=layout), weight.new_empty(channels, dtype=dtype)
    return (*outs, weight.new_empty(channels, dtype=POWER_DTYPE)) if inputs.prescale else outs


def _check_outputs(inputs: FoldInputs, pair: PairSpec, outs: Folded) -> None:
    """Raise ValueError unless shapes, dtypes, devices and layouts are right: the kernel writes through raw pointers."""
    dtype = inputs.out_dtype or inputs.weight.dtype
    out_weight, *vectors = outs
    if (
        out_weight.shape != inputs.weight.shape
        or [out.dtype for out in outs] != [dtype, dtype, *[POWER_DTYPE] * inputs.prescale]
        or {out.device for out in outs} != {inputs.weight.device}
        or is_channels_last(out_weight) is not pair.out_last
        or not all(vector.shape == (pair.channels,) and vector.is_contiguous() for vector in vectors)
    ):
        found = " and ".join(f"{tuple(out.shape)} {out.stride()} {out.dtype} on {out.device}" for out in outs)
        raise ValueError(f"outputs {found} do not fit {pair.describe()} on {inputs.weight.device}")


def _launch(
    group: Sequence[FoldInputs],
    pairs: tuple[PairSpec, ...],
    outs: Sequence[Folded],
    config: KernelConfig | None,
) -> None:
    device = device_of(group)
    values = []
    for inputs, out in zip(group, outs, strict=True):
        fields: dict[str, Any] = inputs._asdict()
        values.append(fields | dict(zip(OUTPUTS, out, strict=False)))
    for part, source in kernels_for(pairs, device, config):
        launch(source, values[part], device)


def launch_fold_into(group: Sequence[FoldInputs], outs: Sequence[Folded], config: KernelConfig | None = None) -> None:
    """Like `launch_fold`, but write to the given outputs, which must not overlap any input.

    Raises:
        ValueError: An output has another shape, dtype, device or layout than `launch_fold` would give it.
    """
    if not group:
        return
    pairs = tuple(map(spec_of, group))
    for inputs, pair, out in zip(group, pairs, outs, strict=True):
        _check_outputs(inputs, pair, out)
    _launch(group, pairs, outs, config)


def launch_fold(group: Sequence[FoldInputs], config: KernelConfig | None = None) -> list[Folded]:
    """Fold every pair of `group` on the tensors' device and its current stream.

    The arithmetic is in fp32, or in fp64 if any tensor is fp64, and is rounded once, at the end. For gradients see
    `launch_fold_backward`.

    Args:
        group: The pairs.
        config: The configuration of the kernels. None: what was tuned for the device, see `tuned.choose`.

    Returns:
        (W', b') for each pair: W' shaped like the weight, b' [C_out], both in `out_dtype`. For a pair with prescale
        (W' / q, b' / q, q), where q is [C_out] in POWER_DTYPE.

    Raises:
        Unsupported: The kernels cannot fold these tensors.
    """
    if not group:
        return []
    pairs = tuple(map(spec_of, group))  # may raise, so it precedes the allocation
    outs = [_empty_outputs(inputs) for inputs in group]
    _launch(group, pairs, outs, config)
    return outs
