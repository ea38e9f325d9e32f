"""Eager-mode API: fold tensors, a convolution and a BatchNorm, or a sum of branches, without a graph."""

from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .graph.branch import Grid
from .graph.calls import is_subclass
from .graph.dialects.modules import batch_norm_obstacle, obstacle, spell_out
from .graph.reasons import Reason
from .kernels.inputs import FoldInputs
from .ops import reference
from .ops.autograd import as_autocast_does, conv_with_fold, folded, uses_kernel
from .ops.branches_autograd import conv_with_branches
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
    tensors: list[Tensor] = []
    terms: list[Any] = []
    convs: list[tuple[nn.Module, Grid]] = []
    norms: list[_BatchNorm] = []

    def position(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensors.append(tensor)
        return len(tensors) - 1

    for branch in branches:
        term: Any = ("input",)
        for module in _layers(branch):
            if isinstance(module, _BatchNorm):
                _check_norm(module, "conv_sum_eval: cannot merge")
                vectors = map(position, (module.weight, module.bias, module.running_mean, module.running_var))
                term = ("norm", term, *vectors, module.eps)
                norms.append(module)
                continue
            grid = _grid_of(module)
            if term != ("input",):
                raise TypeError(f"conv_sum_eval: {type(module).__name__} follows another layer of its branch")
            convs.append((module, grid))
            term = ("conv", position(module.weight), position(module.bias))  # type: ignore[arg-type]
        terms.append((1, term))
    if not convs:
        raise ValueError("conv_sum_eval: no branch has a convolution")
    largest: Any
    largest, grid = max(convs, key=lambda each: each[1].kernel)
    reads_input = any(_reads_input(term) for _, term in terms)
    reason = _sum_obstacle(convs, norms, largest, grid, reads_input)
    if any(map(is_subclass, (*tensors, x))):
        reason = Reason.TENSOR_SUBCLASS
    elif x.ndim != len(grid.kernel) + 2:
        reason = Reason.UNBATCHED
    elif reads_input and as_autocast_does(x, largest.weight, None)[0].dtype != x.dtype:
        reason = Reason.DTYPE  # autocast rounds the convolutions and not x, so that their sum is wider
    if reason is not None:
        raise ValueError(f"conv_sum_eval: cannot merge: {reason.text}")
    options: dict[str, Any] = {"stride": grid.stride, "padding": grid.padding, "dilation": grid.dilation}
    return conv_with_branches(x, tensors, ("sum", *terms), grid.kernel, groups=largest.groups, **options)


def _layers(branch: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a branch without identities. Raises: ValueError if its Sequential carries hooks."""
    if type(branch) in (nn.Sequential, nn.Identity) and (reason := obstacle(branch, type(branch), "forward")):
        raise ValueError(f"conv_sum_eval: cannot merge: {reason.text}")
    if type(branch) is nn.Sequential:
        for module in branch:
            yield from _layers(module)
    elif type(branch) is not nn.Identity:
        yield branch


def _grid_of(module: nn.Module) -> Grid:
    """Return where a convolution reads. Raises: TypeError for another module; ValueError if it merges with no other."""
    spelled = spell_out(module)
    if spelled is None or spelled.base is nn.Linear or "output_padding" in spelled.options:
        raise TypeError(f"conv_sum_eval: {type(module).__name__} is no Conv1d to Conv3d, no BatchNorm and no Identity")
    reason = obstacle(module, spelled.base, "forward", "_conv_forward")
    if reason is not None and reason is not Reason.PARAMETRIZED:
        raise ValueError(f"conv_sum_eval: cannot merge: {reason.text}")
    options = [spelled.options[name] for name in ("stride", "padding", "dilation")]
    weight: Any = module.weight
    grid = None if spelled.pad else Grid.of(tuple(weight.shape[2:]), *options)
    if grid is None:
        raise ValueError(f"conv_sum_eval: cannot merge: {Reason.OTHER_GRID.text}")
    return grid


def _sum_obstacle(
    convs: Sequence[tuple[nn.Module, Grid]],
    norms: Sequence[_BatchNorm],
    largest: Any,
    grid: Grid,
    reads_input: bool,
) -> Reason | None:
    """Return why the sum of these is not one convolution, or None."""
    conv: Any
    for conv, own in convs:
        reason = own.obstacle_in(grid)
        if reason is not None:
            return reason
        if conv.groups != largest.groups or conv.in_channels != largest.in_channels:
            return Reason.OTHER_GROUPS
        if conv.out_channels != largest.out_channels:
            return Reason.BROADCAST
        if conv.weight.dtype != largest.weight.dtype:
            return Reason.DTYPE
    if reads_input and largest.in_channels != largest.out_channels:
        return Reason.BROADCAST
    if any(bn.num_features != largest.out_channels for bn in norms):
        return Reason.CHANNELS
    return Grid.of_input(len(grid.kernel)).obstacle_in(grid) if reads_input else None


def _reads_input(term: Any) -> bool:
    return bool(term[0] == "input" or (term[0] == "norm" and _reads_input(term[1])))


def _check_norm(bn: _BatchNorm, message: str) -> None:
    """Raise ValueError if a BatchNorm does more than scale and shift."""
    reason = batch_norm_obstacle(bn)
    if bn.training:
        reason = Reason.TRAINING
    if bn.running_mean is None or bn.running_var is None:
        reason = Reason.NO_RUNNING_STATS
    if reason is not None:
        raise ValueError(f"{message}: {reason.text}")
