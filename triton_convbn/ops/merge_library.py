"""Define the operators ``triton_convbn::merge`` and ``triton_convbn::merge_backward``, which take sums of branches.

They write the merged weight ``sum_k embed(s_k * W_k) + diag(s_0)`` of each sum, and the gradients of every W_k and s_k
from one dW'. `branch_terms.combine` computes the scales. Where Triton runs they launch generated kernels, elsewhere
they run plain torch. `PackedSums` defines their arguments.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.merge_inputs import largest_of
from .merge_plan import (
    PackedSums,
    Wanted,
    plan_merge,
    plan_merge_backward,
    planned_merge,
    planned_merge_backward,
)
from .merge_reference import cropped, diagonal_of, dot, kernel_of, merged_weight
from .registration import LIBRARY, as_promised, define, differentiate, gradients_of, kernel_plan

_SUMS = "Tensor[] weights, Tensor[] scales, SymInt[] counts, SymInt[] dtypes"


def _merge(plan: Any, *arguments: Any) -> list[Tensor]:
    """Return the merged weight of each sum. See `merge_reference.merged_weight` for formula and shapes."""
    weights, scales, *_ = arguments
    found = kernel_plan(plan, weights[0].device, arguments) if weights else None
    if found is not None:
        return found([*weights, *scales])
    return list(map(as_promised, _merge_plain(*arguments), _promised(*arguments)))


def _merge_plain(*arguments: Any) -> list[Tensor]:
    """Merge every sum in plain torch. Differentiable, in every mode."""
    return [_merged(own, scales).to(dtype) for own, scales, dtype in PackedSums(*arguments).unpack()]


def _merged(weights: Sequence[Tensor], scales: Tensor) -> Tensor:
    identity = scales[-1] if len(scales) > len(weights) else None
    largest = largest_of(weights)
    groups = largest.shape[0] // largest.shape[1] if identity is not None else 1
    return merged_weight(weights, scales[: len(weights)].unbind(), identity, kernel_of(largest), groups)


def _promised(*arguments: Any) -> list[Tensor]:
    return [torch.empty_like(largest_of(own), dtype=dtype) for own, _, dtype in PackedSums(*arguments).unpack()]


merge_op = define("merge", _SUMS, _merge, planned_merge, plan_merge)
torch.library.register_fake("triton_convbn::merge", lib=LIBRARY)(_promised)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    packed = PackedSums(*inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*packed.weights, *packed.scales)
    ctx.static = packed[2:]


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
    end = len(ctx.saved_tensors) - len(ctx.static[0])
    packed = PackedSums(list(ctx.saved_tensors[:end]), list(ctx.saved_tensors[end:]), *ctx.static)
    flags, of_scales, *_ = ctx.needs_input_grad
    reached = [number for number, grad in enumerate(grads) if grad is not None]
    wanted = [Wanted(list(map(bool, own)), bool(of)) for own, of in zip(packed.each(flags), of_scales, strict=True)]
    own_weights = packed.each(packed.weights)
    part = PackedSums(
        [weight for number in reached for weight in own_weights[number]],
        *([column[number] for number in reached] for column in packed[1:]),
    )
    given = [grads[number] for number in reached]
    found = iter(merge_backward_op(given, [wanted[number].mask for number in reached], *part) if reached else ())
    d_weights: list[Tensor | None] = []
    d_scales: list[Tensor | None] = []
    for number, need in enumerate(wanted):
        there = grads[number] is not None
        d_weights += [next(found) if there and wants else None for wants in need.weights]
        d_scales.append(next(found) if there and need.scales else None)
    return d_weights, d_scales, None, None


differentiate(merge_op, _merge_plain, _backward, _save)


def _merge_backward(plan: Any, *arguments: Any) -> list[Tensor]:
    """Return the wanted gradients, sum by sum: those of the weights, each like its weight, then of the scales.

    Args:
        plan: `plan_merge_backward` or `planned_merge_backward`.
        arguments: These, then the columns of `PackedSums`:
            grads: dW' of each sum.
            wanted: `Wanted.mask` of each sum.
    """
    grads, _, weights, scales, *_ = arguments
    found = kernel_plan(plan, weights[0].device, arguments) if weights else None
    if found is not None:
        return found([*grads, *weights, *scales])
    with torch.no_grad():
        return list(map(as_promised, _merge_backward_plain(*arguments), _promised_gradients(*arguments)))


def _merge_backward_plain(grads: Sequence[Tensor], wanted: Sequence[int], *arguments: Any) -> list[Tensor]:
    """Compute the gradients of every sum in plain torch. Differentiable, in every mode."""
    packed, found = PackedSums(*arguments), []
    for (weights, scales, _), grad, mask in zip(packed.unpack(), grads, wanted, strict=True):
        need = Wanted.of(mask, len(weights))
        wide = grad.to(scales.dtype)
        parts = [cropped(wide, weight) for weight in weights]
        for weight, own, scale, wants in zip(weights, parts, scales, need.weights, strict=False):
            if wants:
                found.append((own * scale.reshape(-1, *(1,) * (weight.ndim - 1))).to(weight.dtype))
        if need.scales:
            rows = [dot(own, weight.to(wide.dtype)) for own, weight in zip(parts, weights, strict=True)]
            if len(scales) > len(weights):
                groups = wide.shape[0] // wide.shape[1]
                rows.append(diagonal_of(wide, groups).reshape(-1))
            found.append(torch.stack(rows))
    return found


# The kernel reads dW' in either layout, as that of `triton_convbn::fold_backward` does.
merge_backward_op = define(
    "merge_backward",
    f"Tensor[] grads, SymInt[] wanted, {_SUMS}",
    _merge_backward,
    planned_merge_backward,
    plan_merge_backward,
    torch.Tag.flexible_layout,
)


def _promised_gradients(grads: Sequence[Tensor], wanted: Sequence[int], *arguments: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for (weights, scales, _), mask in zip(PackedSums(*arguments).unpack(), wanted, strict=True):
        need = Wanted.of(mask, len(weights))
        found += [torch.empty_like(weight) for weight, wants in zip(weights, need.weights, strict=True) if wants]
        found += [torch.empty_like(scales)] * need.scales
    return found


torch.library.register_fake("triton_convbn::merge_backward", lib=LIBRARY)(_promised_gradients)


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grads, ctx.wanted, *rest = inputs
    packed = PackedSums(*rest)
    ctx.save_for_backward(*grads, *packed.weights, *packed.scales)
    ctx.static = packed[2:]


def _double_backward(ctx: Any, grads_of_gradients: Sequence[Tensor | None]) -> Any:
    """Differentiate plain torch. Second derivatives are rare, so they have no kernel."""
    sums = len(ctx.static[0])
    flags = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[2], *ctx.needs_input_grad[3]]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(flag) for t, flag in zip(ctx.saved_tensors, flags, strict=True)]
        grads, weights, scales = leaves[:sums], leaves[sums:-sums], leaves[-sums:]
        outputs = _merge_backward_plain(grads, ctx.wanted, weights, scales, *ctx.static)
        every = gradients_of(outputs, grads_of_gradients, leaves, flags)
    return every[:sums], None, every[sums:-sums], every[-sums:], None, None


differentiate(merge_backward_op, _merge_backward_plain, _double_backward, _save_backward)
