"""Merge branches and convolve as one autograd function, which merges again in backward.

In eager mode autograd would save every branch's output, and every step of the merge. This function saves the input, the
branches' weights, which exist anyway, and their scales. All gradients of a block come out of one dW':

    dW_k = crop(dW') * s_k     ds_k = sum over the channel of crop(dW') * W_k     ds_0 = diagonal of dW' at the centre

Autograd follows the vectors s_k and b' to the BatchNorms.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..dispatch import kernel_runs, needs_plain_torch
from .autograd import as_autocast_does
from .branch_form import Expression, Form, form_of
from .branch_norms import scales_of_sums
from .branch_terms import Vectors, power_for
from .convolution import Convolution, Sizes, spread
from .fp16_range import scaled_back
from .merge_in_place import MergedConvolution, by_size, gradients, merge, split
from .merge_reference import add_input, adds_input_last, apart, has_input, kernel_of, merged_weight, rows_of
from .reference import arithmetic, as_dtype
from .registration import gradients_of
from .saved import checks_data, checksums, no_view, raise_if_changed, savable
from .scaled_outputs import gradients_of_scaled_outputs, scaled_outputs, scales_outputs

SMALL = 0.25
"""The merged weight is saved if it has at most this share of the input's elements. Merged again, it takes time."""


def conv_with_branches(
    x: Tensor, tensors: Sequence[Tensor], expression: Expression, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    """Return a sum of branches as one convolution. Backward merges again instead of saving the merged weight.

    Args:
        x: The input that all branches read, ``(N, C_in, *spatial)``.
        tensors, expression, dtype: See `fold_branches`.
        options: Those of `conv_with_scales`.

    Returns:
        ``(N, C_out, *spatial)``. Twice differentiable.

    Source: arXiv 2101.03697, section 3.3.
    """
    if has_torch_function((x, *tensors)):
        return handle_torch_function(conv_with_branches, (x, *tensors), x, tensors, expression, dtype=dtype, **options)
    compiled = torch.compiler.is_compiling()
    form = Form(expression) if compiled else form_of(expression)  # Dynamo warns about caches
    weights, wide = [tensors[position] for position in form.weights], arithmetic(tensors)
    composed = None if compiled else form.composed
    factors = [] if composed is None or composed.factor is None else [tensors[composed.factor]]
    if composed is not None and all(factor.numel() == weights[0].shape[0] for factor in factors):
        norms = composed.norms
        scales, shift = scales_of_sums(norms.read(tensors), factors, norms.eps, [composed.composition], wide)
        return conv_with_scales(x, weights, scales, shift, dtype=dtype, **options)
    vectors = Vectors(form, tensors, compiled=compiled)
    terms, found = vectors.terms(), vectors.shift()
    shift = torch.zeros_like(terms.scales[0]) if found is None else found
    return conv_with_scales(x, weights, as_dtype(torch.stack(terms.rows()), wide), shift, dtype=dtype, **options)


def conv_with_scales(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Tensor,
    bias: Tensor,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    general: bool = False,
    kernel_merges: bool = True,
) -> Tensor:
    """Return ``sum_k scale_k * conv(x, weight_k) + scale_0 * x + bias`` as one convolution.

    Args:
        x: ``(N, C_in, *spatial)``.
        weights: ``(C_out, C_in / groups, *kernel_k)`` each. One of the kernels holds all others.
        scales: Those of the weights, then that of x if x is a term, ``(n, C_out)``. In the dtype of the arithmetic.
        bias: (C_out,), any floating dtype.
        stride, padding, dilation, groups: Those of the branch with the largest kernel.
        dtype: The dtype of the merged weight. None: that of the first weight. Under autocast its dtype is used instead.
        general: As in `conv_with_fold`.
        kernel_merges: Allow a generated kernel to merge the weights if one can run; else use plain torch.

    Returns:
        ``(N, C_out, *spatial)``. Twice differentiable.

    Source: arXiv 2101.03697, section 3.3.
    """
    tensors = x, scales, bias, *weights
    if has_torch_function(tensors):
        keywords: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "dtype": dtype,
            "general": general,
            "kernel_merges": kernel_merges,
        }
        return handle_torch_function(conv_with_scales, tensors, x, weights, scales, bias, **keywords)
    x, dtype = as_autocast_does(x, weights[0], dtype, general)
    dtype = dtype or weights[0].dtype
    plain = needs_plain_torch(*tensors)
    n = weights[0].ndim - 2
    conv = Convolution(spread(stride, n), spread(padding, n), spread(dilation, n), False, (0,) * n, groups)
    input_last = has_input(scales, weights) and adds_input_last(weights[0], dtype)
    kernel_merges = kernel_merges and not plain and kernel_runs(x.device)
    merged = MergedConvolution(conv, by_size(weights), dtype, input_last, kernel_merges)
    power: Tensor | None = None
    if dtype == torch.float16:
        power = power_for(scales, bias)
        inverse = power.to(scales.dtype).reciprocal()  # exact
        scales, bias = scales * inverse, bias * inverse
    bias = as_dtype(bias, dtype)
    if plain:
        output = _plainly(x, weights, scales, bias, merged)
    else:
        x, *weights = savable((x, *weights))
        output = _ConvWithScales.apply(x, scales, bias, merged, *weights)
    return output if power is None else scaled_back(output, power)


