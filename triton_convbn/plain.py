"""The fold of one pair in plain torch, with its headroom: what runs where no kernel does."""

import torch
from torch import Tensor

from . import algebra
from .kernels.inputs import FoldInputs

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def fold(pair: FoldInputs) -> tuple[Tensor, ...]:
    """``(W', b')``; with headroom ``(W' / q, b' / q, q)``. Shapes and dtypes are those of `algebra`. Differentiable."""
    if not pair.headroom:
        return _fold(pair)
    power = algebra.headroom(pair.bn_weight, pair.bn_bias, pair.running_var, pair.eps)
    return (*_fold(_over(pair, power)), power)


def fold_backward(
    pair: FoldInputs, grad_weight: Tensor | None, grad_bias: Tensor | None, power: Tensor | None
) -> Gradients:
    """The gradients of weight, bias, bn_weight and bn_bias, as `algebra.fold_backward` has them. Differentiable.

    Args: the pair; dW' and db', None where no gradient arrived; the q that the fold of a pair with headroom returned.
    """
    over = pair if power is None else _over(pair, power)
    dw, db, d_bn_weight, d_bn_bias = algebra.fold_backward(
        grad_weight, grad_bias, *over[:7], transposed=pair.transposed, groups=pair.groups
    )
    if power is None:
        return dw, db, d_bn_weight, d_bn_bias
    return dw, db, _of_undivided(d_bn_weight, pair.bn_weight, power), _of_undivided(d_bn_bias, pair.bn_bias, power)


def _fold(pair: FoldInputs) -> tuple[Tensor, Tensor]:
    transposed = {"transposed": True, "groups": pair.groups} if pair.transposed else {}
    weight, bias = algebra.fold(*pair[:7], dtype=pair.out_dtype, **transposed)
    return weight.to(memory_format=pair.memory_format or torch.preserve_format), bias


def _over(pair: FoldInputs, power: Tensor) -> FoldInputs:
    """The pair whose fold is over q: an affine map over q is that of affine parameters over q."""
    bn_bias = None if pair.bn_bias is None else algebra.divided(pair.bn_bias, power)
    return pair._replace(bn_weight=algebra.divided(pair.bn_weight, power), bn_bias=bn_bias)


def _of_undivided(gradient: Tensor | None, parameter: Tensor | None, power: Tensor) -> Tensor | None:
    """The gradient of a parameter from that of the parameter over q."""
    return None if gradient is None or parameter is None else (gradient / power.to(gradient.dtype)).to(parameter.dtype)
