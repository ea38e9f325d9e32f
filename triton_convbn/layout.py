"""Keeps Inductor from copying a parameter only because it is saved for backward.

Inductor turns the operands of convolutions channels_last, and whatever leads to them. A contiguous weight that a fold
reads and that backward needs again is both a graph output and such an operand, so that Inductor returns a channels_last
copy of it instead of the parameter itself: 50 MB for ResNet-50, at any batch size (298.7 MB kept at batch 8 with
`pinned`, 344.0 without). The one thing that it leaves as it lies is the operand of an `as_strided`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class _Pinned(torch.autograd.Function):
    """The identity. A function of its own because the derivative of `as_strided` is a scatter into zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return weight.as_strided(weight.size(), weight.stride())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def pinned(weight: Tensor) -> Tensor:
    """The weight itself, as a view that Inductor reads in the layout in which it lies. Any shape and dtype."""
    if has_torch_function_unary(weight):
        return handle_torch_function(pinned, (weight,), weight)
    return _Pinned.apply(weight)


def would_be_copied(weight: Tensor) -> bool:
    """Whether Inductor would copy this weight to channels_last: a plain 4-D one that is not channels_last yet."""
    if is_traceable_wrapper_subclass(weight) or weight.ndim != 4:
        return False
    return not weight.is_contiguous(memory_format=torch.channels_last)
