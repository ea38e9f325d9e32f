"""Eager-mode API: fold tensors, a BatchNorm and the layer before or after it, or a sum of branches, without a graph."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .eager_modules import cannot, read, reads_input, terms_of, vectors_obstacle, vectors_of
from .graph.branch import sum_obstacle
from .graph.calls import is_subclass
from .graph.input_norms import padding_obstacle
from .graph.reasons import Reason
from .kernels.inputs import FoldInputs
from .ops.autograd import as_autocast_does, conv_with_fold, folded, uses_kernel
from .ops.branches_autograd import conv_with_branches
from .ops.input_norm_autograd import conv_with_input_norm


def fold(
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
    """Fold an eval-mode BatchNorm into the weight and bias of the convolution or Linear before it.

        s = bn_weight * rsqrt(running_var + eps)     W' = weight * s     b' = (bias - running_mean) * s + bn_bias

    A generated kernel computes it on a device that has one, plain torch elsewhere. Twice differentiable.

    Args:
        weight: ``(C_out, C_in / groups, *kernel)``; ``(C_out, C_in)`` for Linear; ``(C_in, C_out / groups, *kernel)``
            if ``transposed``. Any strides; W' has the same.
        bias: ``(C_out,)`` or None.
        bn_weight, bn_bias: ``(C_out,)`` or None, the affine parameters.
        running_mean, running_var: ``(C_out,)``, the running statistics.
        eps: Added to the variance.
        transposed: The weight belongs to a transposed convolution.
        groups: Groups of a transposed convolution. Not needed for others, whose C_out is ``weight.shape[0]``.
        dtype: Dtype of the results, ``weight.dtype`` if None.

    Returns:
        ``(W', b')``, shaped like ``weight`` and ``(C_out,)``. The arithmetic is in fp32, or in fp64 if any argument is
        fp64, and is rounded once, at the end. In fp16 W' overflows where s is large, with a variance below 1e-8 for
        example: `conv_bn_eval` stays in range there, and so does ``dtype=torch.float32``.

    Raises:
        TypeError: An argument is complex, integer or has a float dtype that convolutions do not support.
        ValueError: The shapes do not match.

    Source: arXiv 2305.11624, section 3.
    """
    pair = FoldInputs(weight, bias, bn_weight, bn_bias, running_mean, running_var, eps, transposed, groups, dtype)
    weight, bias, _ = folded(pair, uses_kernel(pair))
    return weight, bias


def conv_bn_eval(conv: nn.Module, bn: _BatchNorm, x: Tensor) -> Tensor:
    """Return ``bn(conv(x))`` as one convolution, for a BatchNorm in eval mode. Twice differentiable.

    Backward folds again. Autograd saves neither the convolution's output nor the folded weight.

    Args:
        conv: Conv1d to Conv3d, ConvTranspose1d to ConvTranspose3d, or Linear, with C_out output channels.
        bn: BatchNorm1d, 2d, 3d or SyncBatchNorm in eval mode, with running statistics of C_out channels.
        x: The convolution's input, ``(N, C_in, *spatial)``, or ``(N, C_in)`` for Linear. Any floating dtype.

    Returns:
        ``(N, C_out, *spatial)``, in the dtype of ``conv(x)``.

    Raises:
        TypeError: a module has another type.
        ValueError: the BatchNorm does not accept the convolution's output, a module is lazy, or the two do not fold
            exactly. The message says why.

    Source: arXiv 2305.11624, section 3.
    """
    spelled, reason = read("conv_bn_eval", conv, bn, x)
    weight: Tensor = conv.weight  # type: ignore[assignment]
    channels = weight.shape[1] * spelled.options["groups"] if "output_padding" in spelled.options else weight.shape[0]
    reason = reason or vectors_obstacle(bn, channels, as_autocast_does(x, weight, None)[1] or weight.dtype)
    if reason is not None:
        raise cannot("conv_bn_eval: cannot fold", reason, (x, weight, *vectors_of(bn)))
    assert bn.running_mean is not None
    assert bn.running_var is not None
    if spelled.pad is not None:
        x = F.pad(x, spelled.pad[0], mode=spelled.pad[1])
    return conv_with_fold(
        x,
        weight,
        conv.bias,  # type: ignore[arg-type]
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        bn.eps,
        transposed="output_padding" in spelled.options,
        **spelled.options,
    )


def bn_conv_eval(bn: _BatchNorm, conv: nn.Module, x: Tensor) -> Tensor:
    """Return ``conv(bn(x))`` as one convolution, for a BatchNorm in eval mode. Twice differentiable.

    Backward folds again. Autograd saves x, and neither ``bn(x)`` nor the folded weight.

    Args:
        bn: BatchNorm1d, 2d, 3d or SyncBatchNorm in eval mode, with running statistics of C_in channels.
        conv: Conv1d to Conv3d that does not pad with zeros, or Linear, with C_in input channels.
        x: The BatchNorm's input, ``(N, C_in, *spatial)``, or ``(N, C_in)`` for Linear. Any floating dtype.

    Returns:
        ``(N, C_out, *spatial)``, in the dtype of ``conv(bn(x))``.

    Raises:
        TypeError: a module has another type.
        ValueError: a module is lazy, or the two do not fold exactly. The message says why.

    Source: arXiv 2305.11624, section 3.
    """
    spelled, reason = read("bn_conv_eval", conv, bn, x)
    weight: Tensor = conv.weight  # type: ignore[assignment]
    if "output_padding" in spelled.options:
        reason = reason or Reason.TRANSPOSED
    reason = reason or vectors_obstacle(bn, weight.shape[1] * spelled.options.get("groups", 1), x.dtype)
    reason = reason or padding_obstacle(spelled.options.get("padding", 0), weight)
    if is_subclass(x):
        reason = reason or Reason.TENSOR_SUBCLASS
    if as_autocast_does(x, weight, None)[0].dtype != x.dtype:
        reason = reason or Reason.DTYPE  # autocast would round x instead of bn(x)
    if reason is not None:
        raise cannot("bn_conv_eval: cannot fold", reason, (x, weight, *vectors_of(bn)))
    assert bn.running_mean is not None
    assert bn.running_var is not None
    if spelled.pad is not None:
        x = F.pad(x, spelled.pad[0], mode=spelled.pad[1])
    vectors = bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps
    return conv_with_input_norm(x, weight, conv.bias, *vectors, **spelled.options)  # type: ignore[arg-type]


def conv_sum_eval(branches: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Return ``sum(branch(x) for branch in branches)`` as one convolution, for BatchNorms in eval mode.

    Backward merges again. Autograd saves x and none of the branches' outputs. Twice differentiable.

    Args:
        branches: Each is a Conv1d to Conv3d, a BatchNorm, an Identity, or a Sequential of a convolution and BatchNorms.
            One convolution's kernel holds all the others.
        x: The input of every branch, ``(N, C_in, *spatial)``. Any floating dtype.

    Returns:
        ``(N, C_out, *spatial)``, in the dtype of the convolutions.

    Raises:
        TypeError: a module has another type.
        ValueError: the sum is not exactly one convolution. The message says why.

    Source: arXiv 2101.03697, section 3.3.

    Example:
        A block of RepVGG::

            conv_sum_eval([nn.Sequential(conv3x3, bn3), nn.Sequential(conv1x1, bn1), bn0], x)
    """
    tensors, terms, convs, norms = terms_of(branches)
    if not convs:
        raise ValueError("conv_sum_eval: no branch has a convolution")
    with_input = any(reads_input(term) for _, term in terms)
    found = sum_obstacle(convs, norms, x if with_input else None)
    reason = None if found is None else found[0]
    conv, (*_, groups, grid) = max(convs, key=lambda each: each[1].grid.kernel)
    if any(map(is_subclass, (*tensors, x))):
        reason = Reason.TENSOR_SUBCLASS
    elif x.ndim != len(grid.kernel) + 2:
        reason = Reason.UNBATCHED
    elif len({each.weight.dtype for each, _ in convs}) > 1:
        reason = Reason.DTYPE
    elif with_input and as_autocast_does(x, conv.weight, None)[0].dtype != x.dtype:
        reason = Reason.DTYPE  # autocast rounds the convolutions and not x, so that their sum is wider
    if reason is not None:
        raise cannot("conv_sum_eval: cannot merge", reason, (*tensors, x))
    options: dict[str, Any] = {"stride": grid.stride, "padding": grid.padding, "dilation": grid.dilation}
    return conv_with_branches(x, tensors, ("sum", *terms), groups=groups, **options)
