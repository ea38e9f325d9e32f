"""Compute the gradient of a large convolution weight as one product of matrices, on one thread of a CPU.

    dW[o, i, k] = sum over images and positions p of dy[o, p] * x[i, p * stride + k * dilation - padding]

oneDNN computes it in blocks, and then stores these in the order of the weight. Where the weight has more elements than
the second-level cache, that takes as long as the sums. One product of dy and the columns of x stores dW once: it takes
0.5 to 0.9 of the time if the columns are at most as large as the weight, and its error is as large or smaller. Measured
with one thread of an AMD EPYC (Zen 4), see docs/experiments.md. On two threads it takes 0.5 to 1.3 of the time.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import needs_plain_torch

LEAST_ELEMENTS = 2**20
"""Of the weight. 256 x 256 x 3 x 3, half of that, takes 0.98 to 1.12 of the time."""


def is_faster_as_product(grad: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Return whether the product takes less time than the convolution, and autograd need not follow it.

    Args:
        grad: ``(N, C_out, *output)``.
        x: ``(N, C_in, *spatial)``.
        weight: ``(C_out, C_in, *kernel)``, dense and not transposed.
    """
    if weight.numel() < LEAST_ELEMENTS or weight.ndim != 4 or torch.get_num_threads() > 1:
        return False
    if not x.dtype == weight.dtype == grad.dtype == torch.float32 or x.device.type != "cpu":
        return False
    if not products_are_exact() or torch.is_grad_enabled() or needs_plain_torch(grad, x, weight):
        return False
    positions = grad.shape[0] * grad.shape[2:].numel()
    return weight.shape[2:].numel() > 1 and 0 < positions <= weight.shape[0]


def products_are_exact() -> bool:
    """Return whether MKL is there, and the user allows products of matrices no lower precision than convolutions."""
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return torch.backends.mkl.is_available() and precision not in ("bf16", "tf32")


def gradients_as_product(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    of_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the weight and the bias, None if not wanted. Not differentiable.

    Args:
        grad, x, weight: As in `is_faster_as_product`.
        stride, padding, dilation: Those of the convolution, one number for each spatial dimension.
    """
    rows = rows_of_image(grad)
    columns = _columns(x, weight.shape[2:], grad.shape[2:], stride, padding, dilation)
    return torch.mm(rows, columns.t()).view(weight.shape), rows.sum(1) if of_bias else None


def rows_of_image(image: Tensor) -> Tensor:
    """Return ``(N, C, *spatial)`` as ``(C, N * spatial)``."""
    return image.transpose(0, 1).reshape(image.shape[1], -1)


def _columns(
    x: Tensor,
    kernel: Sequence[int],
    output: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return what each element of a kernel reads, ``(C_in * kernel, N * output)``.

    `F.unfold` would have to be transposed afterwards: 1.0 to 1.1 of the time.
    """
    if any(padding):
        x = F.pad(x, [size for size in reversed(padding) for _ in range(2)])
    images, channels, *along = x.stride()
    size = x.shape[1], *kernel, x.shape[0], *output
    within = [step * number for step, number in zip(along, dilation, strict=True)]
    between = [step * number for step, number in zip(along, stride, strict=True)]
    columns = x.as_strided(size, (channels, *within, images, *between))  # the offset stays that of x
    return columns.reshape(-1, x.shape[0] * output[0] * output[1])
