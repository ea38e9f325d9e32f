"""Turn the tensors of a sum of branches into a spec, or say why the kernels cannot merge them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .inputs import DTYPES, Unsupported, is_channels_last, layout_obstacle
from .merge_spec import MergeGradSpec, MergeSpec, Source
from .spec import ARGUMENT_LIMIT


def largest_of(weights: Sequence[Tensor]) -> Tensor:
    """Return the first weight with the largest kernel. The merged weight has its shape and layout."""
    return max(weights, key=lambda weight: tuple(weight.shape[2:]))


def merge_spec_of(weights: Sequence[Tensor], scales: Tensor, dtype: torch.dtype) -> MergeSpec:
    """Return the spec of one sum.

    Args:
        weights: ``[C_out, C_in / groups, *kernel_k]`` each, contiguous or channels_last.
        scales: ``[terms, C_out]``, a row for each weight, and one more if the input itself is a term. A meta tensor
            serves as well.
        dtype: The dtype of the merged weight.

    Raises:
        Unsupported: The kernels cannot merge these tensors; plain torch can.
    """
    largest = largest_of(weights)
    merged = tuple(largest.shape[2:])
    channels, columns = largest.shape[:2]
    if not 1 <= len(merged) <= 3 or largest.numel() == 0:
        raise Unsupported(f"weight of shape {tuple(largest.shape)}")
    identity = len(scales) - len(weights)
    if identity not in (0, 1) or scales.shape[1:] != (channels,) or not scales.is_contiguous():
        raise Unsupported(f"scales of shape {tuple(scales.shape)}, strides {scales.stride()}")
    if not all(isinstance(size, int) for weight in weights for size in (*weight.shape, *weight.stride())):
        raise Unsupported("a size that is not known when compiling")
    for tensor in (*weights, scales):
        if tensor.layout is not torch.strided or tensor.is_neg():
            raise Unsupported("a tensor is not an ordinary dense one")
        if tensor.dtype not in DTYPES or dtype not in DTYPES:
            raise Unsupported(f"a tensor is {tensor.dtype}, the output {dtype}")
        if tensor.device not in (largest.device, torch.device("meta")):
            raise Unsupported(f"a tensor is on {tensor.device}, another on {largest.device}")
    if 3 * len(weights) + 3 > ARGUMENT_LIMIT:  # of the backward, which also reads dW' and the scales and writes theirs
        raise Unsupported(f"{len(weights)} weights in one sum")
    if scales.dtype not in (torch.float32, torch.float64):
        raise Unsupported(f"scales are {scales.dtype}")
    sources = tuple(_source(weight, largest) for weight in weights)
    if identity and any(size % 2 == 0 for size in merged):
        raise Unsupported(f"the input in the middle of a kernel of {'x'.join(map(str, merged))}")
    return MergeSpec(
        channels,
        columns,
        _three(merged),
        sources,
        DTYPES[scales.dtype],
        DTYPES[dtype],
        identity=bool(identity),
        out_last=_last(largest),
    )


def merge_grad_spec_of(one: MergeSpec, grad: Tensor, weights: Sequence[bool], scales: bool) -> MergeGradSpec:
    """Return the spec of one sum's backward. Raise Unsupported if `grad` is not dense."""
    if grad.dtype not in DTYPES or is_channels_last(grad) is None:
        raise Unsupported(f"weight gradient {tuple(grad.shape)} with strides {grad.stride()}, {grad.dtype}")
    return MergeGradSpec(one, DTYPES[grad.dtype], _last(grad), tuple(weights), scales)


def _source(weight: Tensor, largest: Tensor) -> Source:
    sizes = list(zip(weight.shape[2:], largest.shape[2:], strict=True))
    if weight.shape[:2] != largest.shape[:2] or any(size > most or (most - size) % 2 for size, most in sizes):
        raise Unsupported(f"weight of shape {tuple(weight.shape)} in one of {tuple(largest.shape)}")
    if (reason := layout_obstacle(weight)) is not None:
        raise Unsupported(reason)
    return Source(_three(tuple(weight.shape[2:])), DTYPES[weight.dtype], _last(weight))


def _three(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    one, two, three = (*sizes, 1, 1, 1)[:3]
    return one, two, three


def _last(weight: Tensor) -> bool:
    """Return True for channels_last, False if both layouts are the same order in memory."""
    return bool(is_channels_last(weight)) and weight.shape[1] > 1 and weight[0, 0].numel() > 1
