"""Merge the weights of branches without a compiler, and give their gradients: by a kernel, or by operations in place.

    dW_k = crop(dW') * s_k     ds_k = sum over the channel of crop(dW') * W_k     ds_0 = diagonal of dW' at the centre

Nothing here is differentiable, see `branches_autograd`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .convolution import Convolution
from .merge_library import merge_backward_op, merge_op
from .merge_plan import PackedSums, Wanted
from .merge_reference import diagonal_of, dot, has_input, kernel_of, margins
from .reference import FLOATING, as_dtype


class MergedConvolution(NamedTuple):
    """A sum of branches as one convolution, without its tensors.

    Attributes:
        conv: The convolution.
        order: The numbers of the weights, the largest kernels first.
        dtype: That of the merged weight.
        input_last: Add the input to the output, see `merge_reference.adds_input_last`.
        kernel_merges: A generated kernel merges the weights.
    """

    conv: Convolution
    order: tuple[int, ...]
    dtype: torch.dtype
    input_last: bool
    kernel_merges: bool


Columns = Sequence[Tensor]
"""A number for each output channel, in a shape that a weight can be multiplied by: those of each term of a sum."""


def columns_of(scales: Tensor, weight: Tensor) -> Columns:
    """Return the scales of all terms, each in a shape that the weight can be multiplied by."""
    return scales.view(*scales.shape, *(1,) * (weight.ndim - 1)).unbind()


def split(scales: Tensor, weights: Sequence[Tensor], merged: MergedConvolution) -> tuple[Columns, Tensor | None]:
    """Return the scales of what the merged weight consists of, and that of the input if it is added afterwards."""
    columns = columns_of(scales, weights[0])
    return (columns[:-1], as_dtype(columns[-1], merged.dtype).squeeze(-1)) if merged.input_last else (columns, None)


def by_size(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the numbers of the weights, the largest kernels first."""
    sizes = list(map(kernel_of, weights))
    return tuple(sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True))


def merge(weights: Sequence[Tensor], scales: Tensor, columns: Columns, merged: MergedConvolution) -> Tensor:
    """Return the merged weight: by a kernel, or by operations in place, with one new tensor and not one a branch.

    Args:
        weights, scales: As in `branches_autograd.conv_with_scales`.
        columns: The scales of what to merge, see `split`.
        merged: The sum as one convolution.
    """
    if merged.kernel_merges:
        with torch.no_grad():
            (weight,) = merge_op(*_packed(weights, scales[: len(columns)], merged.dtype))
        return weight
    first, *others = merged.order
    total = as_dtype(weights[first], scales.dtype) * columns[first]
    for number in others:
        weight = as_dtype(weights[number], scales.dtype)
        cropped(total, weight).addcmul_(weight, columns[number])
    if len(columns) > len(weights):
        own = diagonal_of(total, merged.conv.groups)
        own += columns[-1].view_as(own)
    return as_dtype(total, merged.dtype)


@lru_cache(maxsize=1024)
def _margins(merged: torch.Size, shape: torch.Size) -> tuple[tuple[int, int, int], ...]:
    """Return `margins`. It takes 6 of 20 us in a step of repvgg_a0, between convolutions that fill the caches."""
    return margins(merged, shape)


def cropped(merged: Tensor, weight: Tensor) -> Tensor:
    """Return a view of the elements to which a smaller kernel is added."""
    for dim, start, length in _margins(merged.shape, weight.shape):
        merged = merged.narrow(dim, start, length)
    return merged


Gradients = tuple[Tensor | None, list[Tensor | None]]
"""Those of the scales and of each weight, None where not needed."""


def gradients(
    grad: Tensor,
    weights: Sequence[Tensor],
    scales: Tensor,
    columns: Columns,
    merged: MergedConvolution,
    scales_train: bool,
    flags: Sequence[bool],
) -> Gradients:
    """Return the gradients of a sum's scales and weights: by a kernel, or in plain torch. May overwrite dW', `grad`."""
    if merged.kernel_merges:
        wanted = Wanted(list(flags), scales_train)
        found = iter(merge_backward_op([grad], [wanted.mask], *_packed(weights, scales, grad.dtype)))
        by_kernel = [next(found) if flag else None for flag in flags]
        return next(found) if scales_train else None, by_kernel
    grad = as_dtype(grad, scales.dtype)
    parts = [cropped(grad, weight) for weight in weights]
    of_scales: Tensor | None = None
    if scales_train:
        rows = [dot(part, as_dtype(weight, scales.dtype)) for part, weight in zip(parts, weights, strict=True)]
        if has_input(scales, weights):
            rows.append(diagonal_of(grad, merged.conv.groups).reshape(-1))
        of_scales = torch.stack(rows)
    of_weights: list[Tensor | None] = [None] * len(weights)
    largest = merged.order[0]
    for number in reversed(merged.order):
        if flags[number]:
            # The last product replaces dW', which saves a tensor of its size.
            multiply = Tensor.mul_ if number == largest else Tensor.mul
            of_weights[number] = as_dtype(multiply(parts[number], columns[number]), weights[number].dtype)
    return of_scales, of_weights


def _packed(weights: Sequence[Tensor], scales: Tensor, dtype: torch.dtype) -> PackedSums:
    """Return the arguments of the operators for this one sum."""
    return PackedSums(list(weights), [scales.contiguous()], [len(weights)], [FLOATING.index(dtype)])
