"""Keeps Inductor from copying weights from one layout to another, and its C++ from folding them one by one.

Inductor turns the operands of convolutions channels_last, and whatever leads to them. Two things follow, both seen in
its generated code:

- A contiguous weight that a fold reads and that backward needs again is both a graph output and such an operand, so
  that a channels_last copy of it is returned instead of the parameter itself: 50 MB for ResNet-50, at any batch size
  (298.7 MB kept at batch 8 with `preserve_strides`, 344.0 without).
- The C++ that folds a contiguous weight into a channels_last one is scalar. Vectorized, it transposes 16 x 16 tiles;
  Inductor sees that only where a loop over channels is not one over neighbours in memory, see `fold_vectorized`. On ResNet-18,
  batch 4, one thread of a CPU, the kernels of the forward take 43 ms instead of 58 then.

What is never touched is the operand of an `as_strided`: it lies as autograd was told. That holds of a tensor whose
layout is settled before autograd, an input or a new one; what a convolution returns may come to lie otherwise.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import reference


def _as_it_lies(tensor: Tensor) -> Tensor:
    return tensor.as_strided(tensor.size(), tensor.stride())


class _PreserveStrides(torch.autograd.Function):
    """The identity. A function of its own because the derivative of `as_strided` is a scatter into zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.as_strided(tensor.size(), tensor.stride())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def preserve_strides(weight: Tensor) -> Tensor:
    """The weight itself, as a view that Inductor reads in the layout in which it lies. Any shape and dtype."""
    if has_torch_function_unary(weight):
        return handle_torch_function(preserve_strides, (weight,), weight)
    return weight if in_transform(weight) else _PreserveStrides.apply(weight)


class _Spread(torch.autograd.Function):
    """The identity: the same numbers, computed once, two elements apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scale: Tensor) -> Tensor:
        twice = torch.stack([scale, scale], 1)
        return twice.as_strided(twice.size(), twice.stride())[:, 0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def fold_vectorized(
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    transposed: bool = False,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.fold_reference`, number for number, as Inductor makes good C++ of it.

    The scale is computed once, into a vector whose elements lie two apart. With one apart Inductor takes the channels
    for a loop to vectorize, besides the two of the transposition to channels_last, and then vectorizes none; not
    computed beforehand, it is a square root an element.
    """
    tensors = (weight, bias, bn_weight, bn_bias, running_mean, running_var)
    keywords: dict[str, Any] = {"transposed": transposed, "groups": groups, "dtype": dtype}
    if has_torch_function(tensors):
        return handle_torch_function(fold_vectorized, tensors, *tensors, eps, **keywords)
    scale, shift = reference.scale_and_shift(*tensors, eps, **keywords)
    return reference.scaled(weight, scale if in_transform(scale) else _Spread.apply(scale), **keywords), shift


def in_transform(*tensors: Tensor | None) -> bool:
    """Return whether forward mode or a transform of torch.func is at work: plain torch then, which has all the rules."""
    if forward_ad._current_level >= 0:
        return True
    return any(tensor is not None and is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def would_be_copied(weight: Tensor) -> bool:
    """Whether Inductor would copy this weight to channels_last: a plain 4-D one that is not channels_last yet."""
    if is_traceable_wrapper_subclass(weight) or is_functorch_wrapped_tensor(weight) or weight.ndim != 4:
        return False
    return not weight.is_contiguous(memory_format=torch.channels_last)
