"""Eager-mode API: fold tensors, or a convolution and a BatchNorm, without a graph."""

from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .graph.calls import is_subclass
from .graph.dialects.modules import batch_norm_obstacle, obstacle, spell_out
from .graph.reasons import Reason
from .kernels.inputs import FoldInputs
from .ops import reference
from .ops.autograd import conv_with_fold, folded, uses_kernel
from .options import deprecated


@wraps(reference.fold_reference)
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
        ValueError: the two do not fold exactly. The message says why.

    Source: arXiv 2305.11624, section 3.
    """
    if isinstance(conv, _BatchNorm):
        deprecated("conv_bn_eval(bn, conv, x) is now conv_bn_eval(conv, bn, x)")
        conv, bn = bn, conv
    spelled = spell_out(conv)
    if spelled is None:
        raise TypeError(f"conv_bn_eval: {type(conv).__name__} is no convolution and no Linear")
    if not isinstance(bn, _BatchNorm):
        raise TypeError(f"conv_bn_eval: {type(bn).__name__} is no BatchNorm")
    reason = batch_norm_obstacle(bn) or obstacle(conv, spelled.base, "forward", "_conv_forward")
    weight: Tensor = conv.weight  # type: ignore[assignment]
    if bn.training:
        reason = Reason.TRAINING
    elif x.ndim != weight.ndim:
        reason = Reason.LINEAR_RANK if isinstance(conv, nn.Linear) else Reason.UNBATCHED
    elif any(map(is_subclass, (weight, *bn.parameters(), *bn.buffers()))):
        reason = Reason.TENSOR_SUBCLASS
    if reason is not None and reason is not Reason.PARAMETRIZED:  # its weight is computed right here
        raise ValueError(f"conv_bn_eval: cannot fold: {reason.text}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(f"conv_bn_eval: cannot fold: {Reason.NO_RUNNING_STATS.text}")
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
