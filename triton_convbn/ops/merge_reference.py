"""The merged weight of a sum of branches in plain torch, and the parts of it that the branches' gradients read."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .strides import preserve_strides


def merged_weight(
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    identity: Tensor | None,
    kernel: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Return ``sum_k embed(scale_k * weight_k) + diag(identity)``, in the dtype of the scales. Differentiable.

    Args:
        weights: ``(C_out, C_in / groups, *kernel_k)`` each.
        scales: (C_out,) each.
        identity: (C_out,) or None.
        kernel, groups: As in `branches.fold_branches`.
    """
    scales, identity = _computed_once(weights, scales, identity)
    by_size: dict[tuple[int, ...], Tensor] = {}  # kernels of one size are added before they are embedded
    for weight, scale in zip(weights, scales, strict=True):
        product = weight.to(scale.dtype) * scale.reshape(-1, *(1,) * (weight.ndim - 1))
        size = tuple(weight.shape[2:])
        by_size[size] = by_size[size] + product if size in by_size else product
    if identity is not None:
        size = (1,) * len(kernel)
        diagonal = _diagonal(identity, weights[0], groups)
        by_size[size] = by_size[size] + diagonal if size in by_size else diagonal
    total = by_size.pop(kernel)
    for size, product in by_size.items():
        total = total + F.pad(product, _margins(size, kernel))
    return total


def _computed_once(
    weights: Sequence[Tensor], scales: Sequence[Tensor], identity: Tensor | None
) -> tuple[Sequence[Tensor], Tensor | None]:
    """Return the scales so that the C++ of Inductor computes them before it reads the weights.

    Else it takes a root and a division for each vector of 16 elements: a block of four 1x1 convolutions of 256 channels
    takes 82 us and not 57, of 1024 channels 1.0 ms and not 0.7. Below 64 elements a channel there is no difference.
    """
    if weights[0].device.type != "cpu" or weights[0].shape[1:].numel() < 64:
        return scales, identity
    once = preserve_strides
    return list(map(once, scales)), None if identity is None else once(identity)


def _margins(size: tuple[int, ...], kernel: tuple[int, ...]) -> list[int]:
    """Return the arguments of `F.pad` that embed a kernel in a larger one."""
    return [(k - n) // 2 for k, n in zip(reversed(kernel), reversed(size), strict=True) for _ in range(2)]


def _diagonal(identity: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return the kernel of ``identity * x``, ``(C_out, C_in / groups, 1, ...)``."""
    channels, columns = weight.shape[:2]
    diagonal = identity[:, None]
    if columns > 1:  # output channel c reads input channel c, which is (c mod C_in / groups) in its group
        own = torch.arange(channels, device=weight.device)
        own = own if columns == channels else own % columns
        on = own[:, None] == torch.arange(columns, device=weight.device)
        diagonal = torch.where(on, diagonal, 0.0)  # not a product, which is NaN if the scale is not finite
    return diagonal.reshape(channels, columns, *(1,) * (weight.ndim - 2))


def adds_input_last(weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the input of a sum is added after the convolution, and not as a part of the merged weight.

    Among the products of a convolution the input makes every partial sum as large as itself: merged, gradients
    of repvgg_a0 and fastvit_t8 have 1.44 and 1.21 times the error of eager's, else 1.25 and 1.06. In 16 bit the sum
    would be rounded once more. A depthwise convolution has few products and waits for memory: inference of fastvit_t8
    would take 4 to 9 % longer for 1.05 instead of 1.08 (CPU, see docs/experiments.md).
    """
    return dtype.itemsize > 2 and weight.shape[1] > 1


def apart(identity: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return what of the input's scale belongs in the weight, and the scale to add the input with afterwards.

    The first is zero. It is there for its gradient, the diagonal of dW', which takes no pass over the activations.
    """
    if not identity.requires_grad:
        return None, identity
    fixed = identity.detach()
    return identity - fixed, fixed


def add_input(output: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Return ``output + scale * x`` for ``(N, C_out, *spatial)`` and a scale of (C_out,)."""
    if has_torch_function((output, x, scale)):
        return handle_torch_function(add_input, (output, x, scale), output, x, scale)
    return torch.addcmul(output, x, scale.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 2)))


def cropped(merged: Tensor, weight: Tensor) -> Tensor:
    """Return a view of the elements to which a smaller kernel is added."""
    if merged.shape == weight.shape:
        return merged
    for dim, (k, n) in enumerate(zip(merged.shape, weight.shape, strict=True)):
        if n < k:
            merged = merged.narrow(dim, (k - n) // 2, n)
    return merged


def diagonal_of(weight: Tensor, groups: int) -> Tensor:
    """Return a view of the elements that the identity is added to, ``(groups, C_out / groups)``, or (C_out, 1)."""
    centre = weight
    for size in reversed(weight.shape[2:]):
        centre = centre.select(-1, size // 2)
    # By view and sum, not unflatten and flatten: legacy vmap, under batched gradients, has no rule for these.
    return centre if centre.shape[1] == 1 else centre.view(groups, -1, centre.shape[1]).diagonal(0, 1, 2)


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum over each channel of the product, (C_out,)."""
    # Not a batched product of rows, which takes 4 times as long: 0.71 ms for (256, 256, 3, 3), this 0.18 (CPU).
    return (one * other).sum(tuple(range(1, one.ndim)))
