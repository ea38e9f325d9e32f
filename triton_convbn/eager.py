"""Eager-mode API: fold tensors, a BatchNorm and the layer before or after it, or a sum of branches, without a graph."""

from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .graph.branch import ConvShape, Grid, sum_obstacle
from .graph.calls import is_subclass
from .graph.dialects.modules import Functional, batch_norm_obstacle, obstacle, spell_out
from .graph.input_norms import padding_obstacle
from .graph.reasons import Reason
from .kernels.inputs import FoldInputs
from .ops import reference
from .ops.autograd import as_autocast_does, conv_with_fold, folded, uses_kernel
from .ops.branches_autograd import conv_with_branches
from .ops.input_norm_autograd import conv_with_input_norm
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
        ValueError: the BatchNorm does not accept the convolution's output, or the two do not fold exactly. The message
            says why.

    Source: arXiv 2305.11624, section 3.
    """
    if isinstance(conv, _BatchNorm):
        deprecated("conv_bn_eval(bn, conv, x) is now conv_bn_eval(conv, bn, x)")
        conv, bn = bn, conv
    spelled, reason = _read("conv_bn_eval", conv, bn, x)
    weight: Tensor = conv.weight  # type: ignore[assignment]
    channels = weight.shape[1] * spelled.options["groups"] if "output_padding" in spelled.options else weight.shape[0]
    reason = reason or _vectors_obstacle(bn, channels, as_autocast_does(x, weight, None)[1] or weight.dtype)
    if reason is not None:
        raise ValueError(f"conv_bn_eval: cannot fold: {reason.text}")
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
        ValueError: the two do not fold exactly. The message says why.

    Source: arXiv 2305.11624, section 3.
    """
    spelled, reason = _read("bn_conv_eval", conv, bn, x)
    weight: Tensor = conv.weight  # type: ignore[assignment]
    if "output_padding" in spelled.options:
        reason = reason or Reason.TRANSPOSED
    reason = reason or _vectors_obstacle(bn, weight.shape[1] * spelled.options.get("groups", 1), x.dtype)
    reason = reason or padding_obstacle(spelled.options.get("padding", 0), weight)
    if is_subclass(x):
        reason = reason or Reason.TENSOR_SUBCLASS
    if as_autocast_does(x, weight, None)[0].dtype != x.dtype:
        reason = reason or Reason.DTYPE  # autocast would round x instead of bn(x)
    if reason is not None:
        raise ValueError(f"bn_conv_eval: cannot fold: {reason.text}")
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
    tensors: list[Tensor] = []
    terms: list[Any] = []
    convs: list[tuple[Any, ConvShape]] = []
    norms: list[tuple[Any, int]] = []

    def position(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensors.append(tensor)
        return len(tensors) - 1

    for branch in branches:
        term: Any = ("input",)
        for module in _layers(branch):
            if isinstance(module, _BatchNorm):
                reason = _norm_obstacle(module)
                if reason is not None:
                    raise ValueError(f"conv_sum_eval: cannot merge: {reason.text}")
                vectors = map(position, (module.weight, module.bias, module.running_mean, module.running_var))
                term = ("norm", term, *vectors, module.eps)
                norms.append((module, module.num_features))
                continue
            shape = _shape_of(module)
            if term != ("input",):
                raise TypeError(f"conv_sum_eval: {type(module).__name__} follows another layer of its branch")
            convs.append((module, shape))
            term = ("conv", position(module.weight), position(module.bias))  # type: ignore[arg-type]
        terms.append((1, term))
    if not convs:
        raise ValueError("conv_sum_eval: no branch has a convolution")
    reads_input = any(_reads_input(term) for _, term in terms)
    found = sum_obstacle(convs, norms, x if reads_input else None)
    reason = None if found is None else found[0]
    conv, (*_, groups, grid) = max(convs, key=lambda each: each[1].grid.kernel)
    if any(map(is_subclass, (*tensors, x))):
        reason = Reason.TENSOR_SUBCLASS
    elif x.ndim != len(grid.kernel) + 2:
        reason = Reason.UNBATCHED
    elif len({each.weight.dtype for each, _ in convs}) > 1:
        reason = Reason.DTYPE
    elif reads_input and as_autocast_does(x, conv.weight, None)[0].dtype != x.dtype:
        reason = Reason.DTYPE  # autocast rounds the convolutions and not x, so that their sum is wider
    if reason is not None:
        raise ValueError(f"conv_sum_eval: cannot merge: {reason.text}")
    options: dict[str, Any] = {"stride": grid.stride, "padding": grid.padding, "dilation": grid.dilation}
    return conv_with_branches(x, tensors, ("sum", *terms), groups=groups, **options)


def _layers(branch: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a branch without identities. Raises: ValueError if its Sequential carries hooks."""
    base = next((each for each in (nn.Sequential, nn.Identity) if isinstance(branch, each)), None)
    if base is not None and (reason := obstacle(branch, base, "forward")):
        raise ValueError(f"conv_sum_eval: cannot merge: {reason.text}")
    if isinstance(branch, nn.Sequential):
        for module in branch:
            yield from _layers(module)
    elif base is None:
        yield branch


def _shape_of(module: Any) -> ConvShape:
    """Return what decides whether a convolution merges.

    Raises: TypeError for another module; ValueError for a convolution that merges with no other.
    """
    spelled = spell_out(module)
    if spelled is None or spelled.base is nn.Linear or "output_padding" in spelled.options:
        raise TypeError(f"conv_sum_eval: {type(module).__name__} is no Conv1d to Conv3d, no BatchNorm and no Identity")
    channels, columns, *_ = module.weight.shape
    options = [spelled.options[name] for name in ("stride", "padding", "dilation")]
    grid = None if spelled.pad else Grid.of(tuple(module.kernel_size), *options)
    reason = _conv_obstacle(module, spelled.base)
    if grid is None or reason is not None:
        raise ValueError(f"conv_sum_eval: cannot merge: {(reason or Reason.OTHER_GRID).text}")
    return ConvShape(channels, columns, module.groups, grid)


def _reads_input(term: Any) -> bool:
    return bool(term[0] == "input" or (term[0] == "norm" and _reads_input(term[1])))


def _read(caller: str, conv: nn.Module, bn: nn.Module, x: Tensor) -> tuple[Functional, Reason | None]:
    """Return what a convolution calls, and why it cannot fold with a BatchNorm on either side, if so.

    Raises:
        TypeError: a module has another type.
    """
    spelled = spell_out(conv)
    if spelled is None:
        raise TypeError(f"{caller}: {type(conv).__name__} is no convolution and no Linear")
    if not isinstance(bn, _BatchNorm):
        raise TypeError(f"{caller}: {type(bn).__name__} is no BatchNorm")
    if isinstance(conv, LazyModuleMixin) or isinstance(bn, LazyModuleMixin):
        raise ValueError(f"{caller}: a lazy module has no shapes before it is called: call both once, one by one")
    reason = _conv_obstacle(conv, spelled.base) or _norm_obstacle(bn)
    weight: Tensor = conv.weight  # type: ignore[assignment]
    if x.ndim != weight.ndim:
        reason = reason or (Reason.LINEAR_RANK if isinstance(conv, nn.Linear) else Reason.UNBATCHED)
    if any(map(is_subclass, (weight, *bn.parameters(), *bn.buffers()))):
        reason = reason or Reason.TENSOR_SUBCLASS
    if reason is None:
        bn._check_input_dim(x)  # on either side of a convolution there are as many dimensions
    return spelled, reason


def _vectors_obstacle(bn: _BatchNorm, channels: int, dtype: torch.dtype) -> Reason | None:
    """Return why a BatchNorm does not accept a tensor of these channels and this dtype, or None."""
    vectors = [each for each in (bn.weight, bn.bias, bn.running_mean, bn.running_var) if each is not None]
    if any(each.shape != (channels,) for each in vectors):
        return Reason.CHANNELS
    accepted = (dtype, torch.float32) if dtype in (torch.float16, torch.bfloat16) else (dtype,)
    return Reason.DTYPE if any(each.dtype not in accepted for each in vectors) else None


def _conv_obstacle(conv: nn.Module, base: type[nn.Module]) -> Reason | None:
    """Return what a convolution does besides convolving, or None. Reading a parametrized weight computes it."""
    reason = obstacle(conv, base, "forward", "_conv_forward")
    return None if reason is Reason.PARAMETRIZED else reason


def _norm_obstacle(bn: _BatchNorm) -> Reason | None:
    """Return why a BatchNorm does anything but scale and shift, or None."""
    if bn.running_mean is None or bn.running_var is None:
        return Reason.NO_RUNNING_STATS
    if bn.training:
        return Reason.TRAINING
    reason = batch_norm_obstacle(bn)
    return None if reason is Reason.PARAMETRIZED else reason
