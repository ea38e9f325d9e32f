"""Turn the tensors of a pair into a spec, or say why the kernels cannot fold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import POWER, GradSpec, Needs, PairSpec

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
"""The dtypes that a fold accepts, with Triton's names for them."""

OUTPUTS = ("out_weight", "out_bias", "out_power")
"""The fields of the outputs of a fold. The last one is that of pairs with prescale."""

POWER_DTYPE = next(dtype for dtype, name in DTYPES.items() if name == POWER)


class Unsupported(ValueError):
    """The kernels cannot fold these tensors; the message says why. Plain torch can."""


class FoldInputs(NamedTuple):
    """A convolution (transposed or not) or linear layer, and the eval-mode BatchNorm after it.

    This is one row of `PackedPairs`, which holds a group of pairs as the operators take them. The first six fields are
    tensors, graph nodes or positions, depending on what the group was packed from.

    Attributes:
        weight: [C_out, C_in / groups, *kernel]; [C_out, C_in] if linear; [C_in, C_out / groups, *kernel] if transposed.
        bias, bn_weight, bn_bias: [C_out], or None.
        running_mean, running_var: [C_out].
        eps: Added to the variance.
        transposed: The convolution is transposed.
        groups: Groups of a transposed convolution. Ignored for others.
        out_dtype: Dtype of the folded weight and bias. None: the weight's dtype.
        memory_format: Layout of the folded weight. None: the weight's strides.
        prescale: Divide the folded weight and bias by powers of two q, [C_out], so that they fit fp16. The output is
            then ``conv(x, W' / q, b' / q) * q``. `ops.fp16_range.prescale` chooses q.
    """

    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    eps: float
    transposed: bool = False
    groups: int = 1
    out_dtype: torch.dtype | None = None
    memory_format: torch.memory_format | None = None
    prescale: bool = False


def is_channels_last(t: Tensor) -> bool | None:
    """Return False if `t` is contiguous, True if it is channels_last and not contiguous, None if it is neither."""
    if t.is_contiguous():
        return False
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return True
    if t.dim() == 5 and t.is_contiguous(memory_format=torch.channels_last_3d):
        return True
    return None


def _channels_last_requested(inputs: FoldInputs) -> bool | str:
    """Return whether the folded weight is channels_last. A string is the reason why it cannot be."""
    wanted, dims = inputs.memory_format, inputs.weight.dim()
    if wanted is None or wanted is torch.preserve_format:
        return bool(is_channels_last(inputs.weight))
    if wanted is torch.contiguous_format:
        return False
    if dims != (4 if wanted is torch.channels_last else 5):
        return f"{wanted} requested for a {dims}-D weight"
    return True


def unsupported_reason(inputs: FoldInputs) -> str | None:
    """Return why the kernels cannot fold this pair, or None if they can. Reads metadata only, never values."""
    weight = inputs.weight
    if weight.dim() < 2:
        return f"weight of {weight.dim()} dimensions"
    if inputs.transposed and (inputs.groups < 1 or weight.shape[0] % inputs.groups):
        return f"{weight.shape[0]} input channels in {inputs.groups} groups"
    channels = weight.shape[1] * inputs.groups if inputs.transposed else weight.shape[0]
    for name in ("weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var"):
        t: Tensor | None = getattr(inputs, name)
        if t is None:
            continue
        if t.layout is not torch.strided or t.is_neg():
            return f"{name} is not an ordinary dense tensor"
        if t.dtype not in DTYPES:
            return f"{name} is {t.dtype}"
        if t.device != weight.device:
            return f"{name} is on {t.device}, weight on {weight.device}"
        if name != "weight" and t.shape != (channels,):
            return f"{name} has shape {tuple(t.shape)}, expected ({channels},)"
        if name != "weight" and not t.is_contiguous():
            return f"{name} is not contiguous"
    if (reason := layout_obstacle(weight)) is not None:
        return reason
    if inputs.out_dtype is not None and inputs.out_dtype not in DTYPES:
        return f"output dtype is {inputs.out_dtype}"
    if not math.isfinite(inputs.eps):
        return f"eps is {inputs.eps}"
    requested = _channels_last_requested(inputs)
    return requested if isinstance(requested, str) else None


