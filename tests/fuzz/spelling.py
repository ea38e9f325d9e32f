"""Spell a step as a call of a torch function, and make the call."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from programs import Block, Conv, Norm, Step, substitute
from torch import nn

_NAMES = [
    "torch.add",
    "torch.sub",
    "torch.mul",
    "torch.div",
    "torch.tanh",
    "torch.sigmoid",
    "torch.cos",
    "torch.cat",
    "torch.flatten",
    "torch.relu_",
    "torch.reshape",
    "torch.clone",
    "torch.neg",
    "torch.roll",
    "torch.rsqrt",
    "torch._foreach_add_",
    "F.pad",
    "F.relu",
    "F.dropout",
    "F.gelu",
    "F.silu",
    "F.softplus",
    "F.hardtanh",
    "F.max_pool2d",
    "nn.init.constant_",
    "nn.init.normal_",
    "operator.add",
    "operator.mul",
    "operator.sub",
    "operator.iadd",
    "operator.isub",
    "operator.imul",
    "operator.setitem",
    "operator.getitem",
    "operator.neg",
    "operator.truediv",
    "torch.Tensor.add_",
    "torch.Tensor.mul_",
    "torch.Tensor.normal_",
    "torch.Tensor.renorm_",
    "torch.Tensor.__setitem__",
    "torch.Tensor.__iadd__",
    "torch._C._set_grad_enabled",
    "torch.amp.autocast_mode._enter_autocast",
    "torch.amp.autocast_mode._exit_autocast",
]
_ROOTS = {"torch": torch, "F": F, "nn": nn, "operator": operator}


def _named(name: str) -> Callable[..., Any]:
    root, *rest = name.split(".")
    return functools.reduce(getattr, rest, _ROOTS[root])


FUNCTIONS: dict[str, Callable[..., Any]] = {"getattr": getattr} | {name: _named(name) for name in _NAMES}

_CONVS = {
    (0, False): F.linear,
    (1, False): torch.conv1d,
    (2, False): torch.conv2d,
    (3, False): torch.conv3d,
    (1, True): torch.conv_transpose1d,
    (2, True): torch.conv_transpose2d,
    (3, True): torch.conv_transpose3d,
}

Spelled = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def spell_conv(step: Conv, x: Any, weight: Any, bias: Any) -> Spelled:
    """Return the function of a convolution, its positional arguments and its keywords, without its padding mode."""
    padding = 0 if step.padding_mode != "zeros" else step.padding
    if step.general:
        n = step.dims
        sizes = [[step.stride] * n, [padding] * n, [step.dilation] * n, step.transposed, [step.output_padding] * n]
        return torch.convolution, (x, weight, bias, *sizes, step.groups), {}
    named: dict[str, Any] = {"input": x, "weight": weight, "bias": bias}
    if step.dims:
        named |= {"stride": step.stride, "padding": padding}
        if step.transposed:
            named |= {"output_padding": step.output_padding, "groups": step.groups, "dilation": step.dilation}
        else:
            named |= {"dilation": step.dilation, "groups": step.groups}
    return _CONVS[step.dims, step.transposed], *_split(named, step.positional)


def spell_norm(step: Norm, x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Spelled:
    """Return the function of a BatchNorm, its positional arguments and its keywords."""
    if step.general:
        return torch.batch_norm, (x, weight, bias, mean, var, step.training, 0.1, step.eps, False), {}
    named = {"input": x, "running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    named |= {"training": step.training, "momentum": 0.1, "eps": step.eps}
    return F.batch_norm, *_split(named, step.positional)


def _split(named: dict[str, Any], positional: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the first arguments by position, the others by keyword. A keyword that is None is left out."""
    items = list(named.items())
    keywords = {name: value for name, value in items[positional:] if value is not None}
    return tuple(value for _, value in items[:positional]), keywords


def padding_of(step: Conv) -> list[int]:
    """Return the argument of `F.pad` before a convolution whose padding mode is not zeros."""
    return [int(step.padding)] * (2 * step.dims)


def perform(step: Step, found: Callable[[Any], Any]) -> Any:
    """Make the call on tensors or on graph proxies. Raises TypeError for a block, which is no single call."""
    if isinstance(step, Conv):
        x, weight, bias = (substitute(value, found) for value in (step.x, step.weight, step.bias))
        if step.padding_mode != "zeros":
            x = F.pad(x, padding_of(step), mode=step.padding_mode)
        function, args, kwargs = spell_conv(step, x, weight, bias)
        return function(*args, **kwargs)
    if isinstance(step, Norm):
        values = (substitute(value, found) for value in (step.x, step.mean, step.var, step.weight, step.bias))
        function, args, kwargs = spell_norm(step, *values)
        return function(*args, **kwargs)
    if isinstance(step, Block):
        raise TypeError("a block is no single call")
    args, kwargs = substitute(step.args, found), substitute(step.kwargs, found)
    if step.function.startswith("."):
        return getattr(args[0], step.function[1:])(*args[1:], **kwargs)
    return FUNCTIONS[step.function](*args, **kwargs)
