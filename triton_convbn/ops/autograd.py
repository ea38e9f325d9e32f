"""Fold and convolve as one autograd function, which folds again in backward.

Autograd saves the weight of a convolution for backward. A folded weight is a new tensor in every call, so these saved
weights add up. ResNet-50 in eager mode saves 426 MB at batch 8 and 177 MB at batch 2, of which they are 94 MB (measured
on a CPU, tests/test_memory.py). Under Inductor the partitioner recomputes them (`rewrite`). In eager mode this function
does: it saves the parameters and statistics that the fold reads, which exist anyway.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..dispatch import kernel_runs, needs_plain_autograd
from ..kernels.inputs import FoldInputs, unsupported_reason
from ..kernels.spec import Needs
from . import fallback, fp16_range, library
from .convolution import Convolution, Sizes, spread
from .packed_pairs import PackedPairs
from .saved import checks_data, checksums, no_view, raise_if_changed, savable


def uses_kernel(pair: FoldInputs) -> bool:
    """Return whether a kernel computes this fold. If not, plain torch does, which supports everything."""
    tensors = pair[:6]
    if torch.compiler.is_compiling() or has_torch_function(tensors) or not kernel_runs(pair.weight.device):
        return False
    if needs_plain_autograd(*tensors):
        return False
    if pair.running_mean.requires_grad or pair.running_var.requires_grad:
        return False
    return unsupported_reason(pair) is None


def folded(pair: FoldInputs, kernel: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``(W', b', None)`` of one pair, or ``(W' / q, b' / q, q)`` with prescale. Differentiable.

    kernel: Launch a kernel, else use plain torch.
    """
    weight, bias, *power = library.fold_op(*PackedPairs.pack([pair])) if kernel else fallback.fold_fallback(pair)
    return weight, bias, power[0].detach() if power else None


class _ConvWithFold(torch.autograd.Function):
    """Compute ``conv(x, *fold(...))`` and save the input and the arguments of the fold.

    Backward consists of differentiable operations on the saved tensors, so second derivatives are right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> Tensor:
        *tensors, rest, conv, kernel = arguments
        return no_view(_convolved(x, FoldInputs(*tensors, *rest), conv, kernel))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.rest, ctx.conv, ctx.kernel = inputs
        ctx.save_for_backward(*tensors)
        ctx.sums = checksums(tensors) if checks_data() else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        if ctx.sums is not None:
            raise_if_changed(_SAVED, ctx.sums, checksums(ctx.saved_tensors))
        pair = FoldInputs(*tensors, *ctx.rest)
        of_x, *flags = ctx.needs_input_grad[:5]
        needs = Needs(*flags)
        weight, _, power = folded(pair, ctx.kernel)
        grad = grad if power is None else fp16_range.scaled_back(grad, power, linear=weight.ndim == 2)
        wanted = of_x, needs.weight or needs.bn_weight, needs.bias or needs.bn_weight or needs.bn_bias
        dx, *grads = ctx.conv.backward(grad, x, weight, wanted)
        if not any(flags):
            found: Sequence[Tensor | None] = [None] * 4
        elif ctx.kernel:
            powers = [] if power is None else [power]
            (found,) = library.fold_backward(PackedPairs.pack([pair]), [(grads[0], grads[1])], [needs], powers)
        else:
            every = fallback.fold_backward_fallback(pair, grads[0], grads[1], power)
            found = [one if flag else None for one, flag in zip(every, flags, strict=True)]
        return (dx, *found, *[None] * 5)  # statistics and non-tensors have none


_SAVED = ("input", "weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")


def _convolved(x: Tensor, pair: FoldInputs, conv: Convolution, kernel: bool) -> Tensor:
    weight, bias, power = folded(pair, kernel)
    output = conv(x, weight, bias)
    return output if power is None else fp16_range.scaled_back(output, power, linear=weight.ndim == 2)


def conv_with_fold(
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
    kernel: bool = True,
    general: bool = False,
) -> Tensor:
    """Convolve x with folded parameters. Backward folds again instead of saving the folded weight.

    Args:
        x: Batched, ``(N, C_in, *spatial)``; ``(*, C_in)`` for a Linear, whose weight has two dimensions.
        weight, ..., eps, transposed, groups: As in `triton_convbn.fold`.
        stride, padding, dilation, output_padding: As in torch's convolutions.
        dtype: As in `triton_convbn.fold`. Under autocast its dtype is used instead.
        kernel: Allow a generated kernel to compute the fold if one can run; else use plain torch.
        general: Compute as `torch.convolution` does, which autocast does not change on a CPU.

    Returns:
        ``(N, C_out, *spatial)``. Twice differentiable.

    Source: arXiv 2305.11624, section 3.
    """
    tensors = (x, weight, bias, bn_weight, bn_bias, running_mean, running_var)
    if has_torch_function(tensors):  # an fx.Proxy sees one call
        keywords: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        keywords |= {"transposed": transposed, "output_padding": output_padding, "dtype": dtype, "kernel": kernel}
        keywords |= {"general": general}
        return handle_torch_function(conv_with_fold, tensors, *tensors, eps, **keywords)
    x, dtype = as_autocast_does(x, weight, dtype, general)
    parameters = weight, bias, bn_weight, bn_bias, running_mean, running_var
    prescale = (dtype or weight.dtype) == torch.float16
    pair = FoldInputs(*parameters, eps, transposed, groups, dtype, prescale=prescale)
    n = weight.ndim - 2
    sides = _sides(padding, dilation, weight)
    if any(left != right for left, right in sides):
        x = F.pad(x, [more for left, right in reversed(sides) for more in (0, right - left)])
    conv = Convolution(
        spread(stride, n),
        tuple(left for left, _ in sides),
        spread(dilation, n),
        transposed,
        spread(output_padding, n),
        groups,
    )
    kernel = kernel and uses_kernel(pair)
    if torch.compiler.is_compiling() or running_mean.requires_grad or running_var.requires_grad:
        return _convolved(x, pair, conv, kernel)  # a compiler recomputes by itself; statistics need autograd
    if needs_plain_autograd(x, *parameters):
        return _convolved(x, pair, conv, kernel=False)
    return _ConvWithFold.apply(*savable((x, *parameters)), pair[6:], conv, kernel)


def as_autocast_does(
    x: Tensor, weight: Tensor, dtype: torch.dtype | None, general: bool = False
) -> tuple[Tensor, torch.dtype | None]:
    """Return x and the dtype to round the folded weight to, as autocast casts the arguments of a convolution.

    general: The model calls `torch.convolution`, which autocast does not cast on a CPU.
    """
    casts = x.device.type != "meta" and not (general and x.device.type == "cpu")
    if not casts or not torch.is_autocast_enabled(x.device.type):
        return x, dtype
    rounded = torch.get_autocast_dtype(x.device.type)
    return x if x.dtype == torch.float64 else x.to(rounded), None if weight.dtype == torch.float64 else rounded


def _sides(padding: Sizes | str, dilation: Sizes, weight: Tensor) -> list[tuple[int, int]]:
    """Return the padding before and after each spatial dimension. With "same" an odd total has one more after."""
    n = weight.ndim - 2
    if not isinstance(padding, str):
        return [(size, size) for size in spread(padding, n)]
    if padding == "valid":
        return [(0, 0)] * n
    totals = [each * (size - 1) for each, size in zip(spread(dilation, n), weight.shape[2:], strict=True)]
    return [(total // 2, total - total // 2) for total in totals]
