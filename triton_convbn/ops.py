"""The fold of a group of pairs as operators: ``triton_convbn::fold`` and ``triton_convbn::fold_backward``.

They are opaque to Inductor (`torch.library.custom_op`). Where Triton can run they launch one generated kernel for the
whole group, elsewhere they are the plain algebra.

A schema can hold lists of tensors but no lists of records, and a list with absent tensors is not differentiable. So a
group is written as columns: the weights; the vectors of all pairs that are present, one after the other; and for each
pair a mask of which of the three optional vectors it has, its eps, and so on. `Columns` is the one place that knows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import algebra, plain
from .counting import count
from .kernel_choice import kernel_runs
from .kernels.fold import fold as launch_fold
from .kernels.fold_backward import fold_backward as launch_fold_backward
from .kernels.inputs import POWER_DTYPE, FoldInputs, Unsupported, unsupported_reason
from .kernels.spec import Needs

OPTIONAL = ("bias", "bn_weight", "bn_bias")
LAYOUTS = (torch.preserve_format, torch.channels_last, torch.channels_last_3d)


class Columns(NamedTuple):
    """A group of pairs as the operators take it.

    weights: one a pair. vectors: of each pair, those present of (bias, bn_weight, bn_bias), then mean and var.
    present: bit i of it says whether OPTIONAL[i] is there. dtypes: index into `algebra.FLOATING`, -1: the weight's own.
    layouts: index into LAYOUTS, of the folded weight. headroom: see `FoldInputs`.
    """

    weights: list[Any]
    vectors: list[Any]
    present: list[int]
    eps: list[float]
    transposed: list[bool]
    groups: list[int]
    dtypes: list[int]
    layouts: list[int]
    headroom: list[bool]

    @classmethod
    def of(cls, group: Sequence[FoldInputs]) -> "Columns":
        """The columns of pairs, of tensors as of graph nodes."""
        columns = cls([], [], [], [], [], [], [], [], [])
        for pair in group:
            optional = [pair.bias, pair.bn_weight, pair.bn_bias]
            columns.weights.append(pair.weight)
            columns.vectors.extend(v for v in (*optional, pair.running_mean, pair.running_var) if v is not None)
            columns.present.append(sum((v is not None) << i for i, v in enumerate(optional)))
            columns.eps.append(pair.eps)
            columns.transposed.append(pair.transposed)
            columns.groups.append(pair.groups)
            columns.dtypes.append(-1 if pair.out_dtype is None else algebra.FLOATING.index(pair.out_dtype))
            columns.layouts.append(LAYOUTS.index(pair.memory_format or torch.preserve_format))
            columns.headroom.append(pair.headroom)
        return columns

    def pairs(self) -> list[FoldInputs]:
        vectors = iter(self.vectors)
        found = []
        for i, weight in enumerate(self.weights):
            optional = [next(vectors) if self.present[i] >> bit & 1 else None for bit in range(len(OPTIONAL))]
            dtype = None if self.dtypes[i] < 0 else algebra.FLOATING[self.dtypes[i]]
            mean, var = next(vectors), next(vectors)
            static = self.eps[i], self.transposed[i], self.groups[i], dtype, LAYOUTS[self.layouts[i]], self.headroom[i]
            found.append(FoldInputs(weight, *optional, mean, var, *static))
        return found

    def by_pair(self, outputs: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
        """Of each pair W', b' and q, None without headroom, from all that `fold` returns. Or from their numbers."""
        end = 2 * len(self.weights)
        return list(zip(outputs[0:end:2], outputs[1:end:2], self.each_power(outputs[end:]), strict=True))

    def each_power(self, powers: Sequence[Any]) -> list[Any]:
        """Of each pair its q, None without headroom, from those that there are."""
        rest = iter(powers)
        return [next(rest) if headroom else None for headroom in self.headroom]

    def gradients(self, pairs: Sequence[Sequence[Tensor | None]]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Gradients given pair by pair, for (weight, bias, bn_weight, bn_bias), in the order of weights and vectors."""
        vectors: list[Tensor | None] = []
        for i, gradients in enumerate(pairs):
            vectors += [gradients[1 + bit] for bit in range(len(OPTIONAL)) if self.present[i] >> bit & 1]
            vectors += [None, None]  # the statistics
        return [gradients[0] for gradients in pairs], vectors

    def needs(self, weights: Sequence[bool], vectors: Sequence[bool]) -> list[Needs]:
        """Which gradients are wanted of each pair, from the flags of weights and vectors."""
        flags = iter(vectors)
        found = []
        for i, weight in enumerate(weights):
            wanted = [bool(next(flags)) if self.present[i] >> bit & 1 else False for bit in range(len(OPTIONAL))]
            if next(flags) | next(flags):
                raise NotImplementedError("triton_convbn::fold has no gradient for the statistics: use algebra.fold")
            found.append(Needs(bool(weight), *wanted))
        return found


def _for_kernel(pairs: Sequence[FoldInputs]) -> bool:
    """Whether the kernel takes the group. What it does not take is counted, by reason."""
    if not pairs or not kernel_runs(pairs[0].weight.device):
        return False
    reasons = [reason for pair in pairs if (reason := unsupported_reason(pair)) is not None]
    for reason in reasons:
        count(f"decomposed:{reason}")
    return not reasons


