"""Merge branches and convolve as one autograd function, which merges again in backward.

In eager mode autograd would save every branch's output, and every step of the merge. This function saves the input and
the parameters of the branches, which exist anyway. All gradients of a block come out of one dW':

    dW_k = crop(dW') * s_k     ds_k = sum over the channel of crop(dW') * W_k     ds_0 = diagonal of dW' at the centre

and those of the BatchNorms out of the ds, see `branch_gradients`.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..dispatch import in_transform, kernel_runs
from .autograd import Convolution, Sizes, as_autocast_does, checks_data, checksums, raise_if_changed, spread
from .branch_form import Expression, Form, form_of
from .branch_gradients import gradients
from .branch_terms import Terms, Vectors, combine
from .branches import fold_branches, packed
from .merge_library import merge_backward_op, merge_op
from .merge_plan import Wanted
from .merge_reference import cropped, diagonal_of, dot
from .reference import as_dtype, scaled_back
from .registration import gradients_of

SMALL = 0.25
"""The merged weight is saved if it has at most this share of the input's elements. Merged again, it takes time."""


def conv_with_branches(
    x: Tensor,
    tensors: Sequence[Tensor],
    expression: Expression,
    kernel: tuple[int, ...],
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    general: bool = False,
    kernel_merges: bool = True,
) -> Tensor:
    """Return a sum of branches as one convolution. Backward merges again instead of saving the merged weight.

    Args:
        x: The input that all branches read, ``(N, C_in, *spatial)``.
        tensors, expression, kernel, dtype: See `fold_branches`. Under autocast its dtype is used instead.
        stride, padding, dilation, groups: Those of the branch with the largest kernel.
        general: As in `conv_with_fold`.
        kernel_merges: Allow a generated kernel to merge the weights if one can run; else use plain torch.

    Returns:
        ``(N, C_out, *spatial)``. Twice differentiable.

    Source: arXiv 2101.03697, section 3.3.
    """
    if has_torch_function((x, *tensors)):
        keywords: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "dtype": dtype,
            "kernel_merges": kernel_merges,
        }
        return handle_torch_function(conv_with_branches, (x, *tensors), x, tensors, expression, kernel, **keywords)
    form = form_of(expression)
    x, dtype = as_autocast_does(x, tensors[form.weights[0]], dtype, general)
    n = len(kernel)
    conv = Convolution(spread(stride, n), spread(padding, n), spread(dilation, n), False, (0,) * n, groups)
    static = expression, kernel, groups, dtype
    plain = torch.compiler.is_compiling() or in_transform(x, *tensors) or torch._C._are_functorch_transforms_active()
    if plain or any(tensors[position].requires_grad for position in form.statistics):
        return _convolved(x, conv, fold_branches(tensors, *static))
    kernel_merges = kernel_merges and kernel_runs(x.device)
    return _ConvWithBranches.apply(x, conv, (form, *static[1:], kernel_merges), *tensors)


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    """Return parts of these lengths, and the rest."""
    ends = list(itertools.accumulate(counts, initial=0))
    return [tensors[start:end] for start, end in zip(ends, [*ends[1:], None], strict=True)]


def _convolved(x: Tensor, conv: Convolution, folded: tuple[Tensor, ...]) -> Tensor:
    weight, bias, *power = folded
    output = conv(x, weight, bias)
    return scaled_back(output, power[0]) if power else output


class _ConvWithBranches(torch.autograd.Function):
    """Compute ``conv(x, *fold_branches(...))`` and save the input and the tensors of the branches."""

    # No `setup_context`: with it, `apply` inspects the signature on every call, which takes 20 of 33 us (30 tensors).
    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: Convolution, static: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        ctx.conv, ctx.static = conv, static
        ctx.sums = checksums((x, *tensors)) if checks_data() else None
        form, _, groups, dtype, kernel_merges = static
        vectors = Vectors(form, tensors, stacks=True)
        terms, bias, *power = combine(vectors, dtype)
        weight = _merged(terms, tensors, groups, bias.dtype, kernel_merges)
        kept = [weight] if weight.numel() <= SMALL * x.numel() else []
        computed = [*kept, *power, *vectors.saved()]
        ctx.counts = len(tensors), len(kept), len(power)
        ctx.save_for_backward(x, *tensors, *computed)
        return _convolved(x, conv, (weight, bias, *power))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        tensors, kept, power, vectors = _split(saved, ctx.counts)
        if ctx.sums is not None:
            names = ("input", *(f"tensor {index} of the branches" for index in range(len(tensors))))
            raise_if_changed(names, ctx.sums, checksums((x, *tensors)))
        of_x, _, _, *flags = ctx.needs_input_grad
        given = _Saved(x, tensors, kept, power, vectors, of_x, flags, ctx.conv, *ctx.static)
        dx, found = (_gradients_by_autograd if torch.is_grad_enabled() else _gradients)(grad, given)
        return dx, None, None, *found


class _Saved(NamedTuple):
    """What forward saved, and which of x and the tensors need a gradient.

    kept: The merged weight, or nothing.
    power: q, or nothing.
    vectors: See `Vectors.saved`.
    """

    x: Tensor
    tensors: Sequence[Tensor]
    kept: Sequence[Tensor]
    power: Sequence[Tensor]
    vectors: Sequence[Tensor]
    of_x: bool
    flags: Sequence[bool]
    conv: Convolution
    form: Form
    kernel: tuple[int, ...]
    groups: int
    dtype: torch.dtype | None
    kernel_merges: bool


Gradients = tuple[Tensor | None, list[Tensor | None]]


