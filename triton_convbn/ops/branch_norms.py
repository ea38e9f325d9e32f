"""The BatchNorms of sums of branches as vectors: ``scale * inner + shift``.

    scale = bn_weight * rsqrt(running_var + eps)    shift = bn_bias - (running_mean - bias) * scale

bias is that of the convolution before the BatchNorm, if any. With the gradients g of a scale and h of a shift:

    d(bn_weight) = (g - h * (running_mean - bias)) * rsqrt(running_var + eps)    d(bn_bias) = h    d(bias) = h * scale

A network of branches has hundreds of BatchNorms: mobileone_s0 has 226 with four vectors each. `scales_of_sums` computes
those of several sums at once, one after another in flat vectors. A convolution and its BatchNorm are a sum of one term.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..dispatch import device_type, needs_plain_torch
from .branch_form import Composition
from .branch_runs import Runs, runs_of
from .reference import as_dtype
from .saved import checks_data, checksums, gradients_of_parts, raise_if_changed, savable

Vectors = Sequence[Tensor] | None
"""A vector of each BatchNorm. None if they have none."""

BatchNorms = tuple[Vectors, Vectors, Sequence[Tensor], Sequence[Tensor], Vectors]
"""The bn_weight, bn_bias, running_mean and running_var of BatchNorms, and the bias of the convolution before each."""


def precise(tensor: Tensor, dtype: torch.dtype, compiled: bool = False) -> torch.dtype:
    """Return the dtype to compute vectors in, which are then rounded to `dtype` once.

    The error of a scale is that of a whole channel, so it does not average out: in fp32 the gradients of mobileone_s0
    have 1.10 times the error of eager's (median), in fp64 1.03, in the same time. Compiled for a GPU they stay in
    `dtype`, because the same kernels sum the weights in the dtype of the scales.
    """
    # Dynamo of torch 2.11 cannot trace the context variable that `device_type` reads.
    kind = tensor.device.type if torch.compiler.is_dynamo_compiling() else device_type(tensor.device)
    return torch.float64 if kind in (("cpu",) if compiled else ("cpu", "cuda")) else dtype


def scale_and_shift(
    bn_weight: Tensor | None, bn_bias: Tensor | None, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift of BatchNorms, (C_out,) each. Differentiable.

    Args:
        bn_weight, bn_bias: The affine parameters.
        mean: The running mean less the convolution's bias.
        inverse: ``rsqrt(running_var + eps)``.
    """
    scale = inverse if bn_weight is None else bn_weight * inverse
    return scale, -mean * scale if bn_bias is None else torch.addcmul(bn_bias, mean, scale, value=-1)


def scales_of_sums(
    norms: BatchNorms, factors: Sequence[Tensor], eps: float, compositions: Sequence[Composition], wide: torch.dtype
) -> tuple[Tensor, ...]:
    """Return the scales of every sum, then the bias of every sum. Twice differentiable.

    Args:
        norms: All BatchNorms, with vectors (C_out,), where C_out is that of the sum.
        factors: A tensor of C_out elements for each sum that has a factor.
        eps: Added to every variance.
        compositions: What each sum consists of. Sums that are alike are fastest if they follow each other.
        wide: The dtype of the results, fp32 or fp64. fp64 if a tensor is fp64.

    Returns:
        ``(n, C_out)`` for each sum of n terms: the scales of its weights, then that of its input if it is a term. Then
        (C_out,) for each sum: the total of its shifts.
    """
    tensors = [tensor for each in (*norms, factors) for tensor in each or ()]
    if has_torch_function(tensors):
        return handle_torch_function(scales_of_sums, tensors, norms, factors, eps, compositions, wide)
    weights, biases, means, variances, inner = norms
    runs = runs_of(tuple(compositions), tuple(mean.shape[0] for mean in means))
    wide = torch.float64 if torch.float64 in {tensor.dtype for tensor in tensors} else wide  # cast after the rewrite
    static = _Static(eps, wide, precise(means[0], wide), runs)
    means, variances = ([own[number] for number in runs.order] for own in (means, variances))
    lists = *([own[number] for number in runs.order] if own else () for own in (weights, biases, inner)), factors
    if needs_plain_torch(*tensors) or any(each.requires_grad for each in (*means, *variances)):
        return _outputs(static, *_statistics(static, means, variances), _learned(static, lists))
    counts = tuple(map(len, lists))
    return _Scales.apply(static, means, variances, counts, *(tensor for each in lists for tensor in each))


class _Static(NamedTuple):
    eps: float
    wide: torch.dtype
    fine: torch.dtype
    runs: Runs


