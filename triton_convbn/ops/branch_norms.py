"""The BatchNorms of a sum of branches as vectors: ``scale * inner + shift``.

    scale = bn_weight * rsqrt(running_var + eps)    shift = bn_bias - (running_mean - bias) * scale

bias is that of the convolution before the BatchNorm, if any. With the gradients g of a scale and h of a shift:

    d(bn_weight) = (g - h * (running_mean - bias)) * rsqrt(running_var + eps)    d(bn_bias) = h

A network of branches has hundreds of BatchNorms: mobileone_s0 has 226 with four vectors each. `scales_of_sums` computes
those of several sums at once, one after another in flat vectors.
"""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..dispatch import device_type, needs_plain_torch
from .reference import as_dtype

BatchNorms = tuple[Sequence[Tensor] | None, Sequence[Tensor] | None, Sequence[Tensor], Sequence[Tensor]]
"""Lists of the bn_weight, bn_bias, running_mean and running_var of all BatchNorms. None if they have none."""


def precise(tensor: Tensor, dtype: torch.dtype, compiled: bool = False) -> torch.dtype:
    """Return the dtype to compute vectors in, which are then rounded to `dtype` once.

    The error of a scale is that of a whole channel, so it does not average out: in fp32 the gradients of mobileone_s0
    have 1.10 times the error of eager's (median), in fp64 1.03, in the same time. Compiled for a GPU they stay in
    `dtype`, because the same kernels sum the weights in the dtype of the scales.
    """
    return torch.float64 if device_type(tensor.device) in (("cpu",) if compiled else ("cpu", "cuda")) else dtype


