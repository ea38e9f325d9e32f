"""The options of a convolution, its call, and its gradients."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .weight_gradient import gradients_as_product, is_faster_as_product

Sizes = int | Sequence[int]


def spread(sizes: Sizes, dimensions: int) -> tuple[int, ...]:
    """Return one number for each spatial dimension."""
    if not isinstance(sizes, Sequence):
        return (sizes,) * dimensions
    return tuple(sizes) * dimensions if len(sizes) == 1 else tuple(sizes)


class Convolution(NamedTuple):
    """The options of a convolution, one number for each spatial dimension. A Linear has none."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias) if weight.ndim == 2 else torch.convolution(x, weight, bias, *self)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, weight and bias, None where not wanted. Differentiable.

        That of a contiguous weight is contiguous, also if x is channels_last.
        """
        of_x, of_weight, of_bias = wanted
        if weight.ndim == 2:
            return (
                grad @ weight if of_x else None,
                _rows(grad).t() @ _rows(x) if of_weight else None,
                _rows(grad).sum(0) if of_bias else None,
            )
        if of_weight and is_faster_as_product(grad, x, weight) and not self.transposed and self.groups == 1:
            dx = self._backward(grad, x, weight, (True, False, False))[0] if of_x else None
            return dx, *gradients_as_product(grad, x, weight, self.stride, self.padding, self.dilation, of_bias)
        found = self._backward(grad, x, weight, wanted)
        # On CPU a 1-d convolution returns the weight's gradient in a 2-d shape although it is masked out.
        dw = found[1] if of_weight else None
        if dw is not None and weight.is_contiguous():
            dw = dw.contiguous()
        return found[0] if of_x else None, dw, found[2] if of_bias else None

    def _backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels = weight.shape[1] * self.groups if self.transposed else weight.shape[0]
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            grad, x, weight, [channels], *self, wanted
        )
        return found


def _rows(tensor: Tensor) -> Tensor:
    """Return ``(*, C)`` as ``(N, C)``. By a reshape: legacy vmap, under batched gradients, has no rule for flatten."""
    return tensor if tensor.ndim == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
