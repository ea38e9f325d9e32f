"""Decide which sums of branches compute their scales together, and which merge together, and add these calls.

This is for graphs that are not compiled, see `ops.branch_norms` and `ops.merge_together`. A sum takes part if a
`branch_form.Composition` describes it and its vectors are inputs of the graph. A pair is a sum of one branch. It takes
part if no kernel folds it.

Members of a group reach the same outputs of the graph. Two calls of backward, each on an output of its own, would go
through a shared call twice, which autograd forbids. One call would give zeros to the parameters of the other output
instead of None, and an optimizer would decay these.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from ..dispatch import use_kernel
from ..ops import branch_norms, merge_together, reference
from ..ops.branch_form import Composition, form_of
from ..ops.branches_autograd import SMALL
from ..ops.merge_reference import adds_input_last
from ..options import Options
from .branch import Branch
from .calls import ConvCall, Value, dtype_of, is_input, may_train, tells_training, tensor_of
from .findings import Pair
from .fold_nodes import read
from .mutation import Mutations

MOST_ELEMENTS = 2**15
"""Those of a weight that is merged with others. A 7 x 7 kernel of 384 channels has 18,816. No other limit was tried."""


class Scales(NamedTuple):
    """What stands for the vectors of a sum, see `conv_with_scales`.

    Attributes:
        weights: The sum's weights.
        scales: The node of their scales, in the same order.
        bias: The node of the sum's bias.
        weight: The node of the merged weight if it is merged with others.
    """

    weights: tuple[Value, ...]
    scales: fx.Node
    bias: fx.Node
    weight: fx.Node | None = None


class Member(NamedTuple):
    """A sum or a pair whose scales can be computed with those of others.

    Attributes:
        node: The last node of it.
        conv: Its convolution, that with the largest kernel.
        dtype: That of the merged weight, or None if it is not known.
        weights: Its weights.
        composition: What it consists of.
        vectors: The bn_weight, bn_bias, running_mean and running_var of its BatchNorms, and the bias of the convolution
            before each. None for what they do not have.
        eps: That of every BatchNorm.
        factor: Its factor, if it has one.
    """

    node: fx.Node
    conv: ConvCall
    dtype: torch.dtype | None
    weights: tuple[Value, ...]
    composition: Composition
    vectors: tuple[Sequence[Value] | None, ...]
    eps: Any
    factor: Value

    def every(self) -> tuple[Value, ...]:
        """Return all vectors and the factor."""
        return *(value for own in self.vectors for value in own or ()), self.factor


def group_sums(
    graph: fx.Graph, sums: Sequence[Branch], pairs: Sequence[Pair], options: Options, mutations: Mutations
) -> list[list[Member]]:
    """Return the groups of two members or more, each in the graph's order.

    Raises:
        OptionError: ``kernel="triton"``, and no kernel can run.
    """
    found = [*(_of_sum(graph, branch) for branch in sums), *(_of_pair(graph, pair, options) for pair in pairs)]
    groups: list[list[Member]] = []
    open_groups: dict[Any, list[Member]] = {}
    reached = _outputs_reached(graph)
    for member in sorted(filter(None, found), key=lambda each: each.node):
        values = member.every()
        tensors = [tensor_of(value, graph) for value in (*member.weights, *values) if value is not None]
        if not all(map(is_input, values)) or any(tensor is None for tensor in tensors):
            continue
        if mutations.effects and not all(map(tells_training, values)):
            continue  # a frozen sum that shares a call with one that trains would save what it reads
        scales = *(member.vectors[0] or ()), member.factor
        trains = [any(may_train(value, graph) for value in own) for own in (scales, values)]
        annotation = repr(member.node.meta.get("custom"))
        absent = tuple(own is None for own in member.vectors)
        device = tensors[0].device  # type: ignore[union-attr]
        outputs = reached[member.node]
        kind = device, reference.arithmetic(tensors), *trains, annotation, member.eps, absent, outputs
        last = open_groups.get(kind)
        if last is None or len(last) == options.pairs_per_launch or not _readable(values, last, member, mutations):
            last = open_groups[kind] = []
            groups.append(last)
        last.append(member)
    return [group for group in groups if len(group) > 1]


def _outputs_reached(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return which outputs of the graph each node reaches, one bit for each output."""
    reached = dict.fromkeys(graph.nodes, 0)
    for index, node in enumerate(graph.output_node().all_input_nodes):
        reached[node] = 1 << index
    for node in reversed(graph.nodes):
        for each in node.all_input_nodes:
            reached[each] |= reached[node]
    return reached


def _readable(values: tuple[Value, ...], group: Sequence[Member], member: Member, mutations: Mutations) -> bool:
    """Return whether the values of a member can be read before the first one of the group."""
    return mutations.obstacle(group[0].node, member.node, values) is None


