"""Merge the weights of several small sums of branches at once, without a compiler.

An operation on a small weight takes less time than its call, and a depthwise block of mobileone_s0 has some 60 of them
in a training step. The weights of sums that are alike, put one after another, are those of one sum with more groups.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..dispatch import needs_plain_torch
from .convolution import Convolution
from .merge_in_place import MergedConvolution, by_size, columns_of, gradients, merge
from .merge_reference import kernel_of, merged_weight, rows_of
from .registration import gradients_of
from .saved import checks_data, checksums, gradients_of_parts, raise_if_changed, savable


def merge_together(
    weights: Sequence[Sequence[Tensor]],
    scales: Sequence[Tensor],
    groups: Sequence[int],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Return the merged weight of each sum, ``sum_k scale_k * weight_k + diag(scale_0)``. Twice differentiable.

    Args:
        weights: Those of each sum, ``(C_out, C_in / groups, *kernel_k)``. The sums differ in C_out and groups alone.
        scales: For each sum those of its weights, then that of its input if it is a term, ``(n, C_out)``.
        groups: Those of the convolution of each sum.
        dtype: That of the merged weights. None: that of the first weight.

    Source: arXiv 2101.03697, section 3.3.
    """
    every = list(chain(*zip(*weights, strict=True)))  # the first weights of all sums, then the second ones, and so on
    if has_torch_function((*scales, *every)):
        return handle_torch_function(merge_together, (*scales, *every), weights, scales, groups, dtype)
    dtype = dtype or every[0].dtype
    if needs_plain_torch(*scales, *every):
        return _each(weights, scales, groups, dtype)
    conv = Convolution((), (), (), False, (), sum(groups))
    merged = MergedConvolution(conv, by_size(weights[0]), dtype, input_last=False, kernel_merges=False)
    return _Merged.apply(merged, tuple(groups), *scales, *savable(every))


class _Merged(torch.autograd.Function):
    """Save the scales and the weights."""

    @staticmethod
    def forward(ctx: Any, merged: MergedConvolution, groups: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.merged, ctx.groups = merged, groups
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.sums = checksums(tensors) if checks_data() else None
        scales, *weights = _split(tensors, len(groups))
        every, wide = list(map(torch.cat, weights)), torch.cat(scales, 1)
        merged_weights = merge(every, wide, columns_of(wide, every[0]), merged)
        return merged_weights.split_with_sizes([scale.shape[1] for scale in scales])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        merged, tensors, flags = ctx.merged, ctx.saved_tensors, ctx.needs_input_grad[2:]
        if ctx.sums is not None:
            names = [f"weight or scale {index} of the branches" for index in range(len(tensors))]
            raise_if_changed(names, ctx.sums, checksums(tensors))
        if torch.is_grad_enabled():
            # Views, because weights may be one tensor, or computed from each other: autograd would count paths twice.
            tensors = [each.view_as(each) for each in tensors]
        scales, *weights = _split(tensors, len(grads))
        if torch.is_grad_enabled():
            outputs = _each(list(zip(*weights, strict=True)), scales, ctx.groups, merged.dtype)
            return None, None, *gradients_of(outputs, grads, tensors, flags)
        scales_train, *train = map(any, _split(flags, len(grads)))
        largest = weights[merged.order[0]]
        complete = [
            own.new_zeros(own.shape, dtype=merged.dtype) if grad is None else grad
            for grad, own in zip(grads, largest, strict=True)
        ]
        wide = torch.cat(scales, 1)
        of_scales, of_weights = gradients(
            torch.cat(complete),
            list(map(torch.cat, weights)),
            wide,
            columns_of(wide, largest[0]),
            merged,
            scales_train,
            train,
        )
        sizes = [scale.shape[1] for scale in scales]
        parts = [None if of_scales is None else gradients_of_parts(of_scales, sizes, 1)]
        parts += [None if own is None else gradients_of_parts(own, sizes) for own in of_weights]
        # Without a gradient of a sum, its weights have none, as if it was merged alone: no zeros.
        return (
            None,
            None,
            *(None if own is None or grad is None else own[index] for own in parts for index, grad in enumerate(grads)),
        )


def _each(
    weights: Sequence[Sequence[Tensor]], scales: Sequence[Tensor], groups: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Return what `merge_together` does, by operations that autograd can follow."""
    kernel = max(map(kernel_of, weights[0]))
    return tuple(
        merged_weight(own, *rows_of(scale, own), kernel, number).to(dtype)
        for own, scale, number in zip(weights, scales, groups, strict=True)
    )


def _split(values: Sequence[Any], number: int) -> list[list[Any]]:
    """Return the scales of all sums, then their first weights, and so on."""
    return [list(values[start : start + number]) for start in range(0, len(values), number)]
