"""Fold a BatchNorm into the convolution that reads its output, and convolve, as one autograd function.

In eager mode autograd saves the BatchNorm's input and its output, which is the convolution's input. This function saves
the input alone, with the parameters and statistics of the fold, which exist anyway. Backward folds again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..dispatch import needs_plain_autograd
from .autograd import as_autocast_does
from .convolution import Convolution, Sizes, spread
from .fp16_range import scaled_back
from .input_norm import Norm, fold_input_norm, fold_input_norm_backward
from .saved import checks_data, checksums, no_view, raise_if_changed, savable

_VECTORS = ("bn_weight", "bn_bias", "running_mean", "running_var")
_SAVED = ("input", "weight", "bias", *_VECTORS, *(f"{name} of the BatchNorm after it" for name in _VECTORS))


def conv_with_input_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    transposed: bool = False,
    output_padding: Sizes = 0,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    after: Norm | None = None,
    general: bool = False,
) -> Tensor:
    """Return ``conv(bn(x))`` as one convolution. Backward folds again instead of saving the folded weight.

    Args:
        x: The BatchNorm's input, ``(N, C_in, *spatial)``, or ``(*, C_in)`` for a Linear.
        weight, ..., eps, groups, after: See `fold_input_norm`.
        stride, dilation: As in torch's convolutions.
        padding, transposed, output_padding: As in torch's convolutions, which do not fold unless these do nothing. The
            caller checks that.
        dtype: As in `fold_input_norm`. Under autocast its dtype is used instead.
        general: As in `conv_with_fold`.

    Returns:
        ``(N, C_out, *spatial)``. Twice differentiable.

    Source: arXiv 2305.11624, section 3.
    """
    norm: Norm = bn_weight, bn_bias, running_mean, running_var, eps
    tensors = (weight, bias, *norm[:4], *(after[:4] if after else (None,) * 4))
    if has_torch_function((x, *tensors)):  # an fx.Proxy sees one call
        keywords: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        keywords |= {"transposed": transposed, "output_padding": output_padding, "dtype": dtype, "after": after}
        keywords |= {"general": general}
        return handle_torch_function(conv_with_input_norm, (x, *tensors), x, weight, bias, *norm, **keywords)
    x, dtype = as_autocast_does(x, weight, dtype, general)
    n = weight.ndim - 2
    conv = Convolution(spread(stride, n), (0,) * n, spread(dilation, n), False, (0,) * n, groups)
    static = eps, None if after is None else after[4], groups, dtype
    statistics = (*norm[2:4], *(after[2:4] if after else ()))
    differentiable = any(each.requires_grad for each in statistics)  # not by `fold_input_norm_backward`
    if torch.compiler.is_compiling() or needs_plain_autograd(x, *tensors) or differentiable:
        return _convolved(x, conv, _fold(tensors, static))
    return _ConvWithInputNorm.apply(*savable((x, *tensors)), static, conv)


def _norms(tensors: Any, static: Any) -> tuple[Norm, Norm | None]:
    """Return the BatchNorm of the input and that of the output."""
    eps, eps_after, *_ = static
    return (*tensors[2:6], eps), None if eps_after is None else (*tensors[6:10], eps_after)


def _fold(tensors: Any, static: Any) -> tuple[Tensor, ...]:
    (weight, bias, *_), (norm, after) = tensors, _norms(tensors, static)
    return fold_input_norm(weight, bias, *norm, groups=static[2], dtype=static[3], after=after)


def _convolved(x: Tensor, conv: Convolution, folded: tuple[Tensor, ...]) -> Tensor:
    weight, bias, *power = folded
    output = conv(x, weight, bias)
    return scaled_back(output, power[0], linear=weight.ndim == 2) if power else output


class _ConvWithInputNorm(torch.autograd.Function):
    """Compute ``conv(x, *fold_input_norm(...))`` and save the input and the arguments of the fold.

    Backward consists of differentiable operations on the saved tensors, so second derivatives are right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> Tensor:
        *tensors, static, conv = arguments
        return no_view(_convolved(x, conv, _fold(tensors, static)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.static, ctx.conv = inputs
        ctx.save_for_backward(*tensors)
        ctx.sums = checksums(tensors) if checks_data() else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        if ctx.sums is not None:
            raise_if_changed(_SAVED, ctx.sums, checksums(ctx.saved_tensors))
        of_x, *flags = ctx.needs_input_grad[:11]
        needs = [*flags[:4], *flags[6:8]]  # weight, bias, and the parameters of both BatchNorms
        weight, _, *power = _fold(tensors, ctx.static)
        grad = scaled_back(grad, power[0], linear=weight.ndim == 2) if power else grad
        of_weight = needs[0] or needs[2] or needs[4]
        dx, grad_weight, grad_bias = ctx.conv.backward(grad, x, weight, (of_x, of_weight, any(needs)))
        found: list[Tensor | None] = [None] * 6
        if grad_bias is not None:
            norm, after = _norms(tensors, ctx.static)
            q = power[0] if power else None
            own, bias, *_ = tensors
            every = fold_input_norm_backward(grad_weight, grad_bias, own, bias, norm, ctx.static[2], after, q)
            found = [one if flag else None for one, flag in zip(every, needs, strict=True)]
        return (dx, *found[:4], None, None, *found[4:], None, None, None, None)
