"""Define the operators ``triton_convbn::fold`` and ``triton_convbn::fold_backward``, which take a group of pairs.

Where Triton runs they launch generated kernels for the whole group, see `plan`. Elsewhere they run plain torch, see
`fallback`. Inductor treats them as opaque unless it lowers them. `PackedPairs` defines their arguments.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.inputs import POWER_DTYPE, FoldInputs
from ..kernels.spec import Needs
from . import fallback
from .packed_pairs import PackedPairs, grad_pairs
from .plan import Plan, plan_fold, plan_fold_backward, planned_fold, planned_fold_backward
from .registration import LIBRARY, as_promised, define, differentiate, gradients_of, kernel_plan

_GROUP = (
    "Tensor[] weights, Tensor[] vectors, SymInt[] present, float[] eps, bool[] transposed, SymInt[] groups, "
    "SymInt[] dtypes, SymInt[] layouts, bool[] prescale"
)
# -- forward ----------------------------------------------------------------------------------------------------------


def _fold(plan: Callable[..., Plan], *arguments: Any) -> list[Tensor]:
    """Fold every pair of a group. See `triton_convbn.fold` for formulas, shapes and dtypes.

    Args:
        plan: `plan_fold` or `planned_fold`.
        arguments: The columns of `PackedPairs`.

    Returns:
        W' and b' of each pair, then q of each pair with prescale. `PackedPairs.by_pair` sorts them.
    """
    weights, vectors, *_ = arguments
    found = kernel_plan(plan, weights[0].device, arguments) if weights else None
    if found is not None:
        return found([*weights, *vectors])
    return _fold_plain(*arguments)


def _fold_plain(*arguments: Any) -> list[Tensor]:
    """Fold every pair in plain torch. Differentiable, in every mode."""
    folded = list(map(fallback.fold_fallback, PackedPairs(*arguments).unpack()))
    return [tensor for pair in folded for tensor in pair[:2]] + [tensor for pair in folded for tensor in pair[2:]]


fold_op = define("fold", _GROUP, _fold, planned_fold, plan_fold)
"""The operator as the target of a node."""


@torch.library.register_fake("triton_convbn::fold", lib=LIBRARY)
def _(*packed):  # type: ignore[no-untyped-def]
    outputs, pairs = [], PackedPairs(*packed).unpack()
    for pair in pairs:
        dtype, mean = pair.out_dtype or pair.weight.dtype, pair.running_mean
        layout = pair.memory_format or torch.preserve_format
        outputs += [
            torch.empty_like(pair.weight, dtype=dtype, memory_format=layout),
            mean.new_empty(mean.shape, dtype=dtype),
        ]
    means = [pair.running_mean for pair in pairs if pair.prescale]
    return outputs + [mean.new_empty(mean.shape, dtype=POWER_DTYPE) for mean in means]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    packed = PackedPairs(*inputs)
    ctx.set_materialize_grads(False)  # materialized zeros would be extra launches
    powers = output[2 * len(packed.weights) :]
    ctx.save_for_backward(*packed.weights, *packed.vectors, *powers)
    ctx.static = packed[2:]


def _saved(ctx: Any) -> tuple[PackedPairs, list[Tensor]]:
    """Return the packed pairs, and q of the pairs with prescale."""
    saved, count = list(ctx.saved_tensors), len(ctx.static[0])
    end = len(saved) - sum(ctx.static[-1])
    return PackedPairs(saved[:count], saved[count:end], *ctx.static), saved[end:]


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
    packed, powers = _saved(ctx)
    weights, vectors, *_ = ctx.needs_input_grad
    needs = packed.needs(weights, vectors)
    pairs = [(grads[2 * i], grads[2 * i + 1]) for i in range(len(packed.weights))]
    found = fold_backward(packed, pairs, needs, powers)
    return (*packed.gradients(found), *[None] * len(ctx.static))


differentiate(fold_op, _fold_plain, _backward, _save)


# -- backward ---------------------------------------------------------------------------------------------------------


def fold_backward(
    packed: PackedPairs,
    grads: Sequence[tuple[Tensor | None, Tensor | None]],
    needs: Sequence[Needs],
    powers: Sequence[Tensor] = (),
) -> list[list[Tensor | None]]:
    """Return the gradients (dW, db, d_bn_weight, d_bn_bias) of each pair, None where not needed.

    Args:
        packed: The pairs.
        grads: (dW', db') of each pair; either may be None.
        needs: The needed gradients of each pair.
        powers: q of the pairs with prescale, as the fold returned it.
    """
    given = [(weight is not None) | (bias is not None) << 1 for weight, bias in grads]
    wanted = [
        sum(bool(flag) << bit for bit, flag in enumerate(_reached(need, grad)))
        for need, grad in zip(needs, grads, strict=True)
    ]
    flat = [grad for pair in grads for grad in pair if grad is not None]
    gradients = iter(fold_backward_op(flat, given, wanted, list(powers), *packed))
    return [[next(gradients) if mask >> bit & 1 else None for bit in range(4)] for mask in wanted]


def _reached(needs: Needs, grads: tuple[Tensor | None, Tensor | None]) -> Needs:
    """Return the needed gradients that a given gradient reaches."""
    weight, bias = (grad is not None for grad in grads)
    return Needs(
        needs.weight and weight, needs.bias and bias, needs.bn_weight and (weight or bias), needs.bn_bias and bias
    )


def _fold_backward_plain(*arguments: Any) -> list[Tensor]:
    """Compute the gradients of every pair in plain torch. Differentiable, in every mode."""
    grads, given, wanted, powers, *rest = arguments
    return _backward_plain(grads, given, wanted, powers, PackedPairs(*rest))


def _backward_plain(
    grads: Sequence[Tensor], given: Sequence[int], wanted: Sequence[int], powers: Sequence[Tensor], packed: PackedPairs
) -> list[Tensor]:
    found = []
    every = zip(packed.unpack(), grad_pairs(grads, given), wanted, packed.each_power(powers), strict=True)
    for pair, (grad_weight, grad_bias), mask, power in every:
        if grad_bias is not None and grad_bias.ndim == 2:
            grad_bias = grad_bias.sum(0)
        gradients = fallback.fold_backward_fallback(pair, grad_weight, grad_bias, power)
        found += [gradient for bit, gradient in enumerate(gradients) if mask >> bit & 1]
    return found  # type: ignore[return-value]


def _fold_backward(plan: Callable[..., Plan], *arguments: Any) -> list[Tensor]:
    """Return the wanted gradients of a group of folds, pair by pair, in each parameter's dtype and layout.

    Args:
        plan: `plan_fold_backward` or `planned_fold_backward`.
        arguments: These, then the columns of `PackedPairs`:
            grads: dW' and db' of each pair, if they exist. db' may be rows [R, C_out], still to be summed.
            given: A mask for each pair: bit 0 is set if dW' exists, bit 1 if db' does.
            wanted: A mask for each pair, with bits for dW, db, d_bn_weight and d_bn_bias.
            powers: q of the pairs with prescale, constants here.
    """
    grads, given, wanted, powers, *rest = arguments
    packed = PackedPairs(*rest)
    found = kernel_plan(plan, packed.weights[0].device, arguments) if packed.weights else None
    if found is not None:
        return found([*grads, *powers, *packed.weights, *packed.vectors])
    parameters = [p for pair, mask in zip(packed.unpack(), wanted, strict=True) for p in _wanted(pair, mask)]
    with torch.no_grad():
        gradients = _backward_plain(grads, given, wanted, powers, packed)
        promised = map(torch.empty_like, parameters)  # plain torch returns the strides of dW'
        return list(map(as_promised, gradients, promised))


# The kernel reads dW' in either layout. Without the tag Inductor would copy every channels_last dW' to the contiguous
# strides of the trace: 17 copies, 91 MB, in ResNet-50's backward.
fold_backward_op = define(
    "fold_backward",
    f"Tensor[] grads, SymInt[] given, SymInt[] wanted, Tensor[] powers, {_GROUP}",
    _fold_backward,
    planned_fold_backward,
    plan_fold_backward,
    torch.Tag.flexible_layout,
)


def _wanted(pair: FoldInputs, mask: int) -> list[Any]:
    """Return those of (weight, bias, bn_weight, bn_bias) whose bit is set."""
    return [parameter for bit, parameter in enumerate(pair[:4]) if mask >> bit & 1]


@torch.library.register_fake("triton_convbn::fold_backward", lib=LIBRARY)
def _(grads, given, wanted, powers, *packed):  # type: ignore[no-untyped-def]
    return [
        torch.empty_like(parameter)
        for pair, mask in zip(PackedPairs(*packed).unpack(), wanted, strict=True)
        for parameter in _wanted(pair, mask)
    ]


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grads, given, wanted, powers, *rest = inputs
    packed = PackedPairs(*rest)
    ctx.save_for_backward(*grads, *packed.weights, *packed.vectors, *powers)
    ctx.given, ctx.wanted, ctx.static = given, wanted, packed[2:]


def _double_backward(ctx: Any, grads_of_gradients: Sequence[Tensor | None]) -> Any:
    """Differentiate the fallback. Second derivatives are rare, so they have no kernel."""
    count, pairs = sum(bin(mask).count("1") for mask in ctx.given), len(ctx.static[0])
    flags = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[4], *ctx.needs_input_grad[5]]
    saved, powers = ctx.saved_tensors[: len(flags)], ctx.saved_tensors[len(flags) :]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(flag) for t, flag in zip(saved, flags, strict=True)]
        packed = PackedPairs(leaves[count : count + pairs], leaves[count + pairs :], *ctx.static)
        outputs = _backward_plain(leaves[:count], ctx.given, ctx.wanted, powers, packed)
        every = gradients_of(outputs, grads_of_gradients, leaves, flags)
    weights, vectors = every[count : count + pairs], every[count + pairs :]
    return every[:count], None, None, [None] * len(powers), weights, vectors, *[None] * len(ctx.static)


differentiate(fold_backward_op, _fold_backward_plain, _double_backward, _save_backward)
