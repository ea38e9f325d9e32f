"""Find the BatchNorms that fold into the convolution that reads their output.

Example: for ``z = batch_norm(x, ...); y = linear(z, w, b)``, where x is no convolution's output, `fold_input_norms`
moves the BatchNorm from the declines to `Findings.input_norms`. The fold is exact if

1. one convolution or Linear alone reads z, through calls that only move or repeat elements (`_reader`);
2. it does not pad with zeros, which the BatchNorm would shift, and is not transposed (`_sums_obstacle`);
3. it sums over the dimension that has z's dim 1, and channels, dtypes and devices fit (`_tensors`);
4. x and the BatchNorm's vectors are the same at y as at z, and stay so until backward (`mutation`).

The convolution may be part of a pair. Both BatchNorms then fold in one step. It is not part of a merged sum: all
branches of a sum read z.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..ops.reference import FLOATING
from .calls import BatchNormCall, ConvCall, Value, dtype_of, is_subclass, rank_of, shape_of, tensor_of
from .channels import dim_after
from .dialects import REPEATING, read_conv, read_padding, read_passthrough
from .findings import CannotFold, Decline, Findings
from .fit import changes_dtype, example_misleads, has_backward, rounding
from .match import removable_nodes, unfit, uses
from .mutation import Mutations
from .producers import is_folded
from .reasons import Reason


@dataclass(frozen=True)
class InputNorm:
    """An eval-mode BatchNorm, and the convolution that reads its output and into which it folds.

    Attributes:
        bn, conv: The calls.
        dtype: The dtype to round the folded weight to if it is not the weight's own (autocast), else None.
        steps: The nodes between the two, in order.
        last: The node before which the fold is computed: the convolution, or the BatchNorm after it that folds too.
    """

    bn: BatchNormCall
    conv: ConvCall
    dtype: torch.dtype | None
    steps: tuple[fx.Node, ...]
    last: fx.Node

    @property
    def vectors(self) -> tuple[Value, ...]:
        """Return the BatchNorm's bn_weight, bn_bias, running_mean and running_var."""
        return self.bn.vectors


def fold_input_norms(
    findings: Findings,
    graph: fx.Graph,
    decline: Callable[[InputNorm], Decline | None] = lambda norm: None,
    inputs_are_kept: bool = False,
) -> Findings:
    """Return the findings with the BatchNorms that fold into the convolution after them. The graph does not change.

    A BatchNorm that folds into the convolution before it is in a pair and stays there. One that declines keeps its
    reason, unless the reason is that no convolution is before it, and one is after it.

    Args:
        findings: Every BatchNorm of the graph.
        graph: The graph.
        decline: Return the decline of a BatchNorm that could fold but is not to, else None.
        inputs_are_kept: Decline if an input of the graph that the fold reads is written to, see `match.drop_written`.
    """
    last = {pair.conv.node: pair.bn.node for pair in findings.pairs}
    found: list[InputNorm] = []
    declines: list[Decline] = []
    for earlier in findings.declines:
        bn, mutations = earlier.bn, findings.mutations
        if earlier.reason is Reason.DOES_NOT_PAY or mutations is None or unfit(bn) is not None:
            declines.append(earlier)
            continue
        try:
            norm = _match(bn, graph, mutations, last, inputs_are_kept)
        except CannotFold as error:
            other = Decline(bn, error.reason, error.node.name)
            declines.append(other if earlier.reason is Reason.INPUT_NOT_CONV else earlier)
            continue
        declined = earlier if norm is None else decline(norm)
        if declined is not None:
            declines.append(declined)
        elif norm is not None:
            found.append(norm)
    convs = {norm.conv.node for norm in found}  # which the fold replaces
    unprofitable = [pair for pair in findings.unprofitable if pair.conv.node not in convs]
    return replace(findings, declines=declines, input_norms=found, unprofitable=unprofitable)


