"""Fold a BatchNorm into the weight and bias of the convolution (or Linear) that reads its output, in plain torch.

A BatchNorm in eval mode is an affine map per channel, and a convolution is linear in its input:

    s  = bn_weight * rsqrt(running_var + eps)     t = bn_bias - running_mean * s
    W' = W * s[input channel]                     b' = b + sum over input channels and kernel of (W * t)
    conv(bn(x), W, b) = conv(x, W', b')

This is exact if every output element sums over the whole kernel: the convolution does not pad with zeros, which the
BatchNorm would turn into t, and is not transposed. A second BatchNorm after the convolution folds in the same step, see
`reference`. No generated kernel computes this fold. Inductor generates its code from this function.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .fp16_range import power_of_two
from .reference import (
    FLOATING,
    arithmetic,
    fold_backward_reference,
    inverse_and_scale,
    per_channel,
    per_weight,
    scale_and_shift,
    scaled,
)

Norm = tuple[Tensor | None, Tensor | None, Tensor, Tensor, float]
"""A BatchNorm as bn_weight, bn_bias, running_mean, running_var and eps."""


def fold_input_norm(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    after: Norm | None = None,
    prescale: bool = True,
) -> tuple[Tensor, ...]:
    """Fold an eval-mode BatchNorm into the convolution after it, and another one before it. Differentiable.

    Args:
        weight: ``(C_out, C_in / groups, *kernel)``, or ``(C_out, C_in)`` for Linear.
        bias: ``(C_out,)`` or None.
        bn_weight, bn_bias: ``(C_in,)`` or None, the affine parameters.
        running_mean, running_var: ``(C_in,)``, the running statistics.
        eps: Added to the variance.
        groups: Groups of the convolution.
        dtype: The dtype of W' and b', ``weight.dtype`` if None.
        after: A BatchNorm of the convolution's output, with vectors of shape ``(C_out,)``, or None.
        prescale: Keep fp16 in range. False if the caller reads W' and b'.

    Returns:
        ``(W', b')``, shaped like ``weight`` and ``(C_out,)``, or ``(W' / q, b' / q, q)`` if they are fp16, see
        `_power`. The arithmetic is in fp32, or in fp64 if any tensor is fp64, and is rounded once.

    Raises:
        TypeError: An argument has a dtype that convolutions do not support.
        ValueError: The shapes do not match.

    Source: arXiv 2305.11624, section 3, for the layer after the BatchNorm.
    """
    norm = bn_weight, bn_bias, running_mean, running_var, eps
    tensors = (weight, bias, *norm[:4], *(after[:4] if after else ()))
    if has_torch_function(tensors):  # an fx.Proxy or a tensor subclass sees one call
        keywords: dict[str, Any] = {"groups": groups, "dtype": dtype, "after": after, "prescale": prescale}
        return handle_torch_function(fold_input_norm, tensors, weight, bias, *norm, **keywords)
    _check(weight, bias, norm, groups)
    dtype = dtype or weight.dtype
    folded, shift = inner, inner_shift = _folded(weight, bias, norm, groups, arithmetic(tensors))
    scale = None
    if after is not None:
        scale, shift = scale_and_shift(inner, inner_shift, *after)
        folded = scaled(inner, scale)
    if dtype != torch.float16 or not prescale:
        return folded.to(dtype), shift.to(dtype)
    power = _power(folded, shift, inner_shift, scale)
    inverse = power.to(shift.dtype).reciprocal()  # exact
    return scaled(folded, inverse, dtype=dtype), (shift * inverse).to(dtype), power


def fold_input_norm_backward(
    grad_weight: Tensor | None,
    grad_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    groups: int,
    after: Norm | None,
    power: Tensor | None,
) -> list[Tensor | None]:
    """Return the gradients of `fold_input_norm` as explicit formulas. For one BatchNorm:

        dW = dW' * s + db' * t     db = db'     d_bn_weight = (ds - dt * running_mean) * rsqrt(running_var + eps)
        ds = sum over outputs and kernel of (dW' * W)     d_bn_bias = dt = sum over outputs and kernel of (db' * W)

    Args:
        grad_weight, grad_bias: dW' and db'. dW' may be None.
        weight, ..., after: As in `fold_input_norm`. norm: The BatchNorm of the input.
        power: The q that the fold returned, or None.

    Returns:
        The gradients of weight, bias, the two parameters of `norm`, and those of `after`, each like its parameter. None
        without such a parameter, and for those that need dW' if it is None. Differentiable.
    """
    wide = arithmetic((weight, bias, *norm[:4], *(after[:4] if after else ())))
    own: Tensor | None = None if grad_weight is None else grad_weight.to(wide)
    shift = grad_bias.to(wide)
    if power is not None:  # the gradients are of W' / q and b' / q
        shift = shift / power.to(wide)
        own = None if own is None else own / per_weight(power.to(wide), weight)
    of_after: list[Tensor | None] = [None, None]
    if after is not None:
        inner, inner_shift = _folded(weight, bias, norm, groups, wide)
        own, shift, *of_after = fold_backward_reference(own, shift, inner, inner_shift, *after)  # type: ignore[assignment]
    bn_weight, bn_bias, running_mean, *_ = norm
    inverse, s, t = _scale_and_shift(norm, wide)
    d_shift = per_channel(weight.to(wide) * per_weight(shift, weight), True, groups)
    dw = d_bn_weight = None
    if own is not None:
        dw = own * per_weight(s, weight, True, groups) + per_weight(shift, weight) * per_weight(t, weight, True, groups)
        d_scale = per_channel(own * weight.to(wide), True, groups) - d_shift * running_mean.to(wide)
        d_bn_weight = d_scale * inverse
    found = dw, shift, d_bn_weight, d_shift, *of_after
    parameters = weight, bias, bn_weight, bn_bias, *(after[:2] if after else (None, None))
    return [
        None if gradient is None or parameter is None else gradient.to(parameter.dtype)
        for gradient, parameter in zip(found, parameters, strict=True)
    ]


def _folded(weight: Tensor, bias: Tensor | None, norm: Norm, groups: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return W' and b' with the BatchNorm of the input alone, not rounded."""
    _, scale, shift = _scale_and_shift(norm, wide)
    own = weight.to(wide)
    products = own * per_weight(shift, weight, True, groups)
    # By sum, not flatten: legacy vmap, under batched gradients, has no rule for flatten.
    total = products.sum(tuple(range(1, products.ndim)))
    return own * per_weight(scale, weight, True, groups), total if bias is None else bias.to(wide) + total