def insert_scales(
    graph: fx.Graph,
    group: Sequence[Member],
    replaced: dict[fx.Node, fx.Node],
    options: Options,
    mutations: Mutations,
) -> dict[fx.Node, Scales]:
    """Add the calls for a group before its first member. Return what stands for the vectors of each, by convolution."""
    wide = reference.arithmetic([tensor_of(value, graph) for value in (*group[0].weights, *group[0].every())])
    alike = sorted(group, key=lambda member: repr(member.composition))

    def nodes(values: Sequence[Value]) -> list[Any]:
        return [read(graph, value, replaced) for value in values]

    with graph.inserting_before(group[0].node):
        columns = zip(*(member.vectors for member in alike), strict=True)
        norms = [None if own[0] is None else nodes([value for each in own for value in each]) for own in columns]
        factors = nodes([member.factor for member in alike if member.composition.has_factor])
        arguments = norms, factors, group[0].eps, [member.composition for member in alike], wide
        source = graph.call_function(branch_norms.scales_of_sums, arguments)
        outputs = [graph.call_function(operator.getitem, (source, index)) for index in range(2 * len(alike))]
        halves = zip(alike, outputs[: len(alike)], outputs[len(alike) :], strict=True)
        found = {member.conv.node: Scales(member.weights, *own) for member, *own in halves}
        for own in _small(graph, group, options, mutations):
            dtype = own[0].dtype  # None for that of the weights: the model may be cast after the rewrite
            dtype = None if all(each.dtype == dtype for each in _examples(graph, own[0])) else dtype
            weights = [nodes(member.weights) for member in own]
            scales = [found[member.conv.node].scales for member in own]
            groups = [member.conv.groups for member in own]
            merged = graph.call_function(merge_together.merge_together, (weights, scales, groups, dtype))
            for index, member in enumerate(own):
                weight = graph.call_function(operator.getitem, (merged, index))
                bias = graph.call_method("type_as", (found[member.conv.node].bias, weight))
                found[member.conv.node] = found[member.conv.node]._replace(weight=weight, bias=bias)
    return found


def _small(graph: fx.Graph, group: Sequence[Member], options: Options, mutations: Mutations) -> list[list[Member]]:
    """Return those of a group that merge their weights together: two or more whose weights are small and alike.

    If a kernel can merge them, it merges each sum by itself.
    """
    found: dict[Any, list[Member]] = {}
    for member in group:
        weights = _examples(graph, member)
        largest, x = tensor_of(member.conv.weight, graph), tensor_of(member.conv.input, graph)
        if member.dtype in (None, torch.float16) or largest is None or x is None:
            continue
        if use_kernel(options.kernel, largest.device):
            continue
        if not all(map(is_input, member.weights)) or not _readable(member.weights, group, member, mutations):
            continue
        if mutations.effects and not all(map(tells_training, member.weights)):
            continue
        if member.composition.terms > len(weights) and adds_input_last(largest, member.dtype):
            continue
        known = all(isinstance(size, int) for size in x.shape)
        if known and largest.numel() <= min(MOST_ELEMENTS, SMALL * x.numel()):
            trains = any(may_train(value, graph) for value in member.weights)
            # Strides as well: the concatenation of channels_last and contiguous weights is contiguous, and so is then
            # what the convolution returns.
            looks = ((each.dtype, each.shape[1:], each.stride()[1:]) for each in weights)
            found.setdefault((member.dtype, trains, member.composition.terms, *looks), []).append(member)
    return [own for own in found.values() if len(own) > 1]


def _examples(graph: fx.Graph, member: Member) -> list[torch.Tensor]:
    return [tensor for weight in member.weights if (tensor := tensor_of(weight, graph)) is not None]


def _of_sum(graph: fx.Graph, branch: Branch) -> Member | None:
    values = branch.values()
    form = form_of(positions(branch.expression, values))
    if form.composed is None:
        return None
    composition, norms, position = form.composed
    weights = tuple(values[each] for each in form.weights)
    first, factor = tensor_of(weights[0], graph), None if position is None else values[position]
    if factor is not None:
        tensor = tensor_of(factor, graph)
        if tensor is None or first is None or tensor.numel() != first.shape[0]:
            return None
    (conv, _), dtype = branch.largest, dtype_of(branch.node, graph)
    return Member(branch.node, conv, dtype, weights, composition, norms.read(values), norms.eps, factor)


def _of_pair(graph: fx.Graph, pair: Pair, options: Options) -> Member | None:
    conv, bn = pair.conv, pair.bn
    weight = tensor_of(conv.weight, graph)
    if weight is None or isinstance(bn.eps, fx.Node) or pair.inner or pair.channels is not None or conv.transposed:
        return None
    if isinstance(conv.options.get("padding"), str) or use_kernel(options.kernel, weight.device):
        return None
    vectors = tuple(None if value is None else [value] for value in (*bn.vectors, conv.bias))
    dtype, composition = pair.dtype or weight.dtype, Composition(1, (1.0,))
    return Member(bn.node, conv, dtype, (conv.weight,), composition, vectors, bn.eps, None)


def positions(expression: Sequence[Any], values: Sequence[Value]) -> tuple[Any, ...]:
    """Return the expression with positions in `values` instead of the values."""
    return tuple(
        positions(each, values) if isinstance(each, tuple) else values.index(each) if each in values else each
        for each in expression
    )
