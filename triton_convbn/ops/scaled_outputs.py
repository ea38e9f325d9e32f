"""Compute a sum of branches whose weights are much larger than its output: scale the outputs, and merge nothing.

    y = sum_k s_k * conv(x, W_k) + s_0 * x + b'
    dW_k = (s_k * dy) x^T     ds_k = sum over the channel of dy * conv(x, W_k)
    dx = sum_k W_k^T (s_k * dy) + s_0 * dy

Merged, a step passes over the largest weight some twelve times, of which this leaves three. The last block of
repvgg_a0, 1280 x 192 x 3 x 3 for an output of 4 x 4, takes 19 ms of a step instead of 22 (one thread of an AMD EPYC,
Zen 4, see docs/experiments.md). The outputs of its branches are kept for the gradients of the scales: 0.7 MB, where the
weight has 8.8.

The branch with the largest kernel is a convolution. Those with kernels of one element are products of matrices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .merge_in_place import Gradients, MergedConvolution, columns_of
from .merge_reference import has_input
from .reference import as_dtype
from .weight_gradient import LEAST_ELEMENTS, products_are_exact, rows_of_image


def scales_outputs(x: Tensor, weights: Sequence[Tensor], merged: MergedConvolution) -> bool:
    """Return whether this takes less time than to merge the weights.

    Args:
        x, weights: As in `branches_autograd.conv_with_scales`. No tensor subclasses.
        merged: The sum as one convolution.
    """
    largest, *others = (weights[index] for index in merged.order)
    if largest.numel() < LEAST_ELEMENTS or merged.kernel_merges or torch.get_num_threads() > 1:
        return False
    if not products_are_exact() or x.ndim != 4 or x.device.type != "cpu" or merged.conv.groups > 1 or not others:
        return False
    if any(each.dtype != torch.float32 for each in (x, *weights)) or merged.dtype != torch.float32:
        return False
    positions = x.shape[0]
    kernel = largest.shape[2:]
    for size, element, stride, padding, dilation in zip(x.shape[2:], kernel, *merged.conv[:3], strict=True):
        if 2 * padding != dilation * (element - 1):  # the smaller kernels pad as well
            return False
        positions *= (size - 1) // stride + 1
    one_element = all(each.shape[2:].numel() == 1 for each in others)
    return one_element and kernel.numel() > 1 and 0 < positions <= largest.shape[0]


def scaled_outputs(
    x: Tensor, weights: Sequence[Tensor], scales: Tensor, bias: Tensor, merged: MergedConvolution
) -> tuple[Tensor, list[Tensor]]:
    """Return the sum, ``(N, C_out, *output)``, and the output of each branch, ``(C_out, N * output)``."""
    largest, read = merged.order[0], rows_of_image(_points(x, merged))
    image = torch.convolution(x, weights[largest], None, *merged.conv)
    outputs = [
        rows_of_image(image) if index == largest else weight.reshape(weight.shape[:2]) @ read
        for index, weight in enumerate(weights)
    ]
    terms = [*outputs, read] if has_input(scales, weights) else outputs
    first, *columns = columns_of(as_dtype(scales, torch.float32), read)
    total = torch.addcmul(bias[:, None], terms[0], first)
    for term, column in zip(terms[1:], columns, strict=True):
        total.addcmul_(term, column)
    return _image(total, image), outputs


def gradients_of_scaled_outputs(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Tensor,
    outputs: Sequence[Tensor],
    merged: MergedConvolution,
    wanted: tuple[bool, bool, bool],
    flags: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, *Gradients]:
    """Return the gradients of x, of the bias, of the scales and of each weight, None where not wanted.

    Args:
        grad: That of the sum.
        x, weights, scales, merged: As in `scaled_outputs`.
        outputs: What it returned.
        wanted: Whether x, the scales and the bias need gradients.
        flags: Whether each weight does.
    """
    of_x, of_scales, of_bias = wanted
    rows, read = rows_of_image(grad), rows_of_image(_points(x, merged))
    columns = columns_of(as_dtype(scales, torch.float32), read)
    dx: Tensor | None = None
    of_read = rows * columns[-1] if has_input(scales, weights) else torch.zeros_like(read)
    of_weights: list[Tensor | None] = [None] * len(weights)
    for index, weight in enumerate(weights):
        scaled = rows * columns[index]
        if index == merged.order[0]:
            dx, of_weights[index], _ = merged.conv.backward(
                _image(scaled, grad), x, weight, (of_x, flags[index], False)
            )
            continue
        if of_x:
            of_read = torch.addmm(of_read, weight.reshape(weight.shape[:2]).t(), scaled)
        if flags[index]:
            of_weights[index] = (scaled @ read.t()).view(weight.shape)
    if dx is not None:
        of_points = _points(dx, merged)
        of_points.add_(_image(of_read, of_points))
    terms = [*outputs, read] if has_input(scales, weights) else outputs
    ds = torch.stack([(rows * term).sum(1) for term in terms]).to(scales.dtype) if of_scales else None
    return dx, rows.sum(1) if of_bias else None, ds, of_weights


def _points(x: Tensor, merged: MergedConvolution) -> Tensor:
    """Return what a kernel of one element reads, or a view of it, ``(N, C_in, *output)``."""
    down, right = merged.conv.stride
    return x if down == right == 1 else x[:, :, ::down, ::right]


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """Return ``(C, N * output)`` as ``(N, C, *output)``, with the strides of a tensor like it."""
    images, channels, *output = like.shape
    return torch.empty_like(like).copy_(rows.view(channels, images, *output).transpose(0, 1))
