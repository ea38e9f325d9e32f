"""Write the fold so that Inductor neither copies weights nor folds them in scalar C++.

Inductor converts the operands of convolutions, and what they are computed from, to channels_last. Its generated code
shows two consequences:

- A contiguous weight that is folded and saved for backward is a graph output as well as such an operand. Inductor then
  returns a channels_last copy of it instead of the parameter. ResNet-50 at batch 8 keeps 299 MB with
  `preserve_strides` and 344 MB without (measured on a CPU at commit 1feb91f).
- The C++ that folds a contiguous weight into a channels_last one is scalar. Vectorized code transposes 16 x 16 tiles,
  but Inductor finds it only if the loop over channels is not contiguous in memory, see `fold_vectorized`. On ResNet-18,
  batch 4, one CPU thread, the forward's kernels then take 42 ms instead of 58 (measured, docs/experiments.md).

Both functions use `as_strided`, whose operand Inductor never converts. That is safe for tensors whose layout is known
before autograd, such as inputs and new tensors, but not for the output of a convolution, which may get different
strides.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from ..dispatch import needs_plain_autograd
from . import reference


class _Identity(torch.autograd.Function):
    """A function that only lays its input out. The derivative of `as_strided` would be a scatter into zeros."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _PreserveStrides(_Identity):
    """Identity. The result is a view with the strides of the input."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.as_strided(tensor.size(), tensor.stride())


def preserve_strides(weight: Tensor) -> Tensor:
    """Return a view of the weight that Inductor reads with the weight's own strides. Any shape and dtype."""
    if has_torch_function_unary(weight):
        return handle_torch_function(preserve_strides, (weight,), weight)
    return weight if needs_plain_autograd(weight) else _PreserveStrides.apply(weight)


class _StrideOfTwo(_Identity):
    """Identity. The result has a stride of two elements and is computed once."""

    @staticmethod
    def forward(scale: Tensor) -> Tensor:
        twice = torch.stack([scale, scale], 1)
        return twice.as_strided(twice.size(), twice.stride())[:, 0]


def fold_vectorized(weight: Tensor, *vectors_and_eps: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the same values as `reference.fold_reference`, from code that Inductor's C++ vectorizes.

    The scale is computed into a vector with a stride of two elements. With a stride of one Inductor finds a third loop
    to vectorize, beside the two that transpose to channels_last, and vectorizes none. If the scale is not computed
    beforehand, the C++ takes a square root for every element.

    Takes the arguments of `reference.fold_reference`, eps positionally.
    """
    tensors = (weight, *vectors_and_eps[:5])
    if has_torch_function(tensors):
        return handle_torch_function(fold_vectorized, tensors, weight, *vectors_and_eps, **options)
    scale, shift = reference.scale_and_shift(weight, *vectors_and_eps, **options)
    scale = scale if needs_plain_autograd(scale) else _StrideOfTwo.apply(scale)
    return reference.scaled(weight, scale, **options), shift


def would_be_copied(weight: Tensor) -> bool:
    """Return whether Inductor may copy this weight to channels_last: a 4-D tensor in another layout."""
    if is_functorch_wrapped_tensor(weight) or weight.ndim != 4:
        return False
    return not weight.is_contiguous(memory_format=torch.channels_last)
