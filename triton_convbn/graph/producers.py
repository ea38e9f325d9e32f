"""Find the convolutions that produce a BatchNorm's input.

Between them there may be calls that only move, drop or repeat elements, with which a scale and a shift per channel
commute (`channels`), concatenations, each part of which takes its slice of the vectors, and other BatchNorms that fold.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from ..ops import input_norm, reference, strides
from ..ops.library import fold_op
from .calls import ConvCall, PassthroughCall, rank_of, tensor_of
from .channels import dim_after
from .dialects import read_conv, read_padding, read_passthrough
from .findings import CannotFold, Inner, Pair
from .reasons import Reason

_FOLDS = (reference.fold_reference, strides.fold_vectorized, input_norm.fold_input_norm, fold_op)


@dataclass(frozen=True)
class Producer:
    """A convolution whose output a BatchNorm normalizes.

    Attributes:
        conv: The call.
        channels: ``(start, length)`` of the channels that it makes if others make the rest, else None.
        inner: The BatchNorms between the two.
    """

    conv: ConvCall
    channels: tuple[int, int] | None = None
    inner: tuple[Inner, ...] = ()


@dataclass(frozen=True)
class Producers:
    """All convolutions that make a node.

    Attributes:
        found: The convolutions.
        dim: The dimension of the node that has their channels.
        length: The number of channels, None if unknown.
        starts: The outputs of the convolutions, and of the BatchNorms that fold into them already.
        steps: The nodes after these that move elements, in no order.
        earlier: The nodes before these that do so.
    """

    found: tuple[Producer, ...]
    dim: int
    length: int | None
    starts: tuple[fx.Node, ...]
    steps: tuple[fx.Node, ...] = ()
    earlier: tuple[fx.Node, ...] = ()


def producers_of(node: fx.Node, graph: fx.Graph, folded: Mapping[fx.Node, Sequence[Pair]]) -> Producers:
    """Return the convolutions that make `node`.

    Args:
        node: The input of a BatchNorm.
        graph: The graph.
        folded: The pairs of the BatchNorms that fold, by their outputs.

    Raises:
        CannotFold: something else makes it, or it is unknown where the channels are.
    """
    calls: list[PassthroughCall] = []
    while True:
        if node in folded:
            found = _of_batch_norm(folded[node], graph)
            break
        conv = read_conv(node)
        if conv is not None:
            found = _of_convolution(conv, graph)
            break
        call = read_passthrough(node)
        if call is None:
            padded = read_padding(node) is not None and read_conv(node.all_input_nodes[0]) is not None
            raise CannotFold(Reason.PADDED if padded else Reason.INPUT_NOT_CONV, node)
        if call.kind == "cat":
            found = _of_concatenation(call, graph, folded)
            break
        calls.append(call)
        (node,) = call.inputs
    dim = found.dim
    for call in reversed(calls):
        dim = dim_after(call, dim, graph)
    return replace(found, dim=dim, steps=(*found.steps, *(node for call in calls for node in call.nodes)))


def _of_convolution(conv: ConvCall, graph: fx.Graph) -> Producers:
    if is_folded(conv):
        raise CannotFold(Reason.ALREADY_FOLDED, conv.node)
    weight, rank = tensor_of(conv.weight, graph), output_rank(conv, graph)
    dim = 1
    if weight is not None and rank is not None:
        dim = rank - 1 if conv.linear else rank - weight.ndim + 1  # 0 if the input is unbatched
    return Producers((Producer(conv),), dim, channels_of(conv, weight), (conv.node,))


def _of_batch_norm(pairs: Sequence[Pair], graph: fx.Graph) -> Producers:
    bn = pairs[0].bn
    mean = tensor_of(bn.running_mean, graph)
    if pairs[0].twins or mean is None:
        raise CannotFold(Reason.INPUT_NOT_CONV, bn.node)
    found = [Producer(pair.conv, pair.channels, (*pair.inner, Inner(bn, pair.channels))) for pair in pairs]
    return Producers(tuple(found), 1, mean.shape[0], (bn.output,), earlier=pairs[0].steps)


def _of_concatenation(call: PassthroughCall, graph: fx.Graph, folded: Mapping[fx.Node, Sequence[Pair]]) -> Producers:
    along, rank = call.dim or 0, rank_of(call.node, graph)
    if along < 0 and rank is None:
        raise CannotFold(Reason.UNKNOWN_SHAPE, call.node)
    along = along if rank is None else along % rank
    parts = [_of_part(part, graph, folded) for part in call.inputs]
    dim, lengths = parts[0].dim, [part.length for part in parts]
    if any(part.dim != dim for part in parts):
        raise CannotFold(Reason.CHANNELS_MOVED, call.node)
    found: list[Producer] = []
    length: int | None = None
    if along != dim:  # every part has all the channels
        length = lengths[0]
        if any(each != length for each in lengths):
            raise CannotFold(Reason.CHANNELS, call.node)
        found = [producer for part in parts for producer in part.found]
    else:
        length = 0
        for part in parts:
            if part.length is None:
                raise CannotFold(Reason.UNKNOWN_SHAPE, call.node)
            for producer in part.found:
                start, own = producer.channels or (0, part.length)
                found.append(replace(producer, channels=(length + start, own)))
            length += part.length
    return Producers(
        tuple(found),
        dim,
        length,
        _chain(part.starts for part in parts),
        (*_chain(part.steps for part in parts), call.node),
        _chain(part.earlier for part in parts),
    )


def _of_part(part: fx.Node, graph: fx.Graph, folded: Mapping[fx.Node, Sequence[Pair]]) -> Producers:
    try:
        return producers_of(part, graph, folded)
    except CannotFold as error:
        raise CannotFold(Reason.CONCATENATION, part) if error.reason is Reason.INPUT_NOT_CONV else error from None


def _chain(parts: Iterable[tuple[fx.Node, ...]]) -> tuple[fx.Node, ...]:
    return tuple(node for part in parts for node in part)


def output_rank(conv: ConvCall, graph: fx.Graph) -> int | None:
    """Return the number of dimensions of the convolution's output, which is that of its input, or None."""
    rank = rank_of(conv.node, graph)
    return rank_of(conv.input, graph) if rank is None else rank


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
