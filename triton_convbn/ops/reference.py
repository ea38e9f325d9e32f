"""The fold in plain torch: the CPU path, and the reference for tests of graphs.

A BatchNorm in eval mode is an affine map per channel, so ``bn(conv(x))`` is one convolution with other weights
("Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624, section 3):

    s  = bn_weight * rsqrt(running_var + eps)
    W' = W * s            b' = (b - running_mean) * s + bn_bias
    bn(conv(x, W, b)) = conv(x, W', b')

Every operation here is differentiable, so gradients reach W, b, bn_weight and bn_bias.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that convolutions and BatchNorms support, and so the only ones that fold."""


def fold_reference(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    transposed: bool = False,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Fold in plain torch. Takes, returns and raises what `triton_convbn.fold` does.

    dtype: Under autocast, the autocast dtype.
    """
    tensors = (weight, bias, bn_weight, bn_bias, running_mean, running_var)
    if has_torch_function(tensors):  # an fx.Proxy or a tensor subclass sees one call
        return handle_torch_function(
            fold_reference, tensors, *tensors, eps, transposed=transposed, groups=groups, dtype=dtype
        )
    scale, shift = scale_and_shift(*tensors, eps, transposed=transposed, groups=groups, dtype=dtype)
    return scaled(weight, scale, transposed=transposed, groups=groups, dtype=dtype), shift


def compose(
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    next_weight: Tensor | None,
    next_bias: Tensor | None,
    next_mean: Tensor,
    next_var: Tensor,
    next_eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the affine parameters of one BatchNorm that is equal to an eval-mode BatchNorm and the next one.

        s      = next_weight * rsqrt(next_var + next_eps)
        weight = bn_weight * s
        bias   = (bn_bias - next_mean) * s + next_bias

    It has the statistics and the eps of the first.

    Args:
        bn_weight, bn_bias: ``(C,)`` or None, of the first.
        next_weight, next_bias: ``(C,)`` or None, of the next one.
        next_mean, next_var: ``(C,)``, the statistics of the next one.
        next_eps: Added to the variance.

    Returns:
        ``(weight, bias)``, each ``(C,)``, not rounded: fp32, or fp64 if any argument is fp64. Differentiable.
    """
    tensors = (bn_weight, bn_bias, next_weight, next_bias, next_mean, next_var)
    if has_torch_function(tensors):
        return handle_torch_function(compose, tensors, *tensors, next_eps)
    wide = arithmetic(tensors)
    scale, shift = _affine(bn_bias, next_weight, next_bias, next_mean, next_var, next_eps, wide)
    return scale if bn_weight is None else bn_weight.to(wide) * scale, shift


def scale_and_shift(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    transposed: bool = False,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``s``, in the dtype of the arithmetic, and ``b'``, rounded. Arguments as in `triton_convbn.fold`."""
    vectors = {"bias": bias, "bn_weight": bn_weight, "bn_bias": bn_bias}
    vectors |= {"running_mean": running_mean, "running_var": running_var}
    _check(weight, vectors, transposed, groups, dtype)
    wide = arithmetic((weight, *vectors.values()))
    scale, shift = _affine(bias, bn_weight, bn_bias, running_mean, running_var, eps, wide)
    return scale, shift.to(weight.dtype if dtype is None else dtype)


def _affine(
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    wide: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return ``s`` and ``(bias - mean) * s + bn_bias``, not rounded. The BatchNorm's input has `bias` added to it."""
    _, scale = inverse_and_scale(bn_weight, var, eps, wide)
    shift = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
    shift = shift * scale
    return scale, shift if bn_bias is None else shift + bn_bias.to(wide)


def inverse_and_scale(
    bn_weight: Tensor | None, running_var: Tensor, eps: float, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``rsqrt(running_var + eps)`` and ``s``, its product with bn_weight, (C,) each and not rounded."""
    inverse = torch.rsqrt(running_var.to(wide) + eps)
    return inverse, inverse if bn_weight is None else bn_weight.to(wide) * inverse


def arithmetic(tensors: "Iterable[Tensor | None]") -> torch.dtype:
    """Return the dtype to compute in: fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors if t is not None] else torch.float32


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)`` without the 0.5 us that it takes to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def scaled(
    weight: Tensor, scale: Tensor, *, transposed: bool = False, groups: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """Return ``W' = W * s``, rounded once. scale is (C_out,), in the dtype of the arithmetic."""
    # The weight is the first factor, so that the product has its strides.
    product = weight.to(scale.dtype) * per_weight(scale, weight, transposed, groups)
    return product.to(weight.dtype if dtype is None else dtype)


def fold_backward_reference(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `fold_reference` as explicit formulas, for the operator:

        dW = dW' * s     db = db' * s     d_bn_bias = db'     d_bn_weight = ds * rsqrt(running_var + eps)
        ds = sum over the channel of (dW' * W) + db' * (b - running_mean)

    Args:
        grad_weight, grad_bias: dW' and db', or None.
        weight, ..., groups: As in `triton_convbn.fold`.

    Returns:
        ``(dW, db, d_bn_weight, d_bn_bias)``, each like its parameter. None if there is no such parameter, or no
        gradient reaches it. Arithmetic as in `triton_convbn.fold`. Differentiable.
    """
    tensors = (weight, bias, bn_weight, bn_bias, running_mean, running_var, grad_weight, grad_bias)
    wide = arithmetic(tensors)
    inverse, scale = inverse_and_scale(bn_weight, running_var, eps, wide)
    dw = db = d_bn_weight = d_bn_bias = None
    d_scale = None
    if grad_weight is not None:
        dw = (grad_weight.to(wide) * per_weight(scale, weight, transposed, groups)).to(weight.dtype)
        d_scale = per_channel(grad_weight.to(wide) * weight.to(wide), transposed, groups)
    if grad_bias is not None:
        shift = -running_mean.to(wide) if bias is None else bias.to(wide) - running_mean.to(wide)
        from_bias = grad_bias.to(wide) * shift
        d_scale = from_bias if d_scale is None else d_scale + from_bias
        if bias is not None:
            db = (grad_bias.to(wide) * scale).to(bias.dtype)
        if bn_bias is not None:
            d_bn_bias = grad_bias.to(bn_bias.dtype, copy=True)
    if bn_weight is not None and d_scale is not None:
        d_bn_weight = (d_scale * inverse).to(bn_weight.dtype)
    return dw, db, d_bn_weight, d_bn_bias


def per_channel(product: Tensor, transposed: bool, groups: int) -> Tensor:
    """Sum a product shaped like the weight over all dimensions but the channels. Return (C_out,)."""
    if not transposed:
        return product.reshape(product.shape[0], math.prod(product.shape[1:])).sum(1)
    per_row = product.reshape(*product.shape[:2], math.prod(product.shape[2:])).sum(2) if product.ndim > 2 else product
    return per_row.reshape(groups, -1, product.shape[1]).sum(1).reshape(-1)


def per_weight(scale: Tensor, weight: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """Reshape a scale (C_out,) so that it broadcasts against the weight.

    A transposed convolution has its outputs where another has its inputs, so `transposed` serves for (C_in,) as well.
    """
    ones = (1,) * (weight.ndim - 2)
    if not transposed:
        return scale.reshape(-1, 1, *ones)
    if groups == 1:
        return scale.reshape(1, -1, *ones)
    # Row i of the weight belongs to group i // (C_in / groups), whose channels are a slice of `scale`.
    per_group = scale.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return per_group.reshape(weight.shape[0], -1, *ones)


def _check(
    weight: Tensor, vectors: "Mapping[str, Tensor | None]", transposed: bool, groups: int, dtype: torch.dtype | None
) -> None:
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"fold: cannot round to {dtype}; choose one of {', '.join(map(str, FLOATING))}")
    for name, tensor in (("weight", weight), *vectors.items()):
        if tensor is not None and tensor.dtype not in FLOATING:
            raise TypeError(f"fold: {name} is {tensor.dtype}; only {', '.join(map(str, FLOATING))} fold")
    if weight.ndim < 2:
        raise ValueError(f"fold: weight has shape {tuple(weight.shape)}; a convolution's has at least 2 dimensions")
    if groups < 1 or (transposed and weight.shape[0] % groups):
        raise ValueError(f"fold: {weight.shape[0]} input channels do not divide into {groups} groups")
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    for name, tensor in vectors.items():
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise ValueError(f"fold: {name} has shape {tuple(tensor.shape)}; the convolution has {channels} channels")
