"""The merged weight of a sum of branches in plain torch, and the parts of it that the branches' gradients read."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..dispatch import device_type, needs_plain_autograd
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
        size = kernel_of(weight)
        by_size[size] = by_size[size] + product if size in by_size else product
    if identity is not None:
        size = (1,) * len(kernel)
        diagonal = _diagonal(identity, weights[0], groups)
        by_size[size] = by_size[size] + diagonal if size in by_size else diagonal
    total = by_size.pop(kernel)
    for product in by_size.values():
        total = total + _embedded(product, kernel)
    return total


def has_input(scales: Tensor, weights: Sequence[Tensor]) -> bool:
    """Return whether the input is a term, whose scale follows those of the weights."""
    return len(scales) > len(weights)


def rows_of(scales: Tensor, weights: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
    """Return the scale of each weight, and that of the input if it is a term."""
    rows = scales.unbind()
    return rows[: len(weights)], rows[-1] if has_input(scales, weights) else None


def kernel_of(weight: Tensor) -> tuple[int, ...]:
    """Return the sizes of a kernel, as numbers: `torch.jit.trace` makes tensors of sizes, which are no keys."""
    return tuple(int(size) for size in weight.shape[2:])


def _embedded(product: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Return a smaller kernel in the middle of zeros. It may still have to be broadcast."""
    size = kernel_of(product)
    if device_type(product.device) == "cpu" and product.shape[1] == 1 and set(size) == {1}:
        # With padding, Inductor's C++ takes the rows of a kernel one by one: 32 us for 256 channels, this 23.
        numbers = torch.arange(math.prod(kernel)).view(kernel)
        return torch.where(numbers == math.prod(kernel) // 2, product, 0.0)
    return F.pad(product, _margins(size, kernel))


def _computed_once(
    weights: Sequence[Tensor], scales: Sequence[Tensor], identity: Tensor | None
) -> tuple[Sequence[Tensor], Tensor | None]:
    """Return the scales so that the C++ of Inductor computes them before it reads the weights.

    Otherwise it takes a root and a division for each vector of 16 elements: a block of four 1x1 convolutions takes 82
    instead of 57 us with 256 channels, and 1.0 instead of 0.7 ms with 1024. Below 64 elements a channel there is no
    difference.
    """
    if weights[0].shape[1:].numel() < 64:
        return scales, identity
    return list(map(_before_the_loop, scales)), None if identity is None else _before_the_loop(identity)


def _before_the_loop(vector: Tensor) -> Tensor:
    """Return a vector that Inductor's C++ computes before the loop that reads it."""
    return preserve_strides(vector) if device_type(vector.device) == "cpu" else vector


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
    of repvgg_a0 and fastvit_t8 have 1.44 and 1.21 times the error of eager's, else 1.25 and 1.06 (measured with AVX2,
    docs/numerics.md). In 16 bit the sum would be rounded once more. A depthwise convolution has few products and waits
    for memory: inference of fastvit_t8 would take 4 to 9 % longer for 1.05 instead of 1.08 (measured on a CPU,
    docs/experiments.md).
    """
    return dtype.itemsize > 2 and weight.shape[1] > 1


class _GradientOfInput(torch.autograd.Function):
    """The weight itself. The gradient of the input's scale is the diagonal of the weight's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, identity: Tensor, groups: int) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        _, identity, ctx.groups = inputs
        ctx.dtype = identity.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # Not `diagonal_of`: Inductor's lowering of `diagonal` warns that it is deprecated (torch 2.14).
        columns = grad.shape[1]
        square = _centre(grad).reshape(ctx.groups, columns * columns)
        return grad, square[:, :: columns + 1].reshape(-1).to(ctx.dtype), None


def apart(weight: Tensor, identity: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return a merged weight without the input, and the scale to add the input with afterwards.

    The gradient of the input's scale goes through the weight: it is the diagonal of dW', which takes no pass over the
    activations. A diagonal of zeros in the weight would have that gradient, too, but Inductor's C++ takes 0.46 ms
    instead of 0.26 for a block of 192 channels of repvgg_a0.
    """
    if not identity.requires_grad or torch.jit.is_tracing():  # a trace is checked against one without gradients
        return weight, identity
    fixed = identity.detach()
    if needs_plain_autograd(weight, identity):
        zeros = _diagonal(identity - fixed, weight, groups).to(weight.dtype)
        return weight + _embedded(zeros, kernel_of(weight)), fixed
    return _GradientOfInput.apply(weight, identity, groups), fixed


def add_input(output: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Return ``output + scale * x`` for ``(N, C_out, *spatial)`` and a scale of (C_out,)."""
    if has_torch_function((output, x, scale)):
        return handle_torch_function(add_input, (output, x, scale), output, x, scale)
    # Otherwise the C++ takes a root for each vector of x: 17.9 instead of 13.5 ms an inference of mobileone_s0.
    scale = _before_the_loop(scale.to(x.dtype))
    return torch.addcmul(output, x, scale.reshape(-1, *(1,) * (x.ndim - 2)))


def cropped(merged: Tensor, weight: Tensor) -> Tensor:
    """Return a view of the elements to which a smaller kernel is added."""
    for dim, start, length in margins(merged.shape, weight.shape):
        merged = merged.narrow(dim, start, length)
    return merged


def margins(merged: Sequence[int], shape: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Return where a smaller kernel lies in a larger one: the dimension, start and length of each `narrow`."""
    sizes = enumerate(zip(merged, shape, strict=True))
    return tuple((dim, (large - small) // 2, small) for dim, (large, small) in sizes if small < large)


def diagonal_of(weight: Tensor, groups: int) -> Tensor:
    """Return a view of the elements that the identity is added to, ``(groups, C_out / groups)``, or (C_out, 1)."""
    centre = _centre(weight)
    # By view and sum, not unflatten and flatten: legacy vmap, under batched gradients, has no rule for these.
    return centre if centre.shape[1] == 1 else centre.view(groups, -1, centre.shape[1]).diagonal(0, 1, 2)


def _centre(weight: Tensor) -> Tensor:
    """Return a view of the elements in the middle of the kernels, ``(C_out, C_in / groups)``."""
    for size in reversed(weight.shape[2:]):
        weight = weight.select(-1, size // 2)
    return weight


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum over each channel of the product, (C_out,)."""
    # Not a batched product of rows, which takes 4 times as long: 0.71 ms for (256, 256, 3, 3), this 0.18 (CPU).
    return (one * other).sum(tuple(range(1, one.ndim)))
