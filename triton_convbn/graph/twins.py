"""Find the calls of one BatchNorm that read the parts of one convolution's output.

Example: with ``a, b = conv(x).chunk(2)``, ``bn(a)`` and ``bn(b)`` are twins. One fold replaces both.
"""

from torch import fx

from .calls import BatchNormCall, tensor_of
from .channels import dim_after
from .dialects import read_batch_norm, read_passthrough
from .findings import CannotFold, Pair
from .producers import producers_of


def twins_of(pair: Pair, graph: fx.Graph) -> tuple[tuple[BatchNormCall, ...], tuple[fx.Node, ...]] | None:
    """Return the other calls of the pair's BatchNorm, and all nodes between them and the convolution, in order.

    Return None if anything else reads the convolution's output, if a call normalizes another dimension, or if one is
    earlier: it is declined already.
    """
    if pair.inner or pair.bn.parts:
        return None
    found: list[BatchNormCall] = []
    steps: list[fx.Node] = []
    waiting = [(pair.conv.node, producers_of(pair.conv.node, graph, {}).dim)]
    while waiting:
        node, dim = waiting.pop()
        for user in _parts_of(node):
            bn, call = read_batch_norm(user), read_passthrough(user)
            if bn is not None and bn.input is node and dim == 1 and _is_same(bn, pair.bn, graph):
                if node in bn.vectors:
                    return None
                found.append(bn)
            elif call is not None and call.inputs == (node,) and call.kind != "cat":
                try:
                    waiting.append((user, dim_after(call, dim, graph)))
                except CannotFold:
                    return None
                steps += call.nodes
            else:
                return None
    twins = tuple(bn for bn in sorted(found, key=lambda bn: bn.node) if bn.node is not pair.bn.node)
    if not twins or twins[0].node < pair.bn.node:
        return None
    return twins, tuple(sorted(dict.fromkeys(steps)))


def _parts_of(node: fx.Node) -> list[fx.Node]:
    """Return the readers of a node, and the readers' parts if they return a tuple. Parts that are not used are none."""
    found: list[fx.Node] = []
    for user in node.users:
        parts = [each for each in user.users if (call := read_passthrough(each)) is not None and call.parts is user]
        if not parts or len(parts) < len(user.users):
            found.append(user)
        else:
            found += [part for part in parts if part.users]
    return found


def _is_same(bn: BatchNormCall, other: BatchNormCall, graph: fx.Graph) -> bool:
    """Return whether two calls compute the same of equal inputs, in the same dtype."""
    if (bn.vectors, bn.eps, bn.training, bn.obstacle, bn.parts) != (other.vectors, other.eps, False, None, ()):
        return False
    outputs = [tensor_of(each.output, graph) for each in (bn, other)]
    return len({None if output is None else output.dtype for output in outputs}) == 1
