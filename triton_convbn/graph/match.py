"""Match each eval-mode BatchNorm of a graph with the convolution before it, or decline it with a reason.

Example: for ``y = conv2d(x, w, b); z = batch_norm(y, mean, var, gamma, beta, False, 0.1, eps)`` `find` returns one
`Pair`. Its `conv` has input x, weight w and bias b, its `bn` has output z. `find` checks, in this order, that

1. the BatchNorm is in eval mode and has statistics (`unfit`);
2. its input comes from a convolution, through calls that only move elements and through BatchNorms (`producers`);
3. y is read by the BatchNorm alone (`_readers`), or by calls of the same BatchNorm (`twins`);
4. ranks, channels, dtypes and devices fit (`fit`);
5. x, w and b are the same at z as at y, and stay so until backward (`mutation`).

If y is also returned, step 3 fails and `find` returns a `Decline` with the reason CONV_SHARED.
"""

import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from .calls import BatchNormCall
from .dialects import read_batch_norm
from .findings import CannotFold, Decline, Findings, Pair
from .fit import kept, rank_obstacle, rounding, tensors_obstacle
from .mutation import Mutations
from .producers import Producers, producers_of
from .reasons import Reason
from .twins import twins_of

_AS_OTHER = (torch.ops.aten.reshape_as.default, torch.ops.aten.view_as.default)

_Folded = Mapping[fx.Node, list[Pair]]


def find(graph: fx.Graph) -> Findings:
    """Return every BatchNorm of the graph with its convolutions, or with the reason why it does not fold.

    Accept a pair only if everything that makes the fold exact is known to hold. The graph does not change.
    """
    findings = Findings()
    folded: dict[fx.Node, list[Pair]] = {}  # by the output of the last BatchNorm
    twins: set[fx.Node] = set()
    for node in graph.nodes:
        bn = read_batch_norm(node)
        if bn is None or node in twins:
            continue
        findings.mutations = findings.mutations or Mutations(graph)
        found = _pairs(bn, graph, findings.mutations, folded)
        if isinstance(found, Decline):
            findings.declines.append(found)
            continue
        folded[bn.output] = found
        for pair in found:
            twins.update(twin.node for twin in pair.twins)
            for each in pair.inner:
                folded.pop(each.bn.output, None)
    findings.pairs = [pair for pairs in folded.values() for pair in pairs]
    return findings


def drop_written(findings: Findings, graph: fx.Graph) -> Findings:
    """Decline the pairs whose inputs are written to before they are folded, for a graph that Inductor compiles.

    AOTAutograd saves the written tensor for backward, and Inductor then drops the copy_ that writes it back. A weight
    that the forward clamps kept its old values (error 0.14, torch 2.14). Plain Inductor loses writes to the statistics
    and to bn.weight in the same way, because the unmodified graph saves those.
    """
    mutations = findings.mutations

    def decline(pairs: list[Pair]) -> Decline | None:
        read = tuple(value for pair in pairs for value in kept(pair, graph))
        written = mutations.written_input(pairs[0].bn.node, read) if mutations else None
        return None if written is None else Decline(pairs[0].bn, Reason.MUTATED, written.name)

    return findings.drop(decline)


def _pairs(bn: BatchNormCall, graph: fx.Graph, mutations: Mutations, folded: _Folded) -> list[Pair] | Decline:
    # An obstacle of the module (a hook) matters less to a reader than that there is nothing to fold or no frozen mode.
    if (reason := unfit(bn)) is not None:
        return Decline(bn, reason)
    try:
        sources = producers_of(bn.input, graph, folded)
    except CannotFold as error:
        return Decline(bn, error.reason, error.node.name)
    steps = tuple(sorted(dict.fromkeys((*sources.earlier, *sources.steps))))
    pairs = [
        Pair(source.conv, bn, rounding(source.conv, graph), source.channels, steps, source.inner)
        for source in sources.found
    ]
    for pair in pairs:
        if bn.obstacle or pair.conv.obstacle:
            at_fault = bn.node if bn.obstacle else pair.conv.node
            return Decline(bn, bn.obstacle or pair.conv.obstacle or Reason.UNREADABLE_CALL, at_fault.name)
    readers = _readers(sources, bn, mutations)
    twins = twins_of(pairs[0], graph) if readers and len(pairs) == 1 else None
    if readers and twins is None:
        return Decline(bn, Reason.CONV_SHARED, ", ".join(reader.name for reader in readers))
    if twins is not None:
        pairs = [replace(pairs[0], twins=twins[0], steps=twins[1])]
    return next((found for pair in pairs if (found := _decline(pair, sources, graph, mutations))), pairs)


