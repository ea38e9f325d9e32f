"""Help functions of autograd to save tensors, to find writes to them, and to return outputs that are no views."""

import contextlib
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..dispatch import is_set

_Optional = TypeVar("_Optional", Tensor, Tensor | None)


def no_view(output: Tensor) -> Tensor:
    """Return an output that is no view, as that of a Linear on three dimensions is.

    Autograd forbids writes to views that a custom function returns.
    """
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def savable(tensors: Sequence[_Optional]) -> list[_Optional]:
    """Return the tensors, and copies of those that were made in inference mode: autograd refuses to save them.

    Without the fold, autograd may not have to save them: a BatchNorm that trains behind a frozen convolution saves the
    convolution's output.
    """
    copies = torch.is_grad_enabled()
    return [each.clone() if copies and each is not None and each.is_inference() else each for each in tensors]


def gradients_of_parts(grad: Tensor, sizes: Sequence[int], dim: int = 0) -> Sequence[Tensor]:
    """Return the gradients of what was concatenated, given that of the concatenation.

    Without `create_graph` they are no views for autograd, which forbids writes to views that were made in no_grad mode.
    Batched gradients stay views: there is no rule for others (torch 2.14).
    """
    if not torch.is_grad_enabled():
        with contextlib.suppress(RuntimeError):
            return grad.unsafe_split_with_sizes(sizes, dim)
    return grad.split_with_sizes(sizes, dim)


def checks_data() -> bool:
    """Return whether backward looks for writes through ``.data``, which autograd does not see. For debugging."""
    return is_set("TRITON_CONVBN_CHECK_DATA")


def checksums(tensors: Sequence[Tensor | None]) -> list[float]:
    """Return a checksum of each tensor. Waits for the device."""
    return [0.0 if each is None else each.detach().sum(dtype=torch.float64).item() for each in tensors]


def raise_if_changed(names: Sequence[str], before: list[float], now: list[float]) -> None:
    """Raise RuntimeError that names the tensors whose checksums differ. NaN is equal to NaN."""
    changed = [name for name, a, b in zip(names, before, now, strict=True) if a != b and not (a != a and b != b)]
    if changed:
        raise RuntimeError(
            f"triton_convbn: {', '.join(changed)} changed between forward and backward, unseen by autograd. "
            "Writes through .data do that. Write after backward."
        )