class _ConvWithScales(torch.autograd.Function):
    """Save the input, the scales and the weights."""

    # No `setup_context`: with it, `apply` inspects the signature on every call, which takes 20 of 33 us (30 tensors).
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Tensor, bias: Tensor, merged: MergedConvolution, *weights: Tensor
    ) -> Tensor:
        ctx.merged = merged
        ctx.sums = checksums((x, *weights)) if checks_data() else None
        ctx.scaled = scales_outputs(x, weights, merged)
        if ctx.scaled:
            output, outputs = scaled_outputs(x, weights, scales, bias, merged)
            ctx.save_for_backward(x, scales, *weights, *outputs)
            return output
        columns, added = split(scales, weights, merged)
        weight = merge(weights, scales, columns, merged)
        kept = [weight] if len(weights) > 1 and weight.numel() <= SMALL * x.numel() else []
        ctx.save_for_backward(x, scales, *weights, *kept)
        output = no_view(merged.conv(x, weight, bias))
        return output if added is None else output.addcmul_(x, added)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x, scales_train, bias_trains, _, *flags = ctx.needs_input_grad
        x, scales, *rest = ctx.saved_tensors
        weights, kept, merged = rest[: len(flags)], rest[len(flags) :], ctx.merged
        if ctx.sums is not None:
            names = ("input", *(f"weight {index} of the branches" for index in range(len(weights))))
            raise_if_changed(names, ctx.sums, checksums((x, *weights)))
        added: Tensor | None = None
        if ctx.scaled and not torch.is_grad_enabled():
            wanted = of_x, scales_train, bias_trains
            dx, of_bias, of_scales, of_weights = gradients_of_scaled_outputs(
                grad, x, weights, scales, kept, merged, wanted, flags
            )
            return dx, of_scales, of_bias, None, *of_weights
        if torch.is_grad_enabled():
            # Views, because weights may be one tensor, or computed from each other: autograd would count paths twice.
            scales, *weights = [each.view_as(each) for each in (scales, *weights)]
            # With the input, so that autograd sees one convolution.
            weight = _differentiable(weights, *rows_of(scales, weights), merged)
        else:
            columns, added = split(scales, weights, merged)
            weight = kept[0] if kept else merge(weights, scales, columns, merged)
        wanted = of_x, scales_train or any(flags), bias_trains
        dx, of_weight, of_bias = merged.conv.backward(grad, x, weight, wanted)
        if dx is not None and added is not None:
            dx.addcmul_(grad, added)
        if of_weight is None:
            return dx, None, of_bias, None, *[None] * len(flags)
        if torch.is_grad_enabled():
            found = gradients_of([weight], [of_weight], [scales, *weights], [scales_train, *flags])
            return dx, found[0], of_bias, None, *found[1:]
        # The products of the gradients can take the memory of a weight that was merged again. Fresh memory takes 1,800
        # of the 9,600 page faults in a step of repvgg_a0 (CPU).
        del weight
        of_scales, of_weights = gradients(of_weight, weights, scales, columns, merged, scales_train, flags)
        return dx, of_scales, of_bias, None, *of_weights


def _plainly(x: Tensor, weights: Sequence[Tensor], scales: Tensor, bias: Tensor, merged: MergedConvolution) -> Tensor:
    """Return the convolution by operations that autograd and Inductor can follow."""
    own, identity = rows_of(scales, weights)
    if not merged.input_last or identity is None:
        return merged.conv(x, _differentiable(weights, own, identity, merged), bias)
    weight, added = apart(_differentiable(weights, own, None, merged), identity, merged.conv.groups)
    return add_input(merged.conv(x, weight, bias), x, added)


def _differentiable(
    weights: Sequence[Tensor], scales: Sequence[Tensor], identity: Tensor | None, merged: MergedConvolution
) -> Tensor:
    """Return the merged weight by operations that autograd and Inductor can follow."""
    kernel = kernel_of(weights[merged.order[0]])
    return merged_weight(weights, scales, identity, kernel, merged.conv.groups).to(merged.dtype)
