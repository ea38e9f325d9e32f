"""Find the convolutions that produce a BatchNorm's input.

Between them there may be calls that change no value, with which a scale and a shift per channel commute. Only the
channels have to be followed: through a reshape that keeps them as one dimension, and through a concatenation, each part
of which takes its slice of the vectors.
"""

import math
import operator
from dataclasses import dataclass, field

from torch import Tensor, fx

from ..ops import input_norm, reference, strides
from ..ops.library import fold_op
from .calls import ConvCall, rank_of, shape_of, tensor_of
from .dialects import read_conv, read_passthrough
from .reasons import Reason

_FOLDS = (reference.fold_reference, strides.fold_vectorized, input_norm.fold_input_norm, fold_op)


@dataclass(frozen=True)
class Producer:
    """A convolution whose output a BatchNorm normalizes.

    Attributes:
        conv: The call.
        dim: The dimension of its output that has the BatchNorm's channels.
        channels: ``(start, length)`` of the channels that it makes if others make the rest, else None.
    """

    conv: ConvCall
    dim: int
    channels: tuple[int, int] | None = None


@dataclass
class Producers:
    """All convolutions before a BatchNorm, and the calls between them and it, in no order. reshaped: one reshapes."""

    found: list[Producer] = field(default_factory=list)
    steps: list[fx.Node] = field(default_factory=list)
    reshaped: bool = False

    @property
    def total(self) -> int | None:
        """The number of channels of the BatchNorm if several convolutions make them, else None."""
        return max((sum(source.channels) for source in self.found if source.channels is not None), default=None)


class CannotFold(Exception):
    """The convolutions of a BatchNorm cannot be found, for this reason, at this node."""

    def __init__(self, reason: Reason, node: fx.Node) -> None:
        super().__init__(reason, node)
        self.reason, self.node = reason, node


def producers_of(node: fx.Node, graph: fx.Graph) -> Producers:
    """Return the convolutions that make `node`, whose channels are at dim 1.

    Raises:
        CannotFold: something else makes it, or it is unknown where the channels are.
    """
    sources = Producers()
    _descend(node, 1, None, graph, sources)
    return sources


def _descend(node: fx.Node, dim: int, start: int | None, graph: fx.Graph, sources: Producers) -> int:
    """Collect what makes `node`, with its channels at `dim`. Return the number of channels, or 0 if it does not matter.

    start: The first of its channels among those of the BatchNorm, if there are others.
    """
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
    """Return the dimension of the channels before a reshape after which they are at `dim`.

    Element e, in the order that a reshape keeps, has channel ``e // inner % channels``, where `inner` is the number of
    elements per step along the channels. So the dimension has as many channels and the same inner.
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
    """Return the number of output channels of the convolution, or None if its weight is unknown."""
    if weight is None or weight.ndim < 2:
        return None
    return weight.shape[1] * conv.groups if conv.transposed else weight.shape[0]


def is_folded(conv: ConvCall) -> bool:
    """Return whether the convolution's weight is the result of a fold."""
    taken = conv.weight
    source = taken.args[0] if isinstance(taken, fx.Node) and taken.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target in _FOLDS
