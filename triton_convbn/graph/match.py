"""Match each eval-mode BatchNorm of a graph with the convolution before it, or decline it with a reason.

Example: for ``y = conv2d(x, w, b); z = batch_norm(y, mean, var, gamma, beta, False, 0.1, eps)`` `find` returns one
`Pair`. Its `conv` has input x, weight w and bias b, its `bn` has output z. `find` checks, in this order, that

1. the BatchNorm is in eval mode and has statistics (`unfit`);
2. its input comes from a convolution, through calls that change no value (`producers`);
3. y is read by the BatchNorm alone (`_shared`);
4. ranks, channels, dtypes and devices fit (`_rank`, `_tensors`);
5. x, w and b are the same at z as at y, and stay so until backward (`mutation`).

If y is also returned, step 3 fails and `find` returns a `Decline` with the reason CONV_SHARED.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ..ops.reference import FLOATING
from .branch import Branch, SumDecline
from .calls import BatchNormCall, ConvCall, Value, is_subclass, may_train, rank_of, requires_grad, tensor_of
from .dialects import read_batch_norm
from .mutation import Mutations
from .producers import CannotFold, Producer, channels_of, producers_of
from .reasons import Reason

if TYPE_CHECKING:
    from .input_norms import InputNorm

_AS_OTHER = (torch.ops.aten.reshape_as.default, torch.ops.aten.view_as.default)


@dataclass(frozen=True)
class Pair:
    """A convolution and the eval-mode BatchNorm, or the part of one, that folds into it.

    Attributes:
        conv, bn: The calls.
        dtype: The dtype to round the folded weight to if it is not the weight's own (autocast), else None.
        channels: ``(start, length)`` of the BatchNorm's channels that the convolution makes, if a concatenation is
            between the two. The BatchNorm then has one pair with each convolution. None: all channels.
        steps: All nodes between the BatchNorm and its convolutions, in the graph's order.
    """

    conv: ConvCall
    bn: BatchNormCall
    dtype: torch.dtype | None = None
    channels: tuple[int, int] | None = None
    steps: tuple[fx.Node, ...] = ()

    @property
    def vectors(self) -> tuple[Value, ...]:
        """The BatchNorm's bn_weight, bn_bias, running_mean and running_var, with all its channels."""
        return self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var


@dataclass(frozen=True)
class Decline:
    """A BatchNorm that is not folded, and why. `detail` names the node that is the cause, if there is one."""

    bn: BatchNormCall
    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.bn.node.name}: {self.reason.text}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Findings:
    """Every BatchNorm of a graph, in its order: declined, or in one pair with each of its convolutions.

    mutations: The effects of the graph; None if it has no BatchNorm.
    sums: The sums of branches that one convolution replaces, in the order of their last nodes. Their BatchNorms are in
        no pair and no decline.
    sum_declines: The sums of convolutions that are not merged.
    input_norms: The BatchNorms that fold into the convolution after them. They are in no pair and no decline.
    unprofitable: The pairs of BatchNorms that could fold and are among the declines.
    """

    pairs: list[Pair] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)
    mutations: Mutations | None = None
    sums: list[Branch] = field(default_factory=list)
    sum_declines: list[SumDecline] = field(default_factory=list)
    unprofitable: list[Pair] = field(default_factory=list)
    input_norms: list["InputNorm"] = field(default_factory=list)

    @property
    def changes_graph(self) -> bool:
        """True if anything folds or merges."""
        return bool(self.pairs or self.sums or self.input_norms)

    def folded(self) -> dict[fx.Node, list[Pair]]:
        """Return the pairs of each BatchNorm that folds, by its node."""
        found: dict[fx.Node, list[Pair]] = {}
        for pair in self.pairs:
            found.setdefault(pair.bn.node, []).append(pair)
        return found

    def drop(self, decline: Callable[[list[Pair]], Decline | None]) -> "Findings":
        """Return the findings without the BatchNorms that `decline` declines, given all pairs of one."""
        if self.mutations is None:
            return self
        kept: list[Pair] = []
        declines = list(self.declines)
        for pairs in self.folded().values():
            declined = decline(pairs)
            if declined is None:
                kept += pairs
            else:
                declines.append(declined)
        order = self.mutations.order
        declines.sort(key=lambda each: order[each.bn.node])
        return replace(self, pairs=kept, declines=declines)