def _match(
    bn: BatchNormCall, graph: fx.Graph, mutations: Mutations, last: dict[fx.Node, fx.Node], inputs_are_kept: bool
) -> InputNorm | None:
    """Return the BatchNorm with the convolution that reads it, or None if none does.

    Raises:
        CannotFold: a convolution reads it, and the fold is not known to be exact.
    """
    reader = _reader(bn.output, graph)
    if reader is None:
        return None
    conv, steps, dim = reader
    reason = bn.obstacle or conv.obstacle or _sums_obstacle(conv, steps, graph) or _tensors(conv, steps, dim, bn, graph)
    if reason is not None:
        raise CannotFold(reason, bn.node if bn.obstacle else conv.node)
    folded_at = last.get(conv.node, conv.node)
    read = (bn.input, *bn.vectors)
    moved = mutations.obstacle(min((*bn.parts, bn.node)), folded_at, (*read, *bn.parts))
    if moved is not None:
        raise CannotFold(*moved)
    if conv.node in mutations.stride_dependent:
        raise CannotFold(Reason.VIEW_OR_COPY, mutations.stride_dependent[conv.node])
    kept = (*read, conv.weight, conv.bias)
    if has_backward(conv.node, kept, graph):
        written = mutations.written(folded_at, kept, inputs_are_kept)
        if written is not None:
            raise CannotFold(Reason.MUTATED, written)
    return InputNorm(bn, conv, rounding(conv, graph), steps, folded_at)


def _reader(node: fx.Node, graph: fx.Graph) -> tuple[ConvCall, tuple[fx.Node, ...], int | None] | None:
    """Return the convolution that alone reads a node, the calls between the two, and where they move dim 1 to.

    Return None if another call reads it. The dimension is None if every call between the two keeps the shape.

    Raises:
        CannotFold: a convolution and something else read it.
    """
    steps: list[fx.Node] = []
    dim: int | None = None
    while True:
        users = list(node.users)
        if len(users) != 1 or uses(node, users[0]) != 1:
            convs = [user for user in users if (conv := read_conv(user)) is not None and conv.input is node]
            if convs:
                raise CannotFold(Reason.OUTPUT_SHARED, next((user for user in users if user not in convs), users[-1]))
            return None
        (user,) = users
        conv = read_conv(user)
        if conv is not None:
            return (conv, tuple(steps), dim) if conv.input is node else None
        step = read_passthrough(user)
        if step is None and read_padding(user) is None:
            return None
        if step is not None and (step.kind != "same" or dim is not None):
            if step.inputs != (node,) or step.parts is not None:
                return None
            try:
                dim = dim_after(step, 1 if dim is None else dim, graph)
            except CannotFold:
                return None
        steps.append(user)
        node = user


def _sums_obstacle(conv: ConvCall, steps: tuple[fx.Node, ...], graph: fx.Graph) -> Reason | None:
    """Return why an output of the convolution may sum over a part of the kernel only, or None."""
    if conv.transposed:
        return Reason.TRANSPOSED
    if is_folded(conv):
        return Reason.ALREADY_FOLDED
    modes = [mode for step in steps if (mode := read_padding(step)) is not None]
    if any(mode not in REPEATING for mode in modes):
        return Reason.PADS_ZEROS
    return padding_obstacle(conv.options.get("padding", 0), tensor_of(conv.weight, graph))


def padding_obstacle(padding: Any, weight: Tensor | None) -> Reason | None:
    """Return why a convolution's `padding` may add zeros, or None. "same" adds none if the kernel has one element."""
    if padding == "same":
        padding = 1 if weight is None or any(size > 1 for size in weight.shape[2:]) else 0
    if padding == "valid":
        return None
    sizes = padding if isinstance(padding, list | tuple) else [padding]
    if not all(isinstance(size, int) for size in sizes):
        return Reason.DYNAMIC_ARGUMENT
    return Reason.PADS_ZEROS if any(sizes) else None


