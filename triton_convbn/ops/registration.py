"""Define operators on lists of tensors, with the kernels behind them.

They use `torch.library.Library`: a call of 16 pairs with an empty body takes 44 us, and 55 us with `custom_op`, which
checks every output for aliases (CPU, 80 tensors).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl

from ..counters import count
from ..dispatch import kernel_runs, needs_plain_autograd
from .plan import Plan

LIBRARY = torch.library.Library("triton_convbn", "DEF")
_BACKENDS = ("cpu", "cuda", "xpu")
"""For these the dispatcher only passes strided tensors that are not lazily negated, so plans can be reused."""


def define(name: str, arguments: str, body: Callable[..., Any], planned: Any, plan: Any, *tags: torch.Tag) -> Any:
    """Register an operator with the given body. It gets `planned`, which reuses plans, on _BACKENDS, else `plan`."""
    LIBRARY.define(f"{name}({arguments}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag, *tags))
    qualified = f"{LIBRARY.ns}::{name}"
    torch.library.register_kernel(qualified, _BACKENDS, partial(body, planned), lib=LIBRARY)
    torch.library.register_kernel(qualified, None, partial(body, plan), lib=LIBRARY)
    return getattr(torch.ops.triton_convbn, name).default


def differentiate(operator: Any, plain: Callable[..., Any], backward: Any, save: Any) -> None:
    """Give an operator its backward, and plain torch under transforms and forward mode.

    An operator on lists of tensors has no rules for these. Below autograd the tangents are gone, and its result would
    have a derivative of zero. So they are detected here.
    """
    reverse = make_autograd_impl(operator, Info(backward, save))

    def autograd(keyset: Any, *arguments: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active() or needs_plain_autograd()
        return plain(*arguments) if transformed else reverse(keyset, *arguments)

    name = operator.name().split("::")[1]
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    LIBRARY.impl(name, plain, "FuncTorchBatched")
    LIBRARY.impl(name, plain, "Batched")  # torch.autograd.grad(is_grads_batched=True)


def gradients_of(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    flags: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of the tensors whose flag is set, given those of the outputs. Differentiable."""
    reached = [(each, of) for each, of in zip(outputs, grads, strict=True) if each.requires_grad and of is not None]
    leaves = [tensor for tensor, flag in zip(tensors, flags, strict=True) if flag]
    if not leaves or not reached:
        return [None] * len(flags)
    found = iter(
        torch.autograd.grad(
            [each for each, _ in reached],
            leaves,
            [of for _, of in reached],
            allow_unused=True,
            create_graph=True,
        )
    )
    return [next(found) if flag else None for flag in flags]


def as_promised(found: Tensor, promised: Tensor) -> Tensor:
    """Return a tensor with the strides that the operator's fake promises."""
    return found if found.stride() == promised.stride() else promised.copy_(found)


def kernel_plan(plan: Callable[..., Plan], device: torch.device, arguments: Sequence[Any]) -> Plan | None:
    """Return the plan of a call, or None if the kernels cannot take it. Count the reasons."""
    if not kernel_runs(device):
        return None
    found = plan(*arguments)
    for reason in found.reasons:
        count(f"decomposed:{reason}")
    return None if found.reasons else found
