"""Keep folds in fp16's range: divide them by powers of two, and multiply the convolution's output by these."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def prescale(bn_weight: Tensor | None, bn_bias: Tensor | None, running_var: Tensor, eps: float) -> Tensor:
    """Return powers of two q, one for each channel, that keep an fp16 fold in range: ``conv(x, W' / q, b' / q) * q``.

    q is the smallest power of two with ``|s / q| <= 1/2`` and ``|bn_bias / q| <= 1024``.

    ``W * s`` can overflow fp16 although ``W``, ``conv(x, W)`` and the BatchNorm's output do not: the largest fp16
    number is 65,504, and a variance of 1e-8 gives a scale of 1e4. Divided by q the scale is at most 1/2, so the
    convolution's output is at most half of the unfolded one, and the term of the mean fits in the other half. Dividing
    by a power of two does not round. A small scale has a small q, so the quotient does not become subnormal either.

    Args:
        bn_weight, bn_bias: (C_out,) or None, of any floating dtype.
        running_var: (C_out,), of any floating dtype.
        eps: Added to the variance.

    Returns:
        (C_out,), fp16, between 2**-14 and 2**15, without a gradient.
    """
    tensors = (bn_weight, bn_bias, running_var)
    if has_torch_function(tensors):
        return handle_torch_function(prescale, tensors, *tensors, eps)
    scale = torch.rsqrt(running_var.detach().float() + eps)
    if bn_weight is not None:
        scale = bn_weight.detach().float().abs() * scale
    least = 2 * scale
    if bn_bias is not None:  # bn_bias / q must stay in range as well
        least = torch.maximum(least, bn_bias.detach().float().abs() / 1024)
    return power_of_two(least)


def power_of_two(least: Tensor) -> Tensor:
    """Return the smallest powers of two that are at least these numbers, in fp16, between 2**-14 and 2**15."""
    return torch.exp2(torch.log2(least.clamp(2**-14, 2**15)).ceil()).half()


def divided(vector: Tensor | None, q: Tensor) -> Tensor:
    """Return an affine parameter divided by q, in fp32 or wider. None stands for a weight of ones. All are (C_out,)."""
    if has_torch_function((vector, q)):
        return handle_torch_function(divided, (vector, q), vector, q)
    wide = torch.float32 if vector is None else torch.promote_types(vector.dtype, torch.float32)
    return q.to(wide).reciprocal() if vector is None else vector.to(wide) / q.to(wide)


def scaled_back(output: Tensor, q: Tensor, linear: bool = False) -> Tensor:
    """Return ``output * q`` in the output's dtype. q is (C_out,).

    The output is ``(N, C_out, *spatial)``, or ``(*, C_out)`` if `linear`.
    """
    if has_torch_function((output, q)):
        return handle_torch_function(scaled_back, (output, q), output, q, linear=linear)
    return output * q.to(output.dtype).reshape(-1, *(1,) * (0 if linear else output.ndim - 2))