def _gradients_by_autograd(grad: Tensor, saved: _Saved) -> Gradients:
    """Return the gradients of x and of the tensors, None where not needed. Differentiable."""
    x, tensors, _, _, _, of_x, flags, conv, form, kernel, groups, dtype, kernel_merges = saved
    weight, bias, *power = fold_branches(tensors, form.expression, kernel, groups, dtype, kernel_merges=kernel_merges)
    grad = scaled_back(grad, power[0]) if power else grad
    dx, *grads = conv.backward(grad, x, weight, (of_x, weight.requires_grad, bias.requires_grad))
    return dx, gradients_of([weight, bias], grads, tensors, flags)


def _gradients(grad: Tensor, saved: _Saved) -> Gradients:
    """Return the same by the formulas. Autograd on weights would copy each of them several times."""
    x, tensors, kept, power, restored, of_x, flags, conv, form, _, groups, dtype, kernel_merges = saved
    with torch.no_grad():
        vectors = Vectors(form, tensors, restored=restored)
        inverse = power[0].to(vectors.wide).reciprocal() if power else None
        terms = vectors.terms() if inverse is None else vectors.terms().times(inverse)
        dtype = dtype or tensors[form.weights[0]].dtype
        weight = kept[0] if kept else _merged(terms, tensors, groups, dtype, kernel_merges)
        grad = scaled_back(grad, power[0]) if power else grad
        scales_train, bias_trains = form.trains(flags)
        weight_trains = scales_train or any(flags[position] for position in form.weights)
        dx, merged_grad, of_bias = conv.backward(grad, x, weight, (of_x, weight_trains, bias_trains))
        of_rows: Sequence[Tensor | None] = [None] * len(terms.rows())
        of_weights: dict[int, Tensor] = {}
        if merged_grad is not None:
            compute = _gradients_by_kernel if kernel_merges else _gradients_in_torch
            of_rows, of_weights = compute(merged_grad, terms, tensors, flags, groups, scales_train)
        if of_bias is not None:
            of_bias = as_dtype(of_bias, vectors.wide)
        if inverse is not None:
            of_rows = [None if each is None else each * inverse for each in of_rows]
            of_bias = None if of_bias is None else of_bias * inverse
        found = gradients(vectors, flags, of_rows, of_bias)
    for position, of_one in of_weights.items():
        found[position] = of_one
    return dx, found


ScalesAndWeights = tuple[list[Tensor | None], dict[int, Tensor]]
"""Gradients of `Terms.rows`, None if the scales do not train, and of the weights by position."""


def _gradients_in_torch(
    grad: Tensor, terms: Terms, tensors: Sequence[Tensor], flags: Sequence[bool], groups: int, scales_train: bool
) -> ScalesAndWeights:
    """Return the gradients of a sum's scales and weights. May overwrite dW', `grad`."""
    grad = as_dtype(grad, terms.scales[0].dtype)
    of_rows: list[Tensor | None] = [None] * len(terms.rows())
    if terms.identity is not None and scales_train:
        of_rows[-1] = diagonal_of(grad, groups).reshape(-1).clone()
    of_weights: dict[int, Tensor] = {}
    order = _by_size(terms, tensors)[::-1]
    for number in order:
        position, scale = terms.weights[number], terms.scales[number]
        weight = tensors[position]
        part = cropped(grad, weight)
        if scales_train:
            of_rows[number] = dot(part, as_dtype(weight, scale.dtype))
        if flags[position]:
            by = scale.view(-1, *(1,) * (weight.ndim - 1))
            # The last product may replace dW', which saves a tensor of its size.
            last = number == order[-1] and part.shape == grad.shape
            product = as_dtype(part.mul_(by) if last else part * by, weight.dtype)
            of_weights[position] = of_weights[position] + product if position in of_weights else product
    return of_rows, of_weights


def _gradients_by_kernel(
    grad: Tensor, terms: Terms, tensors: Sequence[Tensor], flags: Sequence[bool], groups: int, scales_train: bool
) -> ScalesAndWeights:
    """Return the same by the operator `triton_convbn::merge_backward`."""
    wanted = Wanted([flags[position] for position in terms.weights], scales_train)
    found = iter(merge_backward_op([grad], [wanted.mask], *packed(terms, tensors, grad.dtype)))
    of_weights: dict[int, Tensor] = {}
    for position, wants in zip(terms.weights, wanted.weights, strict=True):
        if wants:
            of_weight = next(found)
            of_weights[position] = of_weights[position] + of_weight if position in of_weights else of_weight
    return list(next(found).unbind() if scales_train else [None] * len(terms.rows())), of_weights


def _merged(terms: Terms, tensors: Sequence[Tensor], groups: int, dtype: torch.dtype, kernel_merges: bool) -> Tensor:
    """Return the merged weight: by a kernel, or by operations in place, with one new tensor and not one a branch."""
    total: Tensor | None = None
    with torch.no_grad():
        if kernel_merges:
            (weight,) = merge_op(*packed(terms, tensors, dtype))
            return weight
        for number in _by_size(terms, tensors):
            scale = terms.scales[number]
            weight = as_dtype(tensors[terms.weights[number]], scale.dtype)
            by = scale.view(-1, *(1,) * (weight.ndim - 1))
            if total is None:
                total = weight * by
            else:
                cropped(total, weight).addcmul_(weight, by)
        assert total is not None
        if terms.identity is not None:
            own = diagonal_of(total, groups)
            own += terms.identity.view_as(own)
    return as_dtype(total, dtype)


def _by_size(terms: Terms, tensors: Sequence[Tensor]) -> list[int]:
    """Return the numbers of the weights, the largest kernels first."""
    sizes = [tensors[position].shape[2:] for position in terms.weights]
    return sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
