"""The fold of one pair in plain torch, with its prescale: what runs where no kernel does."""

import torch
from torch import Tensor

from ..kernels.inputs import FoldInputs
from . import reference

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def fold_fallback(pair: FoldInputs) -> tuple[Tensor, ...]:
    """``(W', b')``; with prescale ``(W' / q, b' / q, q)``. Shapes and dtypes are those of `algebra`. Differentiable."""
    if not pair.prescale:
        return _fold(pair)
    power = reference.prescale(pair.bn_weight, pair.bn_bias, pair.running_var, pair.eps)
    return (*_fold(_over(pair, power)), power)


def fold_backward_fallback(
    pair: FoldInputs, grad_weight: Tensor | None, grad_bias: Tensor | None, power: Tensor | None
) -> Gradients:
    """The gradients of weight, bias, bn_weight and bn_bias, as `reference.fold_backward_reference` has them. Differentiable.

    Args: the pair; dW' and db', None where no gradient arrived; the q that the fold of a pair with prescale returned.
    """
    over = pair if power is None else _over(pair, power)
    dw, db, d_bn_weight, d_bn_bias = reference.fold_backward_reference(
        grad_weight, grad_bias, *over[:7], transposed=pair.transposed, groups=pair.groups
    )
    if power is None:
        return dw, db, d_bn_weight, d_bn_bias
    return dw, db, _of_undivided(d_bn_weight, pair.bn_weight, power), _of_undivided(d_bn_bias, pair.bn_bias, power)


def _fold(pair: FoldInputs) -> tuple[Tensor, Tensor]:
    transposed = {"transposed": True, "groups": pair.groups} if pair.transposed else {}
    weight, bias = reference.fold_reference(*pair[:7], dtype=pair.out_dtype, **transposed)
    return weight.to(memory_format=pair.memory_format or torch.preserve_format), bias


def _over(pair: FoldInputs, power: Tensor) -> FoldInputs:
    """The pair whose fold is over q: an affine map over q is that of affine parameters over q."""
    bn_bias = None if pair.bn_bias is None else reference.divided(pair.bn_bias, power)
    return pair._replace(bn_weight=reference.divided(pair.bn_weight, power), bn_bias=bn_bias)


def _of_undivided(gradient: Tensor | None, parameter: Tensor | None, power: Tensor) -> Tensor | None:
    """The gradient of a parameter from that of the parameter over q."""
    return None if gradient is None or parameter is None else (gradient / power.to(gradient.dtype)).to(parameter.dtype)
