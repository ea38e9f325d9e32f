"""Decide which sums of branches compute the scales of their BatchNorms together, and add that call to the graph.

In graphs that nothing compiles, see `ops.branch_scales`. A sum takes part if each of its BatchNorms ends a branch and
their vectors are inputs of the graph. Its branches are then multiplied by tensors, and a tensor is their bias.
"""

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ..ops import branch_scales, reference
from ..ops.branch_form import Expression, Form, Product, form_of
from ..options import Options
from .branch import Branch
from .calls import Value, is_input, may_train, tells_training, tensor_of
from .fold_nodes import read
from .mutation import Mutations


def group_sums(
    graph: fx.Graph, sums: Sequence[Branch], options: Options, mutations: Mutations | None
) -> list[list[Branch]]:
    """Return the groups of two sums or more, each in the graph's order."""
    groups: list[list[Branch]] = []
    open_groups: dict[Any, list[Branch]] = {}
    for branch in sums:
        vectors = _vectors(branch)
        tensors = [tensor_of(value, graph) for value in branch.values()]
        if not vectors or not all(map(is_input, vectors)) or any(tensor is None for tensor in tensors):
            continue
        mutations = mutations or Mutations(graph)
        if mutations.effects and not all(map(tells_training, vectors)):
            continue  # a frozen sum that shares a call with one that trains would save what it reads
        trains = any(may_train(value, graph) for value in vectors)
        annotation = repr(branch.node.meta.get("custom"))
        kind = tensors[0].device, reference.arithmetic(tensors), trains, annotation  # type: ignore[union-attr]
        last = open_groups.get(kind)
        if last is None or len(last) == options.pairs_per_launch or not _readable(vectors, last[0], branch, mutations):
            last = open_groups[kind] = []
            groups.append(last)
        last.append(branch)
    return [group for group in groups if len(group) > 1]


def _vectors(branch: Branch) -> list[Value]:
    """Return what the scales and shifts of the BatchNorms are computed from. Empty if they cannot be factors."""
    form, _ = _form(branch)
    return [value for *own, _ in _norms(branch) for value in own if value is not None] if form.is_plain else []


def _readable(vectors: Sequence[Value], first: Branch, branch: Branch, mutations: Mutations) -> bool:
    return mutations.obstacle(first.node, branch.node, tuple(vectors)) is None


def insert_scales(graph: fx.Graph, group: Sequence[Branch], replaced: dict[fx.Node, fx.Node]) -> list[Branch]:
    """Add the call for a group before its first sum. Returns the sums with nodes for their scales and biases."""
    vectors: list[Value] = []
    sums = []
    for branch in group:
        norms = []
        for *fields, eps in _norms(branch):
            vectors += [value for value in dict.fromkeys(fields) if value is not None and value not in vectors]
            norms.append((*(None if value is None else vectors.index(value) for value in fields), eps))
        sums.append(tuple(norms))
    wide = reference.arithmetic([tensor_of(value, graph) for value in group[0].values()])
    with graph.inserting_before(group[0].node):
        nodes = [read(graph, value, replaced) for value in vectors]
        source = graph.call_function(branch_scales.scales_of_sums, (nodes, tuple(sums), wide))
        count = sum(len(norms) + 1 for norms in sums)
        outputs = iter([graph.call_function(operator.getitem, (source, index)) for index in range(count)])
        return [
            replace(branch, expression=_scaled(branch, [next(outputs) for _ in range(len(norms) + 1)]))
            for branch, norms in zip(group, sums, strict=True)
        ]


def _form(branch: Branch) -> tuple[Form, list[Value]]:
    """Return the sum multiplied out, and what its positions refer to."""
    values = list(branch.values())
    return form_of(positions(branch.expression, values)), values


def _norms(branch: Branch) -> list[tuple[Any, ...]]:
    """Return the vectors and eps of each BatchNorm, as `branch_scales` has them."""
    form, values = _form(branch)
    fields = [(norm.bn_weight, norm.bn_bias, norm.running_mean, norm.running_var, norm.bias) for norm, _ in form.norms]
    vectors = [[None if position is None else values[position] for position in each] for each in fields]
    return [(*own, norm.eps) for own, (norm, _) in zip(vectors, form.norms, strict=True)]


def _scaled(branch: Branch, outputs: Sequence[fx.Node]) -> Expression:
    """Return the sum with these nodes for the scales of its BatchNorms and, last, its bias."""
    form, values = _form(branch)
    *scales, bias = outputs
    parts: list[tuple[Expression, Product]] = [
        (("input",) if weight is None else ("conv", values[weight], None), product) for weight, product in form.terms
    ]
    parts += [(("bias", values[position]), product) for position, product in form.biases]
    terms = [part if product.norm is None else ("factor", part, scales[product.norm]) for part, product in parts]
    return "sum", *((1, term) for term in (*terms, ("bias", bias)))


def positions(expression: Expression, values: Sequence[Value]) -> Expression:
    """Return the expression with positions in `values` instead of the values."""
    return tuple(
        positions(each, values) if isinstance(each, tuple) else values.index(each) if each in values else each
        for each in expression
    )
