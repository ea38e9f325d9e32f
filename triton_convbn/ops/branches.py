"""Fold a sum of branches that read one input into the weight and bias of a single convolution.

A branch is a convolution, the input itself, or one of these behind BatchNorms in eval mode and factors per channel. All
of it is linear in the weights, so the sum is one convolution ("RepVGG", arXiv 2101.03697, section 3.3):

    sum_k s_k * conv(x, W_k, b_k) + s_0 * x  =  conv(x, sum_k embed(s_k * W_k) + diag(s_0), b')

`embed` places a smaller kernel in the middle of the largest. `diag` is the kernel of the identity: at the centre, 1
where the input channel is the output channel.

It is computed in two steps. `branch_terms.combine` computes the vectors s_k, s_0 and b', which are small. Then every
weight is read once and the sum is written once: by a generated kernel, or by `merge_reference.merged_weight`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .branch_form import Expression, form_of
from .branch_terms import Vectors, combine
from .merge_library import merge_op
from .merge_plan import PackedSums
from .merge_reference import apart, merged_weight
from .reference import FLOATING, arithmetic, as_dtype


def fold_branches(
    tensors: Sequence[Tensor],
    expression: Expression,
    kernel: tuple[int, ...],
    groups: int = 1,
    dtype: torch.dtype | None = None,
    prescale: bool = True,
    kernel_merges: bool = False,
    input_last: bool = False,
) -> tuple[Tensor, ...]:
    """Return the weight and bias of the convolution that a sum of branches is. Differentiable.

    Args:
        tensors: What the expression refers to: weights ``(C_out, C_in / groups, *kernel_k)``, vectors ``(C_out,)``,
            and factors.
        expression: See `branch_form`.
        kernel: The sizes of the merged kernel, those of the largest branch.
        groups: Groups of every convolution.
        dtype: The dtype of W' and b'. None: that of the first weight.
        prescale: Keep fp16 in range. False if the caller reads W' and b'.
        kernel_merges: Merge the weights by the operator `triton_convbn::merge`, which launches a generated kernel.
        input_last: Leave the input out of W' and return its scale for `add_input`. Not for fp16.

    Returns:
        ``(W', b')`` of shapes ``(C_out, C_in / groups, *kernel)`` and ``(C_out,)``. In fp16 ``(W' / q, b' / q, q)`` of
        `branch_terms.combine`. With `input_last` ``(W', b', s_0)``. On a CPU the arithmetic is in fp64: under Inductor
        gradients of mobileone_s0 and fastvit_t8 have 0.91 and 1.04 times the error of eager's, in fp32 both 1.13, and
        inference of mobileone_s0 takes 1.01 times as long. Elsewhere, and in a kernel, it is in fp32, or in fp64 if a
        tensor is fp64. It is rounded once.

    Source: arXiv 2101.03697, section 3.3.
    """
    if has_torch_function(tensors):
        arguments = tensors, expression, kernel, groups, dtype, prescale, kernel_merges, input_last
        return handle_torch_function(fold_branches, tensors, *arguments)
    terms, bias, *power = combine(Vectors(form_of(expression), tensors), dtype, prescale)
    identity = terms.identity
    if input_last:
        terms = terms._replace(identity=None)
    weights = [tensors[position] for position in terms.weights]
    if kernel_merges:
        rows = as_dtype(torch.stack(terms.rows()), arithmetic(tensors))
        (weight,) = merge_op(*PackedSums(weights, [rows], [len(weights)], [FLOATING.index(bias.dtype)]))
    else:
        weight = merged_weight(weights, terms.scales, terms.identity, kernel, groups).to(bias.dtype)
    if input_last and identity is not None:
        weight, added = apart(weight, identity, groups)
        return weight, bias, added
    return (weight, bias, *power)