# -- forward ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("triton_convbn::fold", mutates_args=())
def fold_group(
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    present: Sequence[int],
    eps: Sequence[float],
    transposed: Sequence[bool],
    groups: Sequence[int],
    dtypes: Sequence[int],
    layouts: Sequence[int],
    headroom: Sequence[bool],
) -> list[Tensor]:
    """Fold every pair of a group, written as `Columns` says. Returns W' and b' of the first pair, of the second, ...,
    and after them q of each pair with headroom: `Columns.by_pair` sorts them.

    Formulas, shapes and dtypes are those of `algebra.fold`. Weights keep their strides where no layout is asked for.
    """
    pairs = Columns(weights, vectors, present, eps, transposed, groups, dtypes, layouts, headroom).pairs()  # type: ignore[arg-type]
    folded = launch_fold(pairs) if _for_kernel(pairs) else list(map(plain.fold, pairs))
    return [tensor for pair in folded for tensor in pair[:2]] + [tensor for pair in folded for tensor in pair[2:]]


@fold_group.register_fake
def _(*columns):  # type: ignore[no-untyped-def]
    outputs, pairs = [], Columns(*columns).pairs()
    for pair in pairs:
        dtype, mean = pair.out_dtype or pair.weight.dtype, pair.running_mean
        layout = pair.memory_format or torch.preserve_format
        outputs += [
            torch.empty_like(pair.weight, dtype=dtype, memory_format=layout),
            mean.new_empty(mean.shape, dtype=dtype),
        ]
    means = [pair.running_mean for pair in pairs if pair.headroom]
    return outputs + [mean.new_empty(mean.shape, dtype=POWER_DTYPE) for mean in means]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    columns = Columns(*inputs)
    ctx.set_materialize_grads(False)  # zeros for what nothing reaches would be launches of their own
    powers = output[2 * len(columns.weights) :]
    ctx.save_for_backward(*columns.weights, *columns.vectors, *powers)
    ctx.static = columns[2:]


def _saved(ctx: Any) -> tuple[Columns, list[Tensor]]:
    """The columns, and the powers of two of the pairs with headroom."""
    saved, count = list(ctx.saved_tensors), len(ctx.static[0])
    end = len(saved) - sum(ctx.static[-1])
    return Columns(saved[:count], saved[count:end], *ctx.static), saved[end:]


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
    columns, powers = _saved(ctx)
    weights, vectors, *_ = ctx.needs_input_grad
    needs = columns.needs(weights, vectors)
    pairs = [(grads[2 * i], grads[2 * i + 1]) for i in range(len(columns.weights))]
    found = fold_backward(columns, pairs, needs, powers)
    return (*columns.gradients(found), *[None] * len(ctx.static))


fold_group.register_autograd(_backward, setup_context=_save)

FOLD = torch.ops.triton_convbn.fold.default
"""The operator, as it stands in a graph."""


# -- backward ---------------------------------------------------------------------------------------------------------


def fold_backward(
    columns: Columns,
    grads: Sequence[tuple[Tensor | None, Tensor | None]],
    needs: Sequence[Needs],
    powers: Sequence[Tensor] = (),
) -> list[list[Tensor | None]]:
    """The gradients (dW, db, d_bn_weight, d_bn_bias) of each pair from its (dW', db'), None where not needed.

    powers: the q that the fold returned, of the pairs with headroom.
    """
    given = [(weight is not None) | (bias is not None) << 1 for weight, bias in grads]
    wanted = [
        sum(bool(flag) << bit for bit, flag in enumerate(_reached(need, grad)))
        for need, grad in zip(needs, grads, strict=True)
    ]
    flat = [grad for pair in grads for grad in pair if grad is not None]
    gradients = iter(fold_backward_group(flat, given, wanted, powers, *columns))
    return [[next(gradients) if mask >> bit & 1 else None for bit in range(4)] for mask in wanted]


def _reached(needs: Needs, grads: tuple[Tensor | None, Tensor | None]) -> Needs:
    weight, bias = (grad is not None for grad in grads)
    return Needs(
        needs.weight and weight, needs.bias and bias, needs.bn_weight and (weight or bias), needs.bn_bias and bias
    )


def grad_pairs(grads: Sequence[Tensor], given: Sequence[int]) -> list[tuple[Tensor | None, Tensor | None]]:
    rest = iter(grads)
    return [(next(rest) if mask & 1 else None, next(rest) if mask & 2 else None) for mask in given]


def _backward_plain(
    grads: Sequence[Tensor], given: Sequence[int], wanted: Sequence[int], powers: Sequence[Tensor], columns: Columns
) -> list[Tensor]:
    found = []
    every = zip(columns.pairs(), grad_pairs(grads, given), wanted, columns.each_power(powers), strict=True)
    for pair, (grad_weight, grad_bias), mask, power in every:
        if grad_bias is not None and grad_bias.ndim == 2:
            grad_bias = grad_bias.sum(0)
        gradients = plain.fold_backward(pair, grad_weight, grad_bias, power)
        found += [gradient for bit, gradient in enumerate(gradients) if mask >> bit & 1]
    return found  # type: ignore[return-value]