def _rank(conv: ConvCall, dim: int | None, bn: BatchNormCall, batched: int, graph: fx.Graph) -> Reason | None:
    """Return why dim 1, on which the BatchNorm acts, may not be the convolution's input channels, or None.

    It is if the input is batched, with as many dimensions as the weight. A Linear sums over the last dimension.
    dim: Where the calls between the two move dim 1 to. None if they move nothing.
    """
    known = [rank for node in (bn.output, bn.input) if (rank := rank_of(node, graph)) is not None]
    possible = {known[0]} if known else set(bn.ranks or ())
    if bn.parts and (len(known) < 2 or known[0] != known[1] or (bn.ranks is not None and known[0] not in bn.ranks)):
        return Reason.UNKNOWN_SHAPE if len(known) < 2 else Reason.NOT_PER_CHANNEL
    if dim is not None:
        rank = rank_of(conv.input, graph)
        if rank is None:
            return Reason.UNKNOWN_SHAPE
        if conv.linear:
            return None if dim == rank - 1 else Reason.LINEAR_RANK
        return Reason.UNBATCHED if rank != batched else None if dim == 1 else Reason.CHANNELS_MOVED
    if not known and not conv.linear:
        possible = possible & {batched - 1, batched} if possible else {batched - 1, batched}
    if possible == {batched}:
        return None
    if not possible or batched in possible:
        return Reason.UNKNOWN_SHAPE
    return Reason.LINEAR_RANK if conv.linear else Reason.UNBATCHED


def _tensors(
    conv: ConvCall, steps: tuple[fx.Node, ...], dim: int | None, bn: BatchNormCall, graph: fx.Graph
) -> Reason | None:
    """Return why the tensors do not fold, or None."""
    values = [value for value in (conv.weight, conv.bias, *bn.vectors) if value is not None]
    known = [tensor for value in values if (tensor := tensor_of(value, graph)) is not None]
    if len(known) < len(values):
        return Reason.UNKNOWN_SHAPE
    weight = known[0]
    nodes = (bn.input, bn.output, *steps, conv.node)
    activations = [tensor for node in nodes if (tensor := tensor_of(node, graph)) is not None]
    if any(map(is_subclass, (*known, *activations))):
        return Reason.TENSOR_SUBCLASS
    if weight.ndim < 2:
        return Reason.UNKNOWN_SHAPE
    reason = _rank(conv, dim, bn, weight.ndim, graph)
    if reason is not None:
        return reason
    if conv.bias is not None and tuple(known[1].shape) != (weight.shape[0],):  # `addmm` takes any that broadcasts
        return Reason.CHANNELS
    channels, shape = weight.shape[1] * conv.groups, shape_of(bn.input, graph)
    vectors = known[2 if conv.bias is not None else 1 :]
    if any(tuple(vector.shape) != (channels,) for vector in vectors):
        return Reason.CHANNELS
    if bn.parts and (shape is None or shape[1] != channels):  # its arithmetic would broadcast one channel
        return Reason.CHANNELS
    dtypes = {dtype for node in nodes if (dtype := dtype_of(node, graph)) is not None}
    if len(dtypes) > 1 or any(dtype not in FLOATING for dtype in (*dtypes, *(tensor.dtype for tensor in known))):
        return Reason.DTYPE  # where autocast rounds between the two, x would be rounded in place of bn(x)
    changes = changes_dtype(bn, next(iter(dtypes), weight.dtype))
    if changes or example_misleads(weight, tensor_of(conv.node, graph), known):
        return Reason.DTYPE
    return Reason.DEVICE if len({tensor.device for tensor in (*known, *activations)}) > 1 else None


def own_nodes(norm: InputNorm) -> set[fx.Node]:
    """Return the nodes that the fold removes from the graph, or moves behind another value."""
    return {*removable_nodes(norm.bn), *norm.steps}
