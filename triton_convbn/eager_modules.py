"""Read the modules that the eager-mode API folds, and refuse those that do not fold exactly."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from .graph.branch import ConvShape, Grid
from .graph.calls import is_subclass
from .graph.dialects.modules import Functional, batch_norm_obstacle, obstacle, spell_out
from .graph.reasons import Reason


def cannot(what: str, reason: Reason, tensors: Iterable[Tensor | None] = ()) -> ValueError:
    """Return the error of layers that do not fold. It names the dtypes of their tensors if these are the reason."""
    found = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor is not None})
    dtypes = f": {', '.join(found)}" if reason is Reason.DTYPE and found else ""
    return ValueError(f"{what}: {reason.text}{dtypes}")


def terms_of(
    branches: Sequence[nn.Module],
) -> tuple[list[Tensor], list[Any], list[tuple[Any, ConvShape]], list[tuple[Any, int]]]:
    """Return the tensors of branches, their terms as in `ops.branch_form`, the convolutions, and the BatchNorms.

    A BatchNorm comes with its number of channels. Raises as `conv_sum_eval` does.
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
                    raise cannot("conv_sum_eval: cannot merge", reason)
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
    return tensors, terms, convs, norms


def _layers(branch: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a branch without identities. Raises: ValueError if its Sequential carries hooks."""
    base = next((each for each in (nn.Sequential, nn.Identity) if isinstance(branch, each)), None)
    if base is not None and (reason := obstacle(branch, base, "forward")):
        raise cannot("conv_sum_eval: cannot merge", reason)
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
        raise cannot("conv_sum_eval: cannot merge", reason or Reason.OTHER_GRID)
    return ConvShape(channels, columns, module.groups, grid)


def reads_input(term: Any) -> bool:
    """Return whether a term is the input by itself, or behind BatchNorms."""
    return bool(term[0] == "input" or (term[0] == "norm" and reads_input(term[1])))


def read(caller: str, conv: nn.Module, bn: nn.Module, x: Tensor) -> tuple[Functional, Reason | None]:
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


def vectors_of(bn: _BatchNorm) -> list[Tensor]:
    """Return the vectors that a BatchNorm has, (C,) each."""
    vectors: tuple[Tensor | None, ...] = bn.weight, bn.bias, bn.running_mean, bn.running_var
    return [each for each in vectors if each is not None]


def vectors_obstacle(bn: _BatchNorm, channels: int, dtype: torch.dtype) -> Reason | None:
    """Return why a BatchNorm does not accept a tensor of these channels and this dtype, or None."""
    vectors = vectors_of(bn)
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
