"""A convolution with folded parameters as one function of its parameters, which folds again in backward.

Autograd keeps the weight of a convolution for its backward. A folded weight is a new tensor in every call, so that all
of them are kept: 94 of the 426 MB that ResNet-50 keeps at batch 8 then, 94 of 177 at batch 2. Under Inductor the
partitioner is told to compute them again (`rewrite`). In eager it takes a function around fold and convolution, which
keeps what the fold is made of: parameters and statistics, which are there anyway.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..dispatch import kernel_runs
from ..kernels.inputs import FoldInputs, unsupported_reason
from ..kernels.spec import Needs
from . import fallback, library, reference
from .packed_pairs import PackedPairs
from .strides import in_transform

Sizes = int | Sequence[int]


def uses_kernel(pair: FoldInputs) -> bool:
    """Whether one launch of a kernel computes the fold; what it has no gradient or no words for is the algebra's."""
    tensors = pair[:6]
    if torch.compiler.is_compiling() or has_torch_function(tensors) or not kernel_runs(pair.weight.device):
        return False
    if any(t is not None and is_functorch_wrapped_tensor(t) for t in tensors):
        return False  # torch.func transforms do not reach through an operator on lists of tensors
    if pair.running_mean.requires_grad or pair.running_var.requires_grad:
        return False
    return unsupported_reason(pair) is None


def folded(pair: FoldInputs, kernel: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(W', b', None)`` of one pair, with prescale ``(W' / q, b' / q, q)``, by one launch or by plain torch.
    Differentiable."""
    weight, bias, *power = library.fold_op(*PackedPairs.pack([pair])) if kernel else fallback.fold_fallback(pair)
    return weight, bias, power[0].detach() if power else None


class _Conv(NamedTuple):
    """A convolution but for its tensors, each size one number a spatial dimension; of a Linear there are none."""

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
        """The gradients of x, weight and bias, None where not wanted. Differentiable."""
        if weight.ndim == 2:
            of_x, of_weight, of_bias = wanted
            return (
                grad @ weight if of_x else None,
                _rows(grad).t() @ _rows(x) if of_weight else None,
                _rows(grad).sum(0) if of_bias else None,
            )
        channels = weight.shape[1] * self.groups if self.transposed else weight.shape[0]
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
            grad, x, weight, [channels], *self, wanted
        )
        return found


def _rows(tensor: Tensor) -> Tensor:
    """Return ``(*, C)`` as ``(N, C)``. By a reshape: legacy vmap, under batched gradients, has no rule for flatten."""
    return tensor if tensor.ndim == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


class _ConvWithFold(torch.autograd.Function):
    """``conv(x, *fold(...))``. It keeps the input and what the fold is made of.

    Its backward is made of differentiable operations on what was kept, so that a second derivative is right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> Tensor:
        *tensors, rest, conv, kernel = arguments
        return _convolved(x, FoldInputs(*tensors, *rest), conv, kernel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.rest, ctx.conv, ctx.kernel = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        pair = FoldInputs(*tensors, *ctx.rest)
        of_x, *flags = ctx.needs_input_grad[:5]
        needs = Needs(*flags)
        weight, _, power = folded(pair, ctx.kernel)
        grad = grad if power is None else reference.scaled_back(grad, power, linear=weight.ndim == 2)
        wanted = of_x, needs.weight or needs.bn_weight, needs.bias or needs.bn_weight or needs.bn_bias
        dx, *grads = ctx.conv.backward(grad, x, weight, wanted)
        if not any(flags):
            found: Sequence[Tensor | None] = [None] * 4
        elif ctx.kernel:
            powers = [] if power is None else [power]
            (found,) = library.fold_backward(PackedPairs.pack([pair]), [(grads[0], grads[1])], [needs], powers)
        else:
            every = fallback.fold_backward_fallback(pair, grads[0], grads[1], power)
            found = [one if flag else None for one, flag in zip(every, flags, strict=True)]
        return (dx, *found, *[None] * 5)  # statistics and what is no tensor have none


def _convolved(x: Tensor, pair: FoldInputs, conv: _Conv, kernel: bool) -> Tensor:
    weight, bias, power = folded(pair, kernel)
    output = conv(x, weight, bias)
    return output if power is None else reference.scaled_back(output, power, linear=weight.ndim == 2)


def conv_with_fold(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    *,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    transposed: bool = False,
    output_padding: Sizes = 0,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    kernel: bool = True,
) -> Tensor:
    """The convolution of x with folded parameters; backward folds anew instead of keeping the folded weight.

    Args:
        x: batched, ``(N, C_in, *spatial)``; ``(*, C_in)`` for a Linear, whose weight has two dimensions.
        weight to eps, groups, transposed, dtype: as `reference.fold_reference` takes them. Under autocast, which `dtype` need not
            repeat, the folded weight is rounded once, to autocast's dtype.
        stride, padding, dilation, output_padding: as torch's convolutions take them.
        kernel: a generated kernel may compute the fold where one runs; else it is plain torch.

    Returns:
        ``(N, C_out, *spatial)``. Twice differentiable.

    Source: arXiv 2305.11624, section 3.
    """
    tensors = (x, weight, bias, bn_weight, bn_bias, running_mean, running_var)
    if has_torch_function(tensors):  # an fx.Proxy stays one call
        keywords: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        keywords |= {"transposed": transposed, "output_padding": output_padding, "dtype": dtype, "kernel": kernel}
        return handle_torch_function(conv_with_fold, tensors, *tensors, eps, **keywords)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        rounded = torch.get_autocast_dtype(x.device.type)
        x = x if x.dtype == torch.float64 else x.to(rounded)
        dtype = None if weight.dtype == torch.float64 else rounded
    parameters = weight, bias, bn_weight, bn_bias, running_mean, running_var
    prescale = (dtype or weight.dtype) == torch.float16
    pair = FoldInputs(*parameters, eps, transposed, groups, dtype, prescale=prescale)
    n = weight.ndim - 2
    sides = _sides(padding, dilation, weight)
    if any(left != right for left, right in sides):
        x = F.pad(x, [more for left, right in reversed(sides) for more in (0, right - left)])
    conv = _Conv(
        _spread(stride, n),
        tuple(left for left, _ in sides),
        _spread(dilation, n),
        transposed,
        _spread(output_padding, n),
        groups,
    )
    kernel = kernel and uses_kernel(pair)
    if in_transform(x, *parameters):
        return _convolved(x, pair, conv, kernel=False)
    if torch.compiler.is_compiling() or running_mean.requires_grad or running_var.requires_grad:
        return _convolved(x, pair, conv, kernel)  # a compiler decides by itself, and statistics have no formula here
    return _ConvWithFold.apply(x, *parameters, pair[6:], conv, kernel)


def _spread(sizes: Sizes, dimensions: int) -> tuple[int, ...]:
    """One number for each spatial dimension, from one for all."""
    if not isinstance(sizes, Sequence):
        return (sizes,) * dimensions
    return tuple(sizes) * dimensions if len(sizes) == 1 else tuple(sizes)


def _sides(padding: Sizes | str, dilation: Sizes, weight: Tensor) -> list[tuple[int, int]]:
    """What is padded before and after each spatial dimension. "same" pads an odd number with one more after."""
    n = weight.ndim - 2
    if not isinstance(padding, str):
        return [(size, size) for size in _spread(padding, n)]
    if padding == "valid":
        return [(0, 0)] * n
    totals = [each * (size - 1) for each, size in zip(_spread(dilation, n), weight.shape[2:], strict=True)]
    return [(total // 2, total - total // 2) for total in totals]