def _scale_and_shift(norm: Norm, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``rsqrt(running_var + eps)`` and the s and t of a BatchNorm, ``bn(x) = x * s + t``. All are (C_in,)."""
    bn_weight, bn_bias, running_mean, running_var, eps = norm
    inverse, scale = inverse_and_scale(bn_weight, running_var, eps, wide)
    shift = -running_mean.to(wide) * scale
    return inverse, scale, shift if bn_bias is None else bn_bias.to(wide) + shift


def _power(folded: Tensor, shift: Tensor, inner_shift: Tensor, scale: Tensor | None) -> Tensor:
    """Return powers of two q, one per output channel, that keep an fp16 fold in range: ``conv(x, W' / q, b' / q) * q``.

    The unfolded convolution's output y is in range. ``conv(x, W')`` is y without its bias, so it may be out of range by
    the bias: q is the smallest power of two, at least 2, with ``|b' / q| <= 1024`` and ``|W' / q| <= 2**14``. If a
    BatchNorm follows, with scale `scale`, the same holds for y times the scale: 2 becomes ``2 * |scale|``.

    Returns:
        (C_out,), fp16, without a gradient.
    """
    with torch.no_grad():
        least = torch.full_like(shift, 2.0) if scale is None else 2 * scale.abs()
        biases = shift.abs() if scale is None else torch.maximum(shift.abs(), (scale * inner_shift).abs())
        largest = folded.abs().amax(tuple(range(1, folded.ndim)))
        return power_of_two(torch.maximum(torch.maximum(least, biases / 1024), largest / 2**14))


def _check(weight: Tensor, bias: Tensor | None, norm: Norm, groups: int) -> None:
    vectors = dict(zip(("bn_weight", "bn_bias", "running_mean", "running_var"), norm[:4], strict=True))
    for name, tensor in {"weight": weight, "bias": bias, **vectors}.items():
        if isinstance(tensor, Tensor) and tensor.dtype not in FLOATING:
            raise TypeError(f"fold: {name} is {tensor.dtype}; only {', '.join(map(str, FLOATING))} fold")
    channels = weight.shape[1] * groups
    for name, vector in vectors.items():
        if isinstance(vector, Tensor) and tuple(vector.shape) != (channels,):
            raise ValueError(f"fold: {name} has shape {tuple(vector.shape)}; the layer reads {channels} channels")