# The kernel reads dW' in either layout. Without the tag Inductor would copy each that its convolution backward returns
# channels_last to the contiguous strides of the trace: 17 copies, 91 MB, in ResNet-50's backward.
@torch.library.custom_op("triton_convbn::fold_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def fold_backward_group(
    grads: Sequence[Tensor],
    given: Sequence[int],
    wanted: Sequence[int],
    powers: Sequence[Tensor],
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    present: Sequence[int],
    eps: Sequence[float],
    transposed: Sequence[bool],
    groups: Sequence[int],
    dtypes: Sequence[int],
    layouts: Sequence[int],
    headroom: Sequence[bool],
) -> list[Tensor]:
    """The gradients of a group of folds: those that are wanted, pair by pair, each in its parameter's dtype and layout.

    grads: of each pair, dW' and db' as far as they are there. given: bit 0: dW' is, bit 1: db' is. A db' may come as
    rows [R, C_out] that are still to be summed.
    wanted: bits for dW, db, d_bn_weight, d_bn_bias. powers: q of the pairs with headroom, constants here.
    """
    columns = Columns(weights, vectors, present, eps, transposed, groups, dtypes, layouts, headroom)  # type: ignore[arg-type]
    pairs = columns.pairs()
    if _for_kernel(pairs):
        needs = [Needs(*(bool(mask >> bit & 1) for bit in range(4))) for mask in wanted]
        contiguous = [
            (_dense(weight), bias if bias is None else bias.contiguous()) for weight, bias in grad_pairs(grads, given)
        ]
        try:
            found = launch_fold_backward(pairs, contiguous, needs, powers=columns.each_power(powers))
            return [gradient for pair in found for gradient in pair if gradient is not None]
        except Unsupported as error:
            count(f"decomposed:{error}")
    parameters = [parameter for pair, mask in zip(pairs, wanted, strict=True) for parameter in _wanted(pair, mask)]
    with torch.no_grad():
        found = _backward_plain(grads, given, wanted, powers, columns)
        return [_like(gradient, parameter) for gradient, parameter in zip(found, parameters, strict=True)]


def _wanted(pair: FoldInputs, mask: int) -> list[Any]:
    """Of (weight, bias, bn_weight, bn_bias) those whose bit is set."""
    return [parameter for bit, parameter in enumerate(pair[:4]) if mask >> bit & 1]


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with the strides that the fake promises: plain torch gives it those of dW'."""
    promised = torch.empty_like(parameter)
    return gradient if gradient.stride() == promised.stride() else promised.copy_(gradient)


def _dense(grad: Tensor | None) -> Tensor | None:
    """dW' as the kernel reads it: what an expand or a slice gave it is laid out first."""
    if (
        grad is None
        or grad.is_contiguous()
        or any(
            grad.ndim == n and grad.is_contiguous(memory_format=layout)
            for n, layout in ((4, torch.channels_last), (5, torch.channels_last_3d))
        )
    ):
        return grad
    return grad.contiguous()


@fold_backward_group.register_fake
def _(grads, given, wanted, powers, *columns):  # type: ignore[no-untyped-def]
    return [
        torch.empty_like(parameter)
        for pair, mask in zip(Columns(*columns).pairs(), wanted, strict=True)
        for parameter in _wanted(pair, mask)
    ]


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grads, given, wanted, powers, *rest = inputs
    columns = Columns(*rest)
    ctx.save_for_backward(*grads, *columns.weights, *columns.vectors, *powers)
    ctx.given, ctx.wanted, ctx.static = given, wanted, columns[2:]


def _double_backward(ctx: Any, grads_of_gradients: Sequence[Tensor | None]) -> Any:
    """Through the algebra: second derivatives are rare, and torch has them."""
    count, pairs = sum(bin(mask).count("1") for mask in ctx.given), len(ctx.static[0])
    flags = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[4], *ctx.needs_input_grad[5]]
    saved, powers = ctx.saved_tensors[: len(flags)], ctx.saved_tensors[len(flags) :]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(flag) for t, flag in zip(saved, flags, strict=True)]
        columns = Columns(leaves[count : count + pairs], leaves[count + pairs :], *ctx.static)
        outputs = _backward_plain(leaves[:count], ctx.given, ctx.wanted, powers, columns)
        used = [(o, g) for o, g in zip(outputs, grads_of_gradients, strict=True) if g is not None and o.requires_grad]
        inputs = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in used], inputs, [g for _, g in used], allow_unused=True, create_graph=True
            )
        )
    every = [next(found) if flag else None for flag in flags]
    weights, vectors = every[count : count + pairs], every[count + pairs :]
    return every[:count], None, None, [None] * len(powers), weights, vectors, *[None] * len(ctx.static)


fold_backward_group.register_autograd(_double_backward, setup_context=_save_backward)

FOLD_BACKWARD = torch.ops.triton_convbn.fold_backward.default