def scale_and_shift(
    bn_weight: Tensor | None, bn_bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift of BatchNorms, (C_out,) each. Differentiable.

    mean: The running mean less the convolution's bias.
    """
    scale = torch.rsqrt(var + eps)
    scale = scale if bn_weight is None else bn_weight * scale
    return scale, -mean * scale if bn_bias is None else torch.addcmul(bn_bias, mean, scale, value=-1)


def scales_of_sums(norms: BatchNorms, eps: float, counts: Sequence[int], wide: torch.dtype) -> tuple[Tensor, ...]:
    """Return the scales of every sum, then the bias of every sum. Twice differentiable.

    Args:
        norms: All BatchNorms, with vectors (C_out,), where C_out is that of the sum.
        eps: Added to every variance.
        counts: The number of BatchNorms of each sum. Sums that are alike are fastest if they follow each other.
        wide: The dtype of the results, fp32 or fp64.

    Returns:
        ``bn_weight * rsqrt(running_var + eps)``, a vector (n * C_out,) for each sum of n BatchNorms. Then (C_out,) for
        each sum, the total of its ``bn_bias - running_mean * scale``.
    """
    tensors = [tensor for each in norms for tensor in each or ()]
    if has_torch_function(tensors):
        return handle_torch_function(scales_of_sums, tensors, norms, eps, counts, wide)
    *_, means, variances = norms
    static = _Static(eps, tuple(counts), wide, precise(means[0], wide))
    plain = needs_plain_torch(*tensors)
    if plain or any(each.requires_grad for each in (*means, *variances)):
        vectors = [None if each is None else _joined(each, static.fine) for each in norms]
        mean, var = vectors[2:]
        assert mean is not None
        assert var is not None
        return _outputs(*scale_and_shift(vectors[0], vectors[1], mean, var, eps), static, means)
    weights = None if norms[0] is None else len(norms[0])
    return _Scales.apply(static, means, variances, weights, *(norms[0] or ()), *(norms[1] or ()))


Runs = list[tuple[int, int, int]]
"""Sums that follow each other and are alike: their number, the BatchNorms of each, and C_out."""


class _Static(NamedTuple):
    eps: float
    counts: tuple[int, ...]
    wide: torch.dtype
    fine: torch.dtype

    def runs(self, means: Sequence[Tensor]) -> Runs:
        ends = iter(means)
        sums = [(count, [next(ends).shape[0] for _ in range(count)][-1]) for count in self.counts]
        return [(len(list(own)), count, channels) for (count, channels), own in groupby(sums)]


def _sums(runs: Runs) -> list[tuple[int, int]]:
    """Return the number of BatchNorms and C_out of each sum."""
    return [(count, channels) for number, count, channels in runs for _ in range(number)]


class _Scales(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        static: _Static,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        weights: int | None,
        *affine: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.static, ctx.weights, ctx.number = static, weights, len(affine)
        ctx.runs, sizes = static.runs(means), [mean.shape[0] for mean in means]
        dtypes = {vector.dtype for vector in affine}
        ctx.parted = partial(_parted, sizes=sizes, dtype=dtypes.pop() if len(dtypes) == 1 else static.fine)
        ctx.set_materialize_grads(False)
        mean = _joined(means, static.fine)
        inverse = _joined(variances, static.fine).add_(static.eps).rsqrt_()
        ctx.save_for_backward(mean, inverse)
        scale = inverse if weights is None else _joined(affine[:weights], static.fine).mul_(inverse)
        biases = affine[weights or 0 :]
        shift = torch.addcmul(_joined(biases, static.fine), mean, scale, value=-1) if biases else -mean * scale
        return _outputs(scale, shift, static, means)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        mean, inverse = ctx.saved_tensors
        of_scales, of_biases = grads[: len(ctx.static.counts)], grads[len(ctx.static.counts) :]
        sums = _sums(ctx.runs)
        g = _complete(of_scales, [count * channels for count, channels in sums], mean)
        h = _complete(of_biases, [channels for _, channels in sums], mean)
        if h is not None:  # the gradient of a bias is that of each of its shifts
            parts = h.split_with_sizes([number * channels for number, _, channels in ctx.runs])
            h = torch.cat(
                [
                    part.view(number, 1, channels).expand(-1, count, -1).reshape(-1)
                    for part, (number, count, channels) in zip(parts, ctx.runs, strict=True)
                ]
            )
        found: list[Tensor | None] = []
        if ctx.weights is not None:
            of_weight = g if h is None else -h * mean if g is None else torch.addcmul(g, h, mean, value=-1)
            found += ctx.parted(None if of_weight is None else of_weight * inverse)
        if len(found) < ctx.number:
            found += ctx.parted(h)
        return None, None, None, None, *found


def _joined(vectors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return as_dtype(torch.cat(tuple(vectors)), dtype)


def _parted(grad: Tensor | None, sizes: Sequence[int], dtype: torch.dtype) -> Sequence[Tensor | None]:
    """Return the gradient of each vector, all in the dtype. Autograd rounds those of other dtypes, 5 us each."""
    return [None] * len(sizes) if grad is None else as_dtype(grad, dtype).split_with_sizes(sizes)


def _outputs(scale: Tensor, shift: Tensor, static: _Static, means: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return what `scales_of_sums` returns, from the vectors of all BatchNorms."""
    runs = static.runs(means)
    parts = shift.split_with_sizes([number * count * channels for number, count, channels in runs])
    totals = [
        part.view(number, count, channels).sum(1).view(-1)
        for part, (number, count, channels) in zip(parts, runs, strict=True)
    ]
    sums = _sums(runs)
    scales = as_dtype(scale, static.wide).split_with_sizes([count * channels for count, channels in sums])
    biases = as_dtype(torch.cat(totals), static.wide).split_with_sizes([channels for _, channels in sums])
    return *scales, *biases


def _complete(grads: Sequence[Tensor | None], sizes: Sequence[int], like: Tensor) -> Tensor | None:
    """Return the gradients one after another, zeros for those that are None. None if all are."""
    if all(grad is None for grad in grads):
        return None
    every = [like.new_zeros(size) if grad is None else grad for grad, size in zip(grads, sizes, strict=True)]
    return _joined(every, like.dtype)