def find(graph: fx.Graph) -> Findings:
    """Return every BatchNorm of the graph with its convolutions, or with the reason why it does not fold.

    Accept a pair only if everything that makes the fold exact is known to hold. The graph does not change.
    """
    findings = Findings()
    for node in graph.nodes:
        bn = read_batch_norm(node)
        if bn is None:
            continue
        findings.mutations = findings.mutations or Mutations(graph)
        found = _pairs(bn, graph, findings.mutations)
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
    mutations = findings.mutations

    def decline(pairs: list[Pair]) -> Decline | None:
        read = tuple(value for pair in pairs for value in _kept(pair.conv, pair.bn, graph))
        written = mutations.written_input(pairs[0].bn.node, read) if mutations else None
        return None if written is None else Decline(pairs[0].bn, Reason.MUTATED, written.name)

    return findings.drop(decline)


def _pairs(bn: BatchNormCall, graph: fx.Graph, mutations: Mutations) -> list[Pair] | Decline:
    # An obstacle of the module (a hook) matters less to a reader than that there is nothing to fold or no frozen mode.
    for reason in unfit(bn):
        return Decline(bn, reason)
    try:
        sources = producers_of(bn.input, graph)
    except CannotFold as error:
        return Decline(bn, error.reason, error.node.name)
    steps = tuple(sorted(dict.fromkeys(sources.steps)))
    pairs = []
    for source in sources.found:
        declined = _decline(source, sources.total, steps, bn, graph, mutations)
        if declined is not None:
            return declined
        pairs.append(Pair(source.conv, bn, rounding(source.conv, graph), source.channels, steps))
    return pairs


def _decline(
    source: Producer,
    total: int | None,
    steps: tuple[fx.Node, ...],
    bn: BatchNormCall,
    graph: fx.Graph,
    mutations: Mutations,
) -> Decline | None:
    """Return why one of the BatchNorm's convolutions cannot take it, or its part of it, or None."""
    conv = source.conv
    if bn.obstacle or conv.obstacle:
        at_fault = bn.node if bn.obstacle else conv.node
        return Decline(bn, bn.obstacle or conv.obstacle or Reason.UNREADABLE_CALL, at_fault.name)
    users = _shared((conv.node, *steps), bn, mutations)
    if users:
        return Decline(bn, Reason.CONV_SHARED, ", ".join(user.name for user in users))
    unfit = _rank(source, bn, graph) or _tensors(source, total, bn, graph)
    if unfit is not None:
        return Decline(bn, unfit)
    moved = mutations.obstacle(conv.node, bn.node, (conv.input, conv.weight, conv.bias))
    if moved is None and bn.parts:  # its vectors are read, and added up, over a stretch of the graph
        vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
        moved = mutations.obstacle(bn.parts[0], bn.node, (*vectors, *bn.parts))
    if moved is not None:
        return Decline(bn, moved[0], moved[1].name)
    written = mutations.written_after(bn.node, _kept(conv, bn, graph))
    return None if written is None else Decline(bn, Reason.MUTATED, written.name)


def unfit(bn: BatchNormCall) -> Iterator[Reason]:
    if bn.obstacle is Reason.UNREADABLE_CALL:
        yield bn.obstacle
    if bn.running_mean is None or bn.running_var is None:  # such a module is training in eval mode too
        yield Reason.NO_RUNNING_STATS
    if bn.training:
        yield Reason.TRAINING
    if bn.training is None or bn.eps is None:
        yield Reason.DYNAMIC_ARGUMENT


