"""Which BatchNorms of a graph fold into the convolution before them, and why the others do not."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ..ops.reference import FLOATING
from .calls import BatchNormCall, ConvCall, Value, is_subclass, may_train, rank_of, requires_grad, tensor_of
from .dialects import read_batch_norm
from .mutation import Mutations
from .producers import CannotFold, Producer, channels_of, producers_of
from .reasons import Reason

_AS_OTHER = (torch.ops.aten.reshape_as.default, torch.ops.aten.view_as.default)


@dataclass(frozen=True)
class Pair:
    """A convolution and the eval-mode BatchNorm that folds into it, or that part of one that does.

    dtype: what to round the folded weight to, where that is not the weight's own (autocast); None: the weight's own.
    channels: ``(start, length)`` of those of the BatchNorm that are the convolution's, where a concatenation stands
        between the two. Then the BatchNorm is in as many pairs as it has convolutions. None: all of them.
    steps: every node between the BatchNorm and any of its convolutions, in the graph's order.
    """

    conv: ConvCall
    bn: BatchNormCall
    dtype: torch.dtype | None = None
    channels: tuple[int, int] | None = None
    steps: tuple[fx.Node, ...] = ()

    @property
    def vectors(self) -> tuple[Value, ...]:
        """The BatchNorm's, all its channels: bn_weight, bn_bias, running_mean, running_var."""
        return self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var


@dataclass(frozen=True)
class Decline:
    """A BatchNorm that stays, and why. `detail` names the node that is to blame, where one is."""

    bn: BatchNormCall
    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.bn.node.name}: {self.reason.text}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Findings:
    """Every BatchNorm of a graph, in its order: declined, or in one pair with each of its convolutions."""

    pairs: list[Pair] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)

    def folded(self) -> dict[fx.Node, list[Pair]]:
        """The pairs of each BatchNorm that folds, by its node: what is counted as one."""
        found: dict[fx.Node, list[Pair]] = {}
        for pair in self.pairs:
            found.setdefault(pair.bn.node, []).append(pair)
        return found


def find(graph: fx.Graph) -> Findings:
    """Every BatchNorm of the graph, each with its convolution or with the reason why it has to stay.

    A pair is accepted only where everything that makes the fold exact is known to hold. Changes nothing.
    """
    findings = Findings()
    effects: Mutations | None = None
    for node in graph.nodes:
        bn = read_batch_norm(node)
        if bn is None:
            continue
        effects = effects or Mutations(graph)
        found = _pairs(bn, graph, effects)
        if isinstance(found, Decline):
            findings.declines.append(found)
        else:
            findings.pairs += found
    return findings


def drop_written(findings: Findings, graph: fx.Graph) -> Findings:
    """Decline the pairs whose inputs are written to before they are folded, for a graph that Inductor compiles.

    AOTAutograd saves the written tensor for backward, and Inductor then drops the copy_ that writes it back. A weight
    that the forward clamps kept its old values (error 0.14, torch 2.14). Plain Inductor loses writes to the statistics
    and to bn.weight in the same way, because the unmodified graph saves those.
    """
    mutations = Mutations(graph)
    kept: list[Pair] = []
    declines = list(findings.declines)
    for pairs in findings.folded().values():
        read = tuple(value for pair in pairs for value in _kept(pair.conv, pair.bn, graph))
        written = mutations.written_input(pairs[0].bn.node, read)
        if written is None:
            kept += pairs
        else:
            declines.append(Decline(pairs[0].bn, Reason.MUTATED, written.name))
    return Findings(kept, sorted(declines, key=lambda decline: mutations.order[decline.bn.node]))


def _pairs(bn: BatchNormCall, graph: fx.Graph, effects: Mutations) -> list[Pair] | Decline:
    # An obstacle of the module (a hook) matters less to a reader than that there is nothing to fold or no frozen mode.
    for reason in _unfit(bn):
        return Decline(bn, reason)
    try:
        sources = producers_of(bn.input, graph)
    except CannotFold as error:
        return Decline(bn, error.reason, error.node.name)
    steps = tuple(sorted(dict.fromkeys(sources.steps)))
    pairs = []
    for source in sources.found:
        declined = _decline(source, sources.total, steps, bn, graph, effects)
        if declined is not None:
            return declined
        pairs.append(Pair(source.conv, bn, _rounding(source.conv, graph), source.channels, steps))
    return pairs


