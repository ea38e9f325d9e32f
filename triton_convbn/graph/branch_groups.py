"""Decide which sums of branches compute the scales of their BatchNorms together, and add that call to the graph.

This is for graphs that are not compiled, see `ops.branch_norms`. A sum takes part if each of its terms ends in a
BatchNorm of its own, these are alike, and their vectors are inputs of the graph.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx

from ..ops import branch_norms, reference
from ..ops.branch_form import form_of
from ..options import Options
from .branch import Branch
from .calls import Value, is_input, may_train, tells_training, tensor_of
from .fold_nodes import read
from .mutation import Mutations


class Scales(NamedTuple):
    """The nodes of a sum's scales and bias, and its weights in their order. See `conv_with_scales`."""

    weights: tuple[Value, ...]
    scales: fx.Node
    bias: fx.Node


class _Norms(NamedTuple):
    """A sum as its weights and, for each term, the bn_weight, bn_bias, running_mean and running_var."""

    weights: tuple[Value, ...]
    vectors: tuple[tuple[Value, ...], ...]
    eps: float

    def kind(self) -> tuple[Any, ...]:
        """Return what has to be the same for BatchNorms that are computed together."""
        return self.eps, *(value is None for value in self.vectors[0])

    def every(self) -> list[Value]:
        return [value for own in self.vectors for value in own if value is not None]


def group_sums(
    graph: fx.Graph, sums: Sequence[Branch], options: Options, mutations: Mutations | None
) -> list[list[Branch]]:
    """Return the groups of two sums or more, each in the graph's order."""
    groups: list[list[Branch]] = []
    open_groups: dict[Any, list[Branch]] = {}
    for branch in sums:
        norms = _norms(branch)
        tensors = [tensor_of(value, graph) for value in branch.values()]
        if norms is None or not all(map(is_input, norms.every())) or any(tensor is None for tensor in tensors):
            continue
        mutations = mutations or Mutations(graph)
        if mutations.effects and not all(map(tells_training, norms.every())):
            continue  # a frozen sum that shares a call with one that trains would save what it reads
        trains = any(may_train(value, graph) for value in norms.every())
        annotation = repr(branch.node.meta.get("custom"))
        kind = tensors[0].device, reference.arithmetic(tensors), trains, annotation, norms.kind()  # type: ignore[union-attr]
        last = open_groups.get(kind)
        if last is None or len(last) == options.pairs_per_launch or not _readable(norms, last[0], branch, mutations):
            last = open_groups[kind] = []
            groups.append(last)
        last.append(branch)
    return [group for group in groups if len(group) > 1]


def _readable(norms: _Norms, first: Branch, branch: Branch, mutations: Mutations) -> bool:
    return mutations.obstacle(first.node, branch.node, tuple(norms.every())) is None


def insert_scales(graph: fx.Graph, group: Sequence[Branch], replaced: dict[fx.Node, fx.Node]) -> dict[fx.Node, Scales]:
    """Add the call for a group before its first sum. Return what stands for the vectors of each sum."""

    def size(each: tuple[fx.Node, _Norms]) -> tuple[int, int]:
        _, (weights, vectors, _) = each
        weight = tensor_of(weights[0], graph)
        return len(vectors), 0 if weight is None else weight.shape[0]

    own = [(branch.node, norms) for branch in group if (norms := _norms(branch)) is not None]
    own.sort(key=size)
    wide = reference.arithmetic([tensor_of(value, graph) for value in group[0].values()])
    with graph.inserting_before(group[0].node):
        by_kind = zip(*(vectors for _, norms in own for vectors in norms.vectors), strict=True)
        vectors = [None if each[0] is None else [read(graph, value, replaced) for value in each] for each in by_kind]
        counts = [len(norms.vectors) for _, norms in own]
        source = graph.call_function(branch_norms.scales_of_sums, (vectors, own[0][1].eps, counts, wide))
        outputs = [graph.call_function(operator.getitem, (source, index)) for index in range(2 * len(own))]
    halves = zip(outputs[: len(own)], outputs[len(own) :], strict=True)
    return {node: Scales(norms.weights, *both) for (node, norms), both in zip(own, halves, strict=True)}


def _norms(branch: Branch) -> _Norms | None:
    """Return the vectors of a sum that consists of convolutions and BatchNorms, which are alike. None for others."""
    values = list(branch.values())
    form = form_of(positions(branch.expression, values))
    if form.order is None or any(norm.bias is not None for norm, _ in form.norms):
        return None
    own = [form.norms[number][0] for number in form.order]
    vectors = [(norm.bn_weight, norm.bn_bias, norm.running_mean, norm.running_var) for norm in own]
    named = tuple(tuple(None if each is None else values[each] for each in positions) for positions in vectors)
    found = _Norms(tuple(values[position] for position in form.weights), named, own[0].eps)
    alike = {(norm.eps, norm.bn_weight is None, norm.bn_bias is None) for norm in own}
    return found if len(alike) == 1 else None


def positions(expression: Sequence[Any], values: Sequence[Value]) -> tuple[Any, ...]:
    """Return the expression with positions in `values` instead of the values."""
    return tuple(
        positions(each, values) if isinstance(each, tuple) else values.index(each) if each in values else each
        for each in expression
    )
