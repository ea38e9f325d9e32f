"""Compute the scales and biases of several sums of branches at once, as one autograd function.

A block of MobileOne has six BatchNorms with four vectors each. By itself it takes some 40 small operations a training
step for these. At once, as many serve sixteen blocks (docs/experiments.md).
"""

import operator
from collections.abc import Sequence
from functools import lru_cache, reduce
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..dispatch import in_transform
from .branch_form import ONE, Alike, Norm, together
from .branch_norms import Norms, differentiable_norm, gradients_of_norms, norms_at_once, restored
from .branch_terms import total
from .reference import as_dtype
from .registration import gradients_of

Sums = tuple[tuple[tuple[Any, ...], ...], ...]
"""For each sum the fields of a `Norm` for each of its BatchNorms."""


def scales_of_sums(tensors: Sequence[Tensor], sums: Sums, wide: torch.dtype) -> tuple[Tensor, ...]:
    """Return for each sum a scale for each of its BatchNorms, then the sum of their shifts. Twice differentiable.

    Args:
        tensors: The vectors, (C_out,) each, where C_out is that of the sum.
        sums: Positions in `tensors`.
        wide: The dtype of the results, fp32 or fp64.

    Returns:
        ``bn_weight * rsqrt(running_var + eps)`` and ``bn_bias - (running_mean - bias) * scale``, (C_out,) each.
    """
    if has_torch_function(tensors):
        return handle_torch_function(scales_of_sums, tuple(tensors), tensors, sums, wide)
    plain = torch.compiler.is_compiling() or in_transform(*tensors) or torch._C._are_functorch_transforms_active()
    statistics = (tensors[position] for norms in sums for norm in norms for position in norm[2:4])
    if plain or any(each.requires_grad for each in statistics):
        return _differentiable(tensors, sums, wide)
    return _Scales.apply(sums, wide, *tensors)


class _Scales(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Sums, wide: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        every = [norms_at_once(alike, tensors, wide) for alike in _alike(sums)]
        ctx.static = sums, wide, [norms.sizes for norms in every]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *(norms.stack for norms in every))
        return _outputs(sums, every, wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        sums, wide, sizes = ctx.static
        flags = ctx.needs_input_grad[2:]
        tensors, stacks = ctx.saved_tensors[: len(flags)], ctx.saved_tensors[len(flags) :]
        if torch.is_grad_enabled():
            outputs = _differentiable(tensors, sums, wide)
            return None, None, *gradients_of(outputs, grads, tensors, flags)
        found: list[Tensor | None] = [None] * len(flags)
        of_scales, of_shifts = _by_norm(sums, grads)
        for alike, own, stack in zip(_alike(sums), sizes, stacks, strict=True):
            norms = restored(alike, own, stack, None)
            given = (_complete([each[number] for number in alike.numbers], norms) for each in (of_scales, of_shifts))
            for position, grad in gradients_of_norms(norms, flags, *given):
                before, grad = found[position], as_dtype(grad, tensors[position].dtype)
                found[position] = grad if before is None else before + grad
        return None, None, *found


@lru_cache(maxsize=256)
def _alike(sums: Sums) -> tuple[Alike, ...]:
    return together([(Norm(*norm), ONE) for norms in sums for norm in norms])


def _differentiable(tensors: Sequence[Tensor], sums: Sums, wide: torch.dtype) -> tuple[Tensor, ...]:
    """Return the same by operations that autograd can follow."""
    every = [
        differentiable_norm(alike, tensors, wide) for norms in sums for norm in norms for alike in _alike(((norm,),))
    ]
    numbered = [norms._replace(alike=norms.alike._replace(numbers=(number,))) for number, norms in enumerate(every)]
    return _outputs(sums, numbered, wide)


def _outputs(sums: Sums, every: Sequence[Norms], wide: torch.dtype) -> tuple[Tensor, ...]:
    """Return the scales and the bias of each sum. `every` has all BatchNorms, numbered in the order of the sums."""
    owner = [index for index, norms in enumerate(sums) for _ in norms]
    scales: dict[int, Tensor] = {}
    shifts: list[list[Tensor]] = [[] for _ in sums]
    for norms in every:
        scales.update(zip(norms.alike.numbers, norms.rows(norms.scale), strict=True))
        runs = [(index, len(list(own))) for index, own in groupby(norms.alike.numbers, owner.__getitem__)]
        ends = iter(norms.sizes)
        lengths = [sum(next(ends) for _ in range(number)) for _, number in runs]
        assert norms.shift is not None
        for (index, number), part in zip(runs, norms.shift.split_with_sizes(lengths), strict=True):
            shifts[index].append(total(part, number))
    biases = [reduce(operator.add, own) for own in shifts]
    if biases[0].dtype != wide:  # rounded at once
        biases = list(as_dtype(torch.cat(biases), wide).split_with_sizes([each.shape[0] for each in biases]))
    rows = iter(sorted(scales))
    return tuple(
        tensor
        for norms, bias in zip(sums, biases, strict=True)
        for tensor in (*(scales[next(rows)] for _ in norms), bias)
    )


def _by_norm(sums: Sums, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return the gradients of every BatchNorm's scale and shift, from those of the outputs."""
    rest = iter(grads)
    of_scales: list[Tensor | None] = []
    of_shifts: list[Tensor | None] = []
    for norms in sums:
        of_scales += [next(rest) for _ in norms]
        of_shifts += [next(rest)] * len(norms)
    return of_scales, of_shifts


def _complete(grads: list[Tensor | None], norms: Norms) -> list[Tensor] | None:
    """Return the gradients with zeros for those that are None, or None if all are."""
    if all(grad is None for grad in grads):
        return None
    sizes = zip(grads, norms.sizes, strict=True)
    return [norms.inverse.new_zeros(size) if grad is None else grad for grad, size in sizes]
