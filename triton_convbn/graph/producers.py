"""What stands between a BatchNorm and the convolutions that it normalizes: nothing, or steps that change no value.

A scale and a shift a channel commute with such steps. All that has to be followed is the channels: through a reshape
that leaves them a dimension of their own, and through a concatenation, whose parts take a slice of the vectors each.
"""

import math
import operator
from dataclasses import dataclass, field

from torch import Tensor, fx

from ..ops import reference, strides
from ..ops.library import fold_op
from .calls import ConvCall, rank_of, shape_of, tensor_of
from .dialects import read_conv, read_passthrough
from .reasons import Reason


@dataclass(frozen=True)
class Producer:
    """A convolution whose output a BatchNorm normalizes.

    dim: where the channels of the BatchNorm lie in that output.
    channels: ``(start, length)`` of those that it makes, where others make the rest; None where it makes them all.
    """

    conv: ConvCall
    dim: int
    channels: tuple[int, int] | None = None


@dataclass
class Producers:
    """Every convolution before a BatchNorm, and the steps from them to it in no order. reshaped: one is a reshape."""

    found: list[Producer] = field(default_factory=list)
    steps: list[fx.Node] = field(default_factory=list)
    reshaped: bool = False

    @property
    def total(self) -> int | None:
        """How many channels the BatchNorm has, where that is more than one convolution's; None where it is not."""
        return max((sum(source.channels) for source in self.found if source.channels is not None), default=None)


class CannotFold(Exception):
    """Why a BatchNorm's convolutions are not to be found, and at which node."""

    def __init__(self, reason: Reason, node: fx.Node) -> None:
        super().__init__(reason, node)
        self.reason, self.node = reason, node


def producers_of(node: fx.Node, graph: fx.Graph) -> Producers:
    """The convolutions that make `node`, whose channels lie along dim 1.

    Raises: CannotFold.
    """
    sources = Producers()
    _descend(node, 1, None, graph, sources)
    return sources


def _descend(node: fx.Node, dim: int, start: int | None, graph: fx.Graph, sources: Producers) -> int:
    """Collects what makes `node`, with its channels along `dim`. start: the first of its channels among those of the
    BatchNorm, where there are others. Returns how many they are; 0 where that does not matter."""
    while True:
        conv = read_conv(node)
        if conv is not None:
            break
        step = read_passthrough(node)
        if step is None:
            raise CannotFold(Reason.INPUT_NOT_CONV, node)
        sources.steps.append(node)
        sources.reshaped |= step.reshapes
        if step.dim is not None:
            return _through_concatenation(node, step.inputs, step.dim, dim, start, graph, sources)
        if step.reshapes:
            dim = _before_reshape(step.inputs[0], node, dim, graph)
        node = step.inputs[0]
    if is_folded(conv):
        raise CannotFold(Reason.ALREADY_FOLDED, node)
    length = channels_of(conv, tensor_of(conv.weight, graph)) if start is not None else 0
    if length is None or (sources.reshaped and rank_of(node, graph) is None):
        raise CannotFold(Reason.UNKNOWN_SHAPE, node)
    sources.found.append(Producer(conv, dim, None if start is None else (start, length)))
    return length


def _through_concatenation(
    node: fx.Node,
    parts: tuple[fx.Node, ...],
    along: int,
    dim: int,
    start: int | None,
    graph: fx.Graph,
    sources: Producers,
) -> int:
    if along < 0:
        rank = rank_of(node, graph)
        if rank is None:
            raise CannotFold(Reason.UNKNOWN_SHAPE, node)
        along += rank
    total = 0
    for part in parts:
        try:
            if along == dim:
                total += _descend(part, dim, (start or 0) + total, graph, sources)
            else:  # every part has all the channels
                total = _descend(part, dim, start, graph, sources)
        except CannotFold as error:
            raise CannotFold(Reason.CONCATENATION, part) if error.reason is Reason.INPUT_NOT_CONV else error from None
    return total


def _before_reshape(before: fx.Node, after: fx.Node, dim: int, graph: fx.Graph) -> int:
    """Where the channels lie before a reshape after which they are at `dim`.

    Element e of a tensor, counted in the order that a reshape keeps, belongs to channel ``e // inner % channels``, with
    `inner` elements to one step along the channels. So they are at a dimension of as many channels and the same inner.
    """
    old, new = shape_of(before, graph), shape_of(after, graph)
    if old is None or new is None:
        raise CannotFold(Reason.UNKNOWN_SHAPE, after)
    if dim >= len(new) or not all(isinstance(size, int) for size in new[dim:]):
        raise CannotFold(Reason.UNKNOWN_SHAPE, after)
    for position in range(len(old)):
        sizes = old[position:]
        if not all(isinstance(size, int) for size in sizes):
            continue
        if sizes[0] == new[dim] and math.prod(sizes[1:]) == math.prod(new[dim + 1 :]):
            return position
    raise CannotFold(Reason.CHANNELS_MOVED, after)


def channels_of(conv: ConvCall, weight: Tensor | None) -> int | None:
    """How many channels the convolution returns; None where its weight is not known."""
    if weight is None or weight.ndim < 2:
        return None
    return weight.shape[1] * conv.groups if conv.transposed else weight.shape[0]


def is_folded(conv: ConvCall) -> bool:
    """Whether the call carries a fold already: whether its weight comes out of one."""
    taken = conv.weight
    source = taken.args[0] if isinstance(taken, fx.Node) and taken.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target in (reference.fold_reference, strides.fold_vectorized, fold_op)
