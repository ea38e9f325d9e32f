"""Tensor subclasses of the kinds that users have: wrappers, quantized weights, and classes that only add a type."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

_aten = torch.ops.aten


class Tagged(Tensor):
    """A tensor that computes as a plain one does. Results have the same type."""


class OwnParameter(nn.Parameter):
    """A parameter of a class of its own."""


_PRODUCTS = {F.linear, torch.convolution, torch.conv1d, torch.conv2d, torch.conv3d}
_PRODUCTS |= {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}


class Quantized(Tensor):
    """A weight in int8 with one scale. Convolutions and Linear dequantize it. It has no elementwise products."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> "Quantized":
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.int_data, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["int_data", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _context: Any, _size: Any, _stride: Any) -> "Quantized":
        return Quantized(inner["int_data"], inner["scale"])

    def dequantize(self) -> Tensor:
        return self.int_data.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            args = [each.dequantize() if isinstance(each, Quantized) else each for each in args]
            kwargs = {k: each.dequantize() if isinstance(each, Quantized) else each for k, each in kwargs.items()}
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (_aten.detach.default, _aten.clone.default, _aten.alias.default):
            return Quantized(func(args[0].int_data), args[0].scale)
        raise NotImplementedError(f"a quantized weight has no {func}")


def _quantized(value: Tensor) -> Tensor:
    scale = torch.full((), 1 / 32, dtype=value.dtype)
    return Quantized((value / scale).round().clamp(-127, 127).to(torch.int8), scale)


SUBCLASSES: dict[str, Any] = {
    "wrapper": lambda value: TwoTensor(value, value * 0.5),
    "tagged": lambda value: value.as_subclass(Tagged),
    "own parameter": OwnParameter,
    "quantized": _quantized,
}
"""By name, how to make one from a plain tensor."""


def plain(value: Tensor) -> Tensor:
    """Return the values of a tensor of any class, detached."""
    value = value.detach()
    if isinstance(value, TwoTensor):
        return torch.stack([plain(value.a), plain(value.b)])
    if isinstance(value, Quantized):
        return value.dequantize()
    return value.as_subclass(Tensor).clone()
