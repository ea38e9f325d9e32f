"""The fold by hand, on tensors and on modules, without a graph."""

from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import has_torch_function

from . import algebra
from .calls import Reason
from .dialects.modules import batch_norm_obstacle, obstacle, spell_out
from .kernel_choice import kernel_runs
from .kernels.inputs import FoldInputs, unsupported_reason
from .ops import FOLD, Columns


@wraps(algebra.fold)
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
    if not _is_for_kernel(pair):
        return algebra.fold(*pair[:7], transposed=transposed, groups=groups, dtype=dtype)
    folded_weight, folded_bias = FOLD(*Columns.of([pair]))
    return folded_weight, folded_bias


def _is_for_kernel(pair: FoldInputs) -> bool:
    """Whether one launch of a kernel computes it; what it has no gradient or no words for is the algebra's."""
    tensors = pair[:6]
    if torch.compiler.is_compiling() or has_torch_function(tensors) or not kernel_runs(pair.weight.device):
        return False
    if any(t is not None and is_functorch_wrapped_tensor(t) for t in tensors):
        return False  # torch.func transforms do not reach through an operator on lists of tensors
    if pair.running_mean.requires_grad or pair.running_var.requires_grad:
        return False
    return unsupported_reason(pair) is None


def conv_bn_eval(bn: _BatchNorm, conv: nn.Module, x: Tensor) -> Tensor:
    """``bn(conv(x))`` as one convolution, for a BatchNorm in eval mode. Differentiable.

    Args:
        bn: BatchNorm1d, 2d, 3d or SyncBatchNorm in eval mode, with running statistics of C_out channels.
        conv: Conv1d to Conv3d, ConvTranspose1d to ConvTranspose3d, or Linear.
        x: the convolution's input: batched, ``(N, C_in, *spatial)``; ``(N, C_in)`` for Linear.

    Returns:
        ``(N, C_out, *spatial)``, in the dtype that ``conv`` returns.

    Raises:
        TypeError: the modules are of other types.
        ValueError: the two do not fold exactly; the message says why.

    Source: arXiv 2305.11624, section 3.
    """
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
    if reason is not None and reason is not Reason.PARAMETRIZED:  # its weight is computed right here
        raise ValueError(f"conv_bn_eval: cannot fold: {reason.text}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(f"conv_bn_eval: cannot fold: {Reason.NO_RUNNING_STATS.text}")
    options = spelled.options
    bn_weight: Tensor | None = bn.weight
    bn_bias: Tensor | None = bn.bias
    in_half = weight.dtype == torch.float16 or (
        torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.float16
    )
    q = algebra.headroom(bn_weight, bn_bias, bn.running_var, bn.eps) if in_half else None
    if q is not None:
        bn_weight, bn_bias = algebra.divided(bn_weight, q), None if bn_bias is None else algebra.divided(bn_bias, q)
    weight, bias = fold(
        weight,
        conv.bias,  # type: ignore[arg-type]
        bn_weight,
        bn_bias,
        bn.running_mean,
        bn.running_var,
        bn.eps,
        transposed="output_padding" in options,
        groups=options.get("groups", 1),
    )
    if spelled.pad is not None:
        x = F.pad(x, spelled.pad[0], mode=spelled.pad[1])
    output = spelled.function(x, weight, bias, **options)
    return output if q is None else algebra.scaled_back(output, q)