def _decline(
    source: Producer,
    total: int | None,
    steps: tuple[fx.Node, ...],
    bn: BatchNormCall,
    graph: fx.Graph,
    effects: Mutations,
) -> Decline | None:
    """Why one of the BatchNorm's convolutions cannot take it, or its part of it."""
    conv = source.conv
    if bn.obstacle or conv.obstacle:
        at_fault = bn.node if bn.obstacle else conv.node
        return Decline(bn, bn.obstacle or conv.obstacle or Reason.UNREADABLE_CALL, at_fault.name)
    users = _shared((conv.node, *steps), bn, effects)
    if users:
        return Decline(bn, Reason.CONV_SHARED, ", ".join(user.name for user in users))
    unfit = _rank(source, bn, graph) or _tensors(source, total, bn, graph)
    if unfit is not None:
        return Decline(bn, unfit)
    moved = effects.obstacle(conv.node, bn.node, (conv.input, conv.weight, conv.bias))
    if moved is None and bn.parts:  # its vectors are read, and added up, over a stretch of the graph
        vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
        moved = effects.obstacle(bn.parts[0], bn.node, (*vectors, *bn.parts))
    if moved is not None:
        return Decline(bn, moved[0], moved[1].name)
    written = effects.written_after(bn.node, _kept(conv, bn, graph))
    return None if written is None else Decline(bn, Reason.MUTATED, written.name)


def _unfit(bn: BatchNormCall) -> Iterator[Reason]:
    if bn.obstacle is Reason.UNREADABLE_CALL:
        yield bn.obstacle
    if bn.running_mean is None or bn.running_var is None:  # such a module is training in eval mode too
        yield Reason.NO_RUNNING_STATS
    if bn.training:
        yield Reason.TRAINING
    if bn.training is None or bn.eps is None:
        yield Reason.DYNAMIC_ARGUMENT


def removable_nodes(bn: BatchNormCall) -> set[fx.Node]:
    """The nodes that a graph without this BatchNorm has no use for."""
    found = {bn.output, bn.node}
    for part in reversed(bn.parts):
        if found.issuperset(part.users):
            found.add(part)
    return found


def _shared(nodes: tuple[fx.Node, ...], bn: BatchNormCall, effects: Mutations) -> list[fx.Node]:
    """Who reads a convolution's output, or what the steps hand on of it, beside the one that the BatchNorm knows of."""
    own = removable_nodes(bn)
    for node in nodes:
        readers = [user for user in node.users if user not in own and not _is_size_of(node, user, bn, effects)]
        if node is bn.input:
            if readers or _uses(node, bn.node) > 1:
                return readers or list(node.users)
        elif len(readers) != 1 or readers[0] not in nodes or _uses(node, readers[0]) > 1:
            return readers
    return []


def _is_size_of(node: fx.Node, user: fx.Node, bn: BatchNormCall, effects: Mutations) -> bool:
    """Whether a node, after the BatchNorm, takes only the shape of `node`: the folded convolution has the same."""
    as_other = user.target in ("reshape_as", "view_as", *_AS_OTHER) and len(user.args) == 2 and not user.kwargs
    return (
        as_other and user.args[1] is node and user.args[0] is not node and effects.order[user] > effects.order[bn.node]
    )


def _uses(used: fx.Node, user: fx.Node) -> int:
    """How many arguments of `user` are `used`."""
    count = 0

    def visit(node: fx.Node) -> fx.Node:
        nonlocal count
        count += node is used
        return node

    fx.node.map_arg((user.args, user.kwargs), visit)
    return count


