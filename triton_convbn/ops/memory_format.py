"""Copy a tensor to channels_last, so that its gradient has the layout that it had before."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..dispatch import needs_plain_torch


class _ChannelsLast(torch.autograd.Function):
    """Copy. The gradient is contiguous, as that of a convolution of contiguous tensors is: callers may view it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def to_channels_last(tensor: Tensor) -> Tensor:
    """Return a copy in channels_last, of ``(N, C, H, W)`` contiguous. Twice differentiable.

    Returns the tensor itself under transforms of torch.func, forward-mode AD and compilation, and for tensor
    subclasses: the layout changes no value.
    """
    if has_torch_function_unary(tensor):
        return handle_torch_function(to_channels_last, (tensor,), tensor)
    return tensor if needs_plain_torch(tensor) else _ChannelsLast.apply(tensor)