def removable_nodes(bn: BatchNormCall) -> set[fx.Node]:
    """Return the nodes that a graph without this BatchNorm does not need."""
    found = {bn.output, bn.node}
    for part in reversed(bn.parts):
        if found.issuperset(part.users):
            found.add(part)
    return found


def _shared(nodes: tuple[fx.Node, ...], bn: BatchNormCall, mutations: Mutations) -> list[fx.Node]:
    """Return the readers of the convolution's output, or of a step, other than the next step and the BatchNorm."""
    own = removable_nodes(bn)
    for node in nodes:
        readers = [user for user in node.users if user not in own and not _is_size_of(node, user, bn, mutations)]
        if node is bn.input:
            if readers or uses(node, bn.node) > 1:
                return readers or list(node.users)
        elif len(readers) != 1 or readers[0] not in nodes or uses(node, readers[0]) > 1:
            return readers
    return []


def _is_size_of(node: fx.Node, user: fx.Node, bn: BatchNormCall, mutations: Mutations) -> bool:
    """Return whether a node after the BatchNorm reads only the shape of `node`, which the fold does not change."""
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


def _rank(source: Producer, bn: BatchNormCall, graph: fx.Graph) -> Reason | None:
    """Return why the BatchNorm does not act on the convolution's channels, or None.

    It acts on dim 1, which is `source.dim` of the convolution's output. The channels are at dim 1 if the input is
    batched, with as many dimensions as the weight. A Linear has them at the last dimension.
    """
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
    """Return why the tensors do not fold, or None. total: the number of channels of all convolutions together."""
    conv = source.conv
    weight = tensor_of(conv.weight, graph)
    if weight is None:
        return Reason.UNKNOWN_SHAPE
    values: tuple[Value, ...] = (conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    vectors = [tensor_of(value, graph) for value in values if value is not None]
    if any(vector is None for vector in vectors):
        return Reason.UNKNOWN_SHAPE
    known: list[Tensor] = [weight, *(vector for vector in vectors if vector is not None)]
    activations = [tensor_of(node, graph) for node in (conv.input, conv.node, bn.output)]
    if any(is_subclass(tensor) for tensor in (*known, *activations) if tensor is not None):
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
    if changes_dtype(bn, returned):
        return Reason.DTYPE
    if len({tensor.device for tensor in known + outputs}) > 1:
        return Reason.DEVICE
    return None


def changes_dtype(bn: BatchNormCall, dtype: torch.dtype) -> bool:
    """Return whether a BatchNorm of a tensor of this dtype returns another, or rounds its vectors more coarsely.

    No fold repeats that.
    """
    promotes = bn.promotes is not None and torch.promote_types(dtype, bn.promotes) != dtype
    return promotes or any(torch.promote_types(dtype, rounded) != rounded for rounded in bn.computed)


def _kept(conv: ConvCall, bn: BatchNormCall, graph: fx.Graph) -> tuple[Value, ...]:
    """Return what a fold saves for its backward, if it has one.

    A write to it after the pair would be an error there, also if the unfused pair saves something else: with a frozen
    weight it saves the convolution's output instead of its input.
    """
    values = (conv.input, conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return values if has_backward(bn.output, values, graph) else ()


def has_backward(output: fx.Node, values: tuple[Value, ...], graph: fx.Graph) -> bool:
    """Return whether what is computed from the values may have a backward."""
    example = output.meta.get("example_value")
    if isinstance(example, Tensor):
        return requires_grad(example)
    return any(may_train(value, graph) for value in values)


def rounding(conv: ConvCall, graph: fx.Graph) -> torch.dtype | None:
    """Return the dtype that autocast gives the convolution if it differs from the weight's, else None."""
    weight, convolved = tensor_of(conv.weight, graph), tensor_of(conv.node, graph)
    if weight is None or convolved is None or convolved.dtype == weight.dtype:
        return None
    return convolved.dtype
