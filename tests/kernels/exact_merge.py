"""The fp64 oracle of a merge and its gradients, for the generated kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from triton_convbn.kernels.testing import MAX_ULPS, Exact, ulp


def _crop(merged: Tensor, weight: Tensor) -> Tensor:
    """Return the view of the merged kernel's middle that has the shape of `weight`."""
    margins = [(most - size) // 2 for size, most in zip(weight.shape, merged.shape, strict=True)]
    return merged[tuple(slice(at, at + size) for at, size in zip(margins, weight.shape, strict=True))]


def _at_identity(merged: Tensor) -> Tensor:
    """Return a mask of the elements of the merged weight through which the input itself passes."""
    channels, columns = merged.shape[:2]
    centre = tuple(size // 2 for size in merged.shape[2:])
    mask = torch.zeros(merged.shape, dtype=torch.bool, device=merged.device)
    for channel in range(channels):
        mask[(channel, channel % columns, *centre)] = True
    return mask


def merge_fp64(weights: Sequence[Tensor], scales: Tensor) -> Tensor:
    """Return ``sum_k embed(s_k * W_k) + diag(s_0)`` in fp64. The last row of `scales` is s_0 if there is one more."""
    largest = max(weights, key=lambda weight: tuple(weight.shape[2:]))
    total = torch.zeros(largest.shape, dtype=torch.float64, device=largest.device)
    for weight, scale in zip(weights, scales.double(), strict=False):
        _crop(total, weight).add_(weight.double() * scale.view(-1, *(1,) * (weight.ndim - 1)))
    if len(scales) > len(weights):
        total[_at_identity(total)] += scales[-1].double()
    return total


def exact_merge(weights: Sequence[Tensor], scales: Tensor) -> Exact:
    """Return the merged weight. Its terms may cancel."""
    slack = ulp(merge_fp64([weight.abs() for weight in weights], scales.abs()), scales.dtype)
    return Exact(merge_fp64(weights, scales), MAX_ULPS[scales.dtype] * slack)


def exact_merge_gradients(grad: Tensor, weights: Sequence[Tensor], scales: Tensor) -> tuple[list[Exact], Exact]:
    """Return the gradients of each weight, and of all scales, from dW'."""
    wide = grad.double()
    of_weights, rows, magnitudes = [], [], []
    for weight, scale in zip(weights, scales.double(), strict=False):
        part = _crop(wide, weight)
        product = part * scale.view(-1, *(1,) * (weight.ndim - 1))
        of_weights.append(Exact(product, torch.zeros_like(product)))
        terms = (part * weight.double()).flatten(1)
        rows.append(terms.sum(1))
        magnitudes.append(terms.abs().sum(1))
    if len(scales) > len(weights):
        rows.append(wide[_at_identity(wide)])
        magnitudes.append(rows[-1].abs())
    slack = MAX_ULPS[scales.dtype] * ulp(torch.stack(magnitudes), scales.dtype)
    return of_weights, Exact(torch.stack(rows), slack)