def _rank(source: Producer, bn: BatchNormCall, graph: fx.Graph) -> Reason | None:
    """BatchNorm acts on dim 1, `source.dim` of what the convolution returns. That is the convolution's channels only at
    dim 1 of a batched input of as many dimensions as the weight, and a Linear's only at the last."""
    conv = source.conv
    weight = tensor_of(conv.weight, graph)
    if weight is None:
        return Reason.UNKNOWN_SHAPE
    batched = weight.ndim
    known = [rank for node in (conv.node, conv.input) if (rank := rank_of(node, graph)) is not None]
    if bn.parts and bn.ranks is not None:  # no check of its own says that it fits what it is given
        normalized = known[:1] if bn.input is conv.node else [rank_of(bn.input, graph)]
        if None in normalized:
            return Reason.UNKNOWN_SHAPE
        if not bn.ranks.issuperset(normalized):
            return Reason.NOT_PER_CHANNEL
    if conv.linear and known and batched == 2:
        return None if source.dim == known[0] - 1 else Reason.LINEAR_RANK
    if source.dim != 1:
        return Reason.CHANNELS_MOVED
    possible = {known[0]} if known else {2, 3, 4, 5} if conv.linear else {batched - 1, batched}
    if bn.ranks is not None and not known:
        possible &= bn.ranks
    if possible == {batched}:
        return None
    if batched in possible:
        return Reason.UNKNOWN_SHAPE
    return Reason.LINEAR_RANK if conv.linear else Reason.UNBATCHED


def _tensors(source: Producer, total: int | None, bn: BatchNormCall, graph: fx.Graph) -> Reason | None:
    """Whether the tensors belong together, as far as the graph knows them; the weight it does know. total: how many
    channels the convolutions have together."""
    conv = source.conv
    weight = tensor_of(conv.weight, graph)
    if weight is None:
        return Reason.UNKNOWN_SHAPE
    values: tuple[Value, ...] = (conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    vectors = [tensor_of(value, graph) for value in values if value is not None]
    if any(vector is None for vector in vectors):
        return Reason.UNKNOWN_SHAPE
    known: list[Tensor] = [weight, *(vector for vector in vectors if vector is not None)]
    if any(map(is_subclass, known)):
        return Reason.TENSOR_SUBCLASS
    channels = channels_of(conv, weight)
    normalized_channels = channels if source.channels is None else total
    wanted = [channels] * (conv.bias is not None) + [normalized_channels] * len(known)
    if any(tuple(vector.shape) != (length,) for vector, length in zip(known[1:], wanted, strict=False)):
        return Reason.CHANNELS
    convolved, normalized = tensor_of(conv.node, graph), tensor_of(bn.output, graph)
    outputs = [tensor for tensor in (convolved, normalized) if tensor is not None]
    if any(tensor.dtype not in FLOATING for tensor in known + outputs):
        return Reason.DTYPE
    if len(outputs) == 2 and outputs[0].dtype != outputs[1].dtype:
        return Reason.DTYPE  # the convolution cannot return what the BatchNorm would
    returned = weight.dtype if convolved is None else convolved.dtype
    if bn.promotes is not None and torch.promote_types(returned, bn.promotes) != returned:
        return Reason.DTYPE
    if any(torch.promote_types(returned, rounded) != rounded for rounded in bn.computed):
        return Reason.DTYPE  # its vectors are rounded more coarsely than the result, which no fold repeats
    if len({tensor.device for tensor in known + outputs}) > 1:
        return Reason.DEVICE
    return None


def _kept(conv: ConvCall, bn: BatchNormCall, graph: fx.Graph) -> tuple[Value, ...]:
    """What a fold keeps for its backward, where there may be one. A write to it after the pair would be an error there,
    also where the pair itself keeps something else: with frozen weights it needs the convolution's output, not its
    input."""
    values = (conv.input, conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    output = bn.output.meta.get("example_value")
    if isinstance(output, Tensor):
        return values if requires_grad(output) else ()
    return values if any(may_train(value, graph) for value in values) else ()


def _rounding(conv: ConvCall, graph: fx.Graph) -> torch.dtype | None:
    """The dtype that autocast gives the convolution, where that differs from its weight's."""
    weight, convolved = tensor_of(conv.weight, graph), tensor_of(conv.node, graph)
    if weight is None or convolved is None or convolved.dtype == weight.dtype:
        return None
    return convolved.dtype