class _Scales(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        static: _Static,
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        counts: tuple[int, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.static, ctx.counts = static, counts
        ctx.set_materialize_grads(False)
        lists = _split(tensors, counts)
        ctx.dtypes = [{each.dtype for each in own} for own in lists]
        ctx.shapes = [factor.shape for factor in lists[-1]]
        mean, inverse = _statistics(static, means, variances)
        # Without biases of convolutions and factors, no gradient depends on what learns.
        saved = savable(tensors) if counts[2] or counts[3] else []
        ctx.sums = checksums(saved) if checks_data() else None
        ctx.save_for_backward(mean, inverse, *saved)
        outputs = _outputs(static, mean, inverse, _learned(static, lists))
        if not any(each.requires_grad for each in (*lists[0], *lists[3])):
            # The biases alone train. Scales with a gradient would cost each convolution the gradient of its weight.
            ctx.mark_non_differentiable(*outputs[: len(outputs) // 2])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        mean, inverse, *saved = ctx.saved_tensors
        if ctx.sums is not None:
            names = [f"vector {index} of the BatchNorms" for index in range(len(saved))]
            raise_if_changed(names, ctx.sums, checksums(saved))
        runs, halves = ctx.static.runs, (grads[: len(grads) // 2], grads[len(grads) // 2 :])
        of_terms = _by_run(runs, halves[0], [(run.composition.terms,) for run in runs.runs], mean)
        of_biases = _by_run(runs, halves[1], [()] * len(runs.runs), mean)
        scale = shift = factors = None
        if saved:
            weight, bias, inner, factors = _learned(ctx.static, _split(saved, ctx.counts))
            mean = mean if inner is None else mean - inner
            scale, shift = scale_and_shift(weight, bias, mean, inverse)
        g, h, of_factors = runs.gradients(of_terms, of_biases, scale, shift, factors)
        vectors = (g - h * mean) * inverse, h, None if scale is None else h * scale
        # Without gradients of a sum, its vectors have none, as if it was computed alone: no zeros.
        reached = [of_term is not None or of_bias is not None for of_term, of_bias in zip(*halves, strict=True)]
        found = [
            grad if reached[owner] else None
            for own, count, dtypes in zip(vectors, ctx.counts, ctx.dtypes, strict=False)
            if own is not None and count
            for grad, owner in zip(gradients_of_parts(_rounded(own, dtypes), runs.sizes), runs.owners, strict=True)
        ]
        if of_factors is not None:
            sizes = [shape.numel() for shape in ctx.shapes]
            parts = gradients_of_parts(_rounded(of_factors, ctx.dtypes[-1]), sizes)
            each = zip(parts, ctx.shapes, runs.with_factor, strict=True)
            found += [part.reshape(shape).clone() if reached[owner] else None for part, shape, owner in each]
        return None, None, None, None, *found


Learned = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""All bn_weights, bn_biases, biases of convolutions and factors, each in one vector. None if there are none."""


def _statistics(static: _Static, means: Sequence[Tensor], variances: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return all means, and ``rsqrt(running_var + eps)``."""
    return _joined(means, static.fine), torch.rsqrt(_joined(variances, static.fine) + static.eps)


def _learned(static: _Static, lists: Sequence[Sequence[Tensor]]) -> Learned:
    *vectors, factors = lists
    flat = [factor.reshape(-1) for factor in factors]
    return tuple(_joined(each, static.fine) if each else None for each in (*vectors, flat))  # type: ignore[return-value]


def _outputs(static: _Static, mean: Tensor, inverse: Tensor, learned: Learned) -> tuple[Tensor, ...]:
    """Return what `scales_of_sums` returns. Differentiable."""
    weight, bias, inner, factors = learned
    vectors = scale_and_shift(weight, bias, mean if inner is None else mean - inner, inverse)
    scales: list[Tensor] = []
    biases: list[Tensor] = []
    for run, (terms, bias) in zip(static.runs.runs, static.runs.combined(*vectors, factors), strict=True):
        scales += as_dtype(terms, static.wide).split_with_sizes(run.widths, 1)
        biases += as_dtype(bias, static.wide).split_with_sizes(run.widths)
    return *scales, *biases


def _joined(vectors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return as_dtype(torch.cat(tuple(vectors)), dtype)


def _split(values: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    rest = iter(values)
    return [[next(rest) for _ in range(count)] for count in counts]


def _rounded(grad: Tensor, dtypes: set[torch.dtype]) -> Tensor:
    """Return a gradient in the dtype of its vectors. Autograd rounds it for those of several dtypes, 5 us each."""
    return grad if len(dtypes) > 1 else as_dtype(grad, *dtypes)


def _by_run(runs: Runs, grads: Sequence[Tensor | None], rows: Sequence[tuple[int, ...]], like: Tensor) -> list[Tensor]:
    """Return the gradients of each run side by side, zeros for those that are None. rows: Their other dimensions."""
    rest, found = iter(grads), []
    for run, own in zip(runs.runs, rows, strict=True):
        every = [(next(rest), width) for width in run.widths]
        parts = [like.new_zeros(*own, width) if grad is None else grad for grad, width in every]
        found.append(as_dtype(torch.cat(parts, -1), like.dtype))
    return found
