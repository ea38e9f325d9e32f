"""The forward fold of a group of pairs, in one launch or in as many as were found to be faster.

    s = bn_weight * rsqrt(running_var + eps)     W' = weight * s     b' = (bias - running_mean) * s + bn_bias

("Tune mode", arXiv 2305.11624). With prescale W' and b' are over powers of two q, [C_out], which are a third output.
The device code is templates/fold.py; this file checks, allocates and launches.
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
"""(W', b') of one pair; with prescale (W' / q, b' / q, q)."""

OUTPUTS = ("out_weight", "out_bias", "out_power")


def kernels_for(
    specs: tuple[PairSpec, ...] | tuple[GradSpec, ...], device: torch.device, config: KernelConfig | None = None
) -> list[tuple[slice, KernelSource]]:
    """Return the kernels of a call, forward or backward, and which of its pairs each serves."""
    config = config or config_for(specs, device)
    return [(part, generate(specs[part], config)) for part in split_launches(specs, config)]


def _empty_outputs(inputs: FoldInputs) -> Folded:
    """What a fold writes, not yet written: the weight's strides are kept unless a layout was asked for."""
    weight = inputs.weight
    dtype = inputs.out_dtype or weight.dtype
    layout = inputs.memory_format or torch.preserve_format
    channels = weight.shape[1] * inputs.groups if inputs.transposed else weight.shape[0]
    outs = torch.empty_like(weight, dtype=dtype, memory_format=layout), weight.new_empty(channels, dtype=dtype)
    return (*outs, weight.new_empty(channels, dtype=POWER_DTYPE)) if inputs.prescale else outs


def _check_outputs(inputs: FoldInputs, pair: PairSpec, outs: Folded) -> None:
    """Outputs the kernel may write through raw pointers: right shape, dtype, device and layout."""
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
    """Like `launch_fold`, into tensors that are given for each pair, which must not overlap any input.

    Raises ValueError if an output has another shape, dtype, device or layout than `launch_fold` would give it.
    """
    if not group:
        return
    pairs = tuple(map(spec_of, group))
    for inputs, pair, out in zip(group, pairs, outs, strict=True):
        _check_outputs(inputs, pair, out)
    _launch(group, pairs, outs, config)


def launch_fold(group: Sequence[FoldInputs], config: KernelConfig | None = None) -> list[Folded]:
    """Fold every pair of `group` on the tensors' device and its current stream.

    Returns (W', b') a pair: W' of the weight's shape, b' of shape [C_out], both of `out_dtype` (default: the weight's);
    of a pair with prescale (W' / q, b' / q, q), q of shape [C_out] and POWER_DTYPE.
    Arithmetic is fp32, or fp64 where anything is fp64, rounded once at the end. `launch_fold_backward` has the gradients.
    config: how the kernels are made; None for what was tuned for the device, see `tuned.choose`.
    Raises Unsupported (a ValueError) for tensors that the kernel does not take.
    """
    if not group:
        return []
    pairs = tuple(map(spec_of, group))  # before allocating: what is unsupported has no outputs
    outs = [_empty_outputs(inputs) for inputs in group]
    _launch(group, pairs, outs, config)
    return outs
