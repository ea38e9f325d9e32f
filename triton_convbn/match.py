"""Which BatchNorms of a graph fold into the convolution before them, and why the others do not."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from . import algebra, layout
from .algebra import FLOATING
from .calls import BatchNormCall, ConvCall, Reason, Value, rank_of, tensor_of
from .dialects import read_batch_norm, read_conv
from .effects import Effects
from .ops import FOLD


@dataclass(frozen=True)
class Pair:
    """A convolution and the eval-mode BatchNorm that folds into it.

    dtype: what to round the folded weight to, where that is not the weight's own (autocast); None: the weight's own.
    """

    conv: ConvCall
    bn: BatchNormCall
    dtype: torch.dtype | None = None


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
    """Every BatchNorm of a graph, in its order: paired or declined."""

    pairs: list[Pair] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)


def find(graph: fx.Graph) -> Findings:
    """Every BatchNorm of the graph, each with its convolution or with the reason why it has to stay.

    A pair is accepted only where everything that makes the fold exact is known to hold. Changes nothing.
    """
    findings = Findings()
    effects: Effects | None = None
    for node in graph.nodes:
        bn = read_batch_norm(node)
        if bn is None:
            continue
        effects = effects or Effects(graph)
        found = _pair(bn, graph, effects)
        if isinstance(found, Pair):
            findings.pairs.append(found)
        else:
            findings.declines.append(found)
    return findings


def _pair(bn: BatchNormCall, graph: fx.Graph, effects: Effects) -> Pair | Decline:
    # An obstacle of the module (a hook) matters less to a reader than that there is nothing to fold or no frozen mode.
    for reason in _unfit(bn):
        return Decline(bn, reason)
    conv = read_conv(bn.input)
    if conv is None:
        return Decline(bn, Reason.INPUT_NOT_CONV, bn.input.name)
    if is_folded(conv):
        return Decline(bn, Reason.ALREADY_FOLDED, conv.node.name)
    if bn.obstacle or conv.obstacle:
        at_fault = bn.node if bn.obstacle else conv.node
        return Decline(bn, bn.obstacle or conv.obstacle or Reason.UNREADABLE_CALL, at_fault.name)
    others = [user for user in conv.node.users if user not in vanishing(bn)]
    if others or _uses(conv.node, bn.node) > 1:
        return Decline(bn, Reason.CONV_SHARED, ", ".join(user.name for user in others or conv.node.users))
    unfit = _rank(conv, bn, graph) or _tensors(conv, bn, graph)
    if unfit is not None:
        return Decline(bn, unfit)
    moved = effects.obstacle(conv.node, bn.node, (conv.input, conv.weight, conv.bias))
    if moved is None and bn.parts:  # its vectors are read, and added up, over a stretch of the graph
        vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
        moved = effects.obstacle(bn.parts[0], bn.node, (*vectors, *bn.parts))
    if moved is not None:
        return Decline(bn, moved[0], moved[1].name)
    return Pair(conv, bn, _rounding(conv, graph))


def _unfit(bn: BatchNormCall) -> Iterator[Reason]:
    if bn.obstacle is Reason.UNREADABLE_CALL:
        yield bn.obstacle
    if bn.running_mean is None or bn.running_var is None:  # such a module is training in eval mode too
        yield Reason.NO_RUNNING_STATS
    if bn.training:
        yield Reason.TRAINING
    if bn.training is None or bn.eps is None:
        yield Reason.DYNAMIC_ARGUMENT


def is_folded(conv: ConvCall) -> bool:
    """Whether the call carries a fold already: whether its weight comes out of one."""
    taken = conv.weight
    source = taken.args[0] if isinstance(taken, fx.Node) and taken.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target in (algebra.fold, layout.fold, FOLD)


def vanishing(bn: BatchNormCall) -> set[fx.Node]:
    """The nodes that a graph without this BatchNorm has no use for."""
    found = {bn.output, bn.node}
    for part in reversed(bn.parts):
        if found.issuperset(part.users):
            found.add(part)
    return found


def _uses(used: fx.Node, user: fx.Node) -> int:
    """How many arguments of `user` are `used`."""
    count = 0

    def visit(node: fx.Node) -> fx.Node:
        nonlocal count
        count += node is used
        return node

    fx.node.map_arg((user.args, user.kwargs), visit)
    return count


def _rank(conv: ConvCall, bn: BatchNormCall, graph: fx.Graph) -> Reason | None:
    """BatchNorm acts on dim 1. That is the convolution's channels only for a batched input of as many dimensions as the
    weight, and a Linear's only where its output is 2-D."""
    weight = tensor_of(conv.weight, graph)
    if weight is None:
        return Reason.UNKNOWN_SHAPE
    batched = weight.ndim
    known = [rank for node in (conv.node, conv.input) if (rank := rank_of(node, graph)) is not None]
    if bn.parts and bn.ranks is not None and not bn.ranks.issuperset(known[:1]):
        return Reason.NOT_PER_CHANNEL
    possible = {known[0]} if known else {2, 3, 4, 5} if conv.linear else {batched - 1, batched}
    if bn.ranks is not None and not known:
        possible &= bn.ranks
    if possible == {batched}:
        return None
    if batched in possible:
        return Reason.UNKNOWN_SHAPE
    return Reason.LINEAR_RANK if conv.linear else Reason.UNBATCHED


def _tensors(conv: ConvCall, bn: BatchNormCall, graph: fx.Graph) -> Reason | None:
    """Whether the tensors belong together, as far as the graph knows them; the weight it does know."""
    weight = tensor_of(conv.weight, graph)
    if weight is None:
        return Reason.UNKNOWN_SHAPE
    values: tuple[Value, ...] = (conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    vectors = [tensor_of(value, graph) for value in values if value is not None]
    if any(vector is None for vector in vectors):
        return Reason.UNKNOWN_SHAPE
    known: list[Tensor] = [weight, *(vector for vector in vectors if vector is not None)]
    channels = weight.shape[1] * conv.groups if conv.transposed else weight.shape[0]
    if any(vector.ndim != 1 or vector.shape[0] != channels for vector in known[1:]):
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


def _rounding(conv: ConvCall, graph: fx.Graph) -> torch.dtype | None:
    """The dtype that autocast gives the convolution, where that differs from its weight's."""
    weight, convolved = tensor_of(conv.weight, graph), tensor_of(conv.node, graph)
    if weight is None or convolved is None or convolved.dtype == weight.dtype:
        return None
    return convolved.dtype