def _decline(pair: Pair, sources: Producers, graph: fx.Graph, mutations: Mutations) -> Decline | None:
    """Return why one of the BatchNorm's convolutions cannot take it, or its part of it, or None."""
    conv, bn = pair.conv, pair.bn
    reason = rank_obstacle(pair, sources.dim, graph) or tensors_obstacle(pair, sources, graph)
    if reason is not None:
        return Decline(bn, reason)
    moved = mutations.obstacle(conv.node, bn.node, (conv.input, conv.weight, conv.bias))
    for each in (*(each.bn for each in pair.inner), bn):
        # The vectors of an inner BatchNorm are read at the last one. Those of arithmetic are read, and added up, over a
        # stretch of the graph.
        if moved is None and (each.parts or each is not bn):
            moved = mutations.obstacle(min((*each.parts, each.node)), bn.node, (*each.vectors, *each.parts))
    for twin in pair.twins:  # its vectors are read at the first one
        moved = moved or mutations.obstacle(bn.node, twin.node, bn.vectors)
    if moved is not None:
        return Decline(bn, moved[0], moved[1].name)
    for each in pair.norms:
        if each.output in mutations.stride_dependent:
            return Decline(bn, Reason.VIEW_OR_COPY, mutations.stride_dependent[each.output].name)
    written = mutations.written_after(bn.node, kept(pair, graph))
    return None if written is None else Decline(bn, Reason.MUTATED, written.name)


def unfit(bn: BatchNormCall) -> Reason | None:
    """Return why a BatchNorm is no scale and shift by frozen statistics, or None."""
    if bn.obstacle is Reason.UNREADABLE_CALL:
        return bn.obstacle
    if bn.running_mean is None or bn.running_var is None:  # such a module is training in eval mode too
        return Reason.NO_RUNNING_STATS
    if bn.training:
        return Reason.TRAINING
    return Reason.DYNAMIC_ARGUMENT if bn.training is None or bn.eps is None else None


def removable_nodes(bn: BatchNormCall) -> set[fx.Node]:
    """Return the nodes that a graph without this BatchNorm does not need."""
    found = {bn.output, bn.node}
    for part in reversed(bn.parts):
        if found.issuperset(part.users):
            found.add(part)
    return found


def _readers(sources: Producers, bn: BatchNormCall, mutations: Mutations) -> list[fx.Node]:
    """Return the readers of the convolutions' outputs, or of a step, other than the next step and the BatchNorm."""
    own, nodes = removable_nodes(bn), {*sources.starts, *sources.steps}
    for node in sorted(nodes):
        readers = [user for user in node.users if user not in own and not _is_harmless(node, user, bn, mutations)]
        if node is bn.input:
            if readers or uses(node, bn.node) > 1:
                return readers or list(node.users)
        elif len(readers) != 1 or readers[0] not in nodes or uses(node, readers[0]) > 1:
            return readers
    return []


def _is_harmless(node: fx.Node, user: fx.Node, bn: BatchNormCall, mutations: Mutations) -> bool:
    """Return whether a node reads no value of `node`: its shape after the BatchNorm, or a part that is not used."""
    if user.target is operator.getitem and not user.users:
        return True
    as_other = user.target in ("reshape_as", "view_as", *_AS_OTHER) and len(user.args) == 2 and not user.kwargs
    return (
        as_other
        and user.args[1] is node
        and user.args[0] is not node
        and mutations.order[user] > mutations.order[bn.node]
    )


def uses(used: fx.Node, user: fx.Node) -> int:
    """Return how many arguments of `user` are `used`."""
    count = 0

    def visit(node: fx.Node) -> fx.Node:
        nonlocal count
        count += node is used
        return node

    fx.node.map_arg((user.args, user.kwargs), visit)
    return count
