"""Fold one pair in plain torch, including prescale. This is what the operators run if no kernel can."""

import torch
from torch import Tensor

from ..kernels.inputs import FoldInputs
from . import fp16_range, reference

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def fold_fallback(pair: FoldInputs) -> tuple[Tensor, ...]:
    """Return ``(W', b')``, or ``(W' / q, b' / q, q)`` with prescale, as `reference` computes them. Differentiable."""
    if not pair.prescale:
        return _fold(pair)
    power = fp16_range.prescale(pair.bn_weight, pair.bn_bias, pair.running_var, pair.eps)
    return (*_fold(_divided(pair, power)), power)


def fold_backward_fallback(
    pair: FoldInputs, grad_weight: Tensor | None, grad_bias: Tensor | None, power: Tensor | None
) -> Gradients:
    """Return the gradients of weight, bias, bn_weight and bn_bias. Differentiable.

    Args:
        pair: The pair.
        grad_weight, grad_bias: dW' and db', or None.
        power: The q that the fold returned, None without prescale.
    """
    divided = pair if power is None else _divided(pair, power)
    dw, db, d_bn_weight, d_bn_bias = reference.fold_backward_reference(
        grad_weight, grad_bias, *divided[:7], transposed=pair.transposed, groups=pair.groups
    )
    if power is None:
        return dw, db, d_bn_weight, d_bn_bias
    return dw, db, _over(d_bn_weight, power, pair.bn_weight), _over(d_bn_bias, power, pair.bn_bias)


def _fold(pair: FoldInputs) -> tuple[Tensor, Tensor]:
    transposed = {"transposed": True, "groups": pair.groups} if pair.transposed else {}
    weight, bias = reference.fold_reference(*pair[:7], dtype=pair.out_dtype, **transposed)
    return weight.to(memory_format=pair.memory_format or torch.preserve_format), bias


def _divided(pair: FoldInputs, power: Tensor) -> FoldInputs:
    """Return the pair with affine parameters divided by q. Its fold is that of the pair, divided by q."""
    bn_bias = None if pair.bn_bias is None else fp16_range.divided(pair.bn_bias, power)
    return pair._replace(bn_weight=fp16_range.divided(pair.bn_weight, power), bn_bias=bn_bias)


def _over(gradient: Tensor | None, power: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Return the gradient of a parameter, given that of the parameter divided by q."""
    return None if gradient is None or parameter is None else (gradient / power.to(gradient.dtype)).to(parameter.dtype)