def spec_of(inputs: FoldInputs) -> PairSpec:
    """Return the spec of one pair.

    Raises:
        Unsupported: The kernels cannot fold it; the message is `unsupported_reason`.
    """
    reason = unsupported_reason(inputs)
    if reason is not None:
        raise Unsupported(reason)
    weight = inputs.weight
    rows, cols, taps = weight.shape[0], weight.shape[1], math.prod(weight.shape[2:])
    one_layout = taps == 1 or cols == 1  # contiguous and channels_last are the same order in memory

    def name(t: Tensor | None) -> str | None:
        return None if t is None else DTYPES[t.dtype]

    return PairSpec(
        rows=rows,
        cols=cols,
        taps=taps,
        weight=DTYPES[weight.dtype],
        out=DTYPES[inputs.out_dtype or weight.dtype],
        running_mean=DTYPES[inputs.running_mean.dtype],
        running_var=DTYPES[inputs.running_var.dtype],
        bias=name(inputs.bias),
        bn_weight=name(inputs.bn_weight),
        bn_bias=name(inputs.bn_bias),
        transposed=inputs.transposed,
        groups=inputs.groups if inputs.transposed else 1,
        weight_last=not one_layout and bool(is_channels_last(weight)),
        out_last=not one_layout and bool(_channels_last_requested(inputs)),
        prescale=inputs.prescale,
        eps=float(inputs.eps),
    )


def device_of(group: Sequence[FoldInputs]) -> torch.device:
    """Return the device of a group that is not empty. Raise Unsupported if there are several."""
    devices = {inputs.weight.device for inputs in group}
    if len(devices) > 1:
        raise Unsupported(f"a group on several devices: {', '.join(sorted(map(str, devices)))}")
    return devices.pop()


def grad_spec_of(inputs: FoldInputs, grad_weight: Tensor | None, grad_bias: Tensor | None, needs: Needs) -> GradSpec:
    """Return the spec of one pair's backward.

    The spec drops from `needs` the parameters that are None and those that no gradient reaches.

    Raises:
        Unsupported: The pair is not supported, or a gradient is not dense or does not fit the fold's outputs.
    """
    pair = spec_of(inputs)
    last = False
    if grad_weight is not None:
        layout = is_channels_last(grad_weight)
        if grad_weight.shape != inputs.weight.shape or layout is None or grad_weight.dtype not in DTYPES:
            raise Unsupported(
                f"weight gradient {tuple(grad_weight.shape)} with strides {grad_weight.stride()}, {grad_weight.dtype}"
            )
        last = layout and pair.taps > 1 and pair.cols > 1
    if grad_bias is not None and (
        grad_bias.shape[-1:] != (pair.channels,)
        or grad_bias.ndim > 2
        or not grad_bias.is_contiguous()
        or grad_bias.dtype not in DTYPES
    ):
        raise Unsupported(
            f"bias gradient of shape {tuple(grad_bias.shape)}, strides {grad_bias.stride()}, {grad_bias.dtype}"
        )
    reached = grad_weight is not None or grad_bias is not None
    return GradSpec(
        pair=pair,
        grad_weight=None if grad_weight is None else DTYPES[grad_weight.dtype],
        grad_bias=None if grad_bias is None else DTYPES[grad_bias.dtype],
        grad_last=last,
        bias_rows=grad_bias.shape[0] if grad_bias is not None and grad_bias.ndim == 2 else 1,
        needs=Needs(
            weight=needs.weight and grad_weight is not None,
            bias=needs.bias and grad_bias is not None and pair.bias is not None,
            bn_weight=needs.bn_weight and reached and pair.bn_weight is not None,
            bn_bias=needs.bn_bias and grad_bias is not None and pair.bn_bias is not None,
        ),
    )


def layout_obstacle(weight: Tensor) -> str | None:
    """Return why no kernel reads a weight of these strides, or None."""
    if is_channels_last(weight) is not None:
        return None
    return f"weight of shape {tuple(weight.shape)} has strides {weight.stride()}: neither contiguous nor channels_last"


def check_power(inputs: FoldInputs, power: Tensor | None) -> None:
    """Raise ValueError unless `power` can be the q of this pair: a tensor with prescale, None without."""
    mean = inputs.running_mean
    if not inputs.prescale and power is None:
        return
    if (
        power is None
        or not inputs.prescale
        or (power.shape, power.dtype, power.device) != (mean.shape, POWER_DTYPE, mean.device)
        or not power.is_contiguous()
    ):
        raise ValueError(
            "a pair with prescale needs the powers of two that its fold returned, any other pair needs None"
        )
