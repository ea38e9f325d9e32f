"""BatchNorm written out as arithmetic, as the FrozenBatchNorm2d of torchvision, detectron2 and timm traces:

    scale = weight * rsqrt(running_var + eps)        x * scale + (bias - running_mean * scale)

or, as decompositions of `batch_norm` write it,

    (x - running_mean) * rsqrt(running_var + eps) * weight + bias

The operands may be in any order, eps, weight and bias may be missing, and the vectors may be reshaped and cast. First
`_arithmetic` reads what is computed. Then every vector has to be one number per channel, along dim 1 of x.

Any other scale and shift per channel is left alone. So is a FrozenBatchNorm2d that `torch.fx.symbolic_trace` has traced
without `proxy_buffer_attributes`, because the tracer then computes with the buffers.
"""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import fx

from ...ops.reference import FLOATING
from ..calls import BatchNormCall, ConvCall, PassthroughCall, rank_of, tensor_of
from ..reasons import Reason
from ._arithmetic import CASTS, MOVES, Reading, centred_first, is_scalar, operation, scaled_and_shifted

_aten = torch.ops.aten


class _Layout(NamedTuple):
    """The position of a vector's channels: the number of dimensions of size 1 before and after them."""

    before: int
    after: int
    dtypes: frozenset[torch.dtype]
    computed: frozenset[torch.dtype] = frozenset()

    def rounded(self) -> "_Layout":
        """Return the vector after one more operation on it."""
        return self._replace(
            computed=self.computed | ({reduce(torch.promote_types, self.dtypes)} if self.dtypes else set())
        )


def conv(node: fx.Node) -> ConvCall | None:
    """Return None: this dialect has no convolutions."""
    return None


def step(node: fx.Node) -> PassthroughCall | None:
    """Return None: this dialect has no such calls."""
    return None


def batch_norm(node: fx.Node) -> BatchNormCall | None:
    """Return the BatchNorm that ends with this node, or None."""
    call = _read(node)
    if call is None or any((longer := _read(user)) is not None and node in longer.parts for user in node.users):
        return None
    return call


def _read(node: fx.Node) -> BatchNormCall | None:
    """Return the BatchNorm that this node computes, which may lack the weight and the bias that follow."""
    reading = scaled_and_shifted(node)
    if reading is not None:
        return _call(node, reading)
    reading = centred_first(node)
    if reading is None or not _known_vectors(reading):
        return None
    call = _call(node, reading)
    return None if call is None or call.obstacle is Reason.NOT_PER_CHANNEL else call


def _known_vectors(reading: Reading) -> bool:
    """Return whether the statistics are parameters or buffers. Those of a LayerNorm are computed from its input."""
    return all(each.op in ("get_attr", "placeholder") for each in (reading.shift.mean, reading.scale.inverse.var))


def _call(node: fx.Node, reading: Reading) -> BatchNormCall | None:
    x, scale, shift, applied, products = reading
    var, eps = scale.inverse
    vectors = {each for each in (scale.weight, var, shift.bias, shift.mean) if each is not None}
    leaves = vectors | {x} | ({eps} if isinstance(eps, fx.Node) else set())
    parts = _between(node, leaves)
    reached = {each for part in parts for each in part.all_input_nodes}
    if x in vectors or not leaves <= reached:  # one vector is computed from another: whatever it is, it is no BatchNorm
        return None
    if rank_of(x, node.graph) == 1:  # the bias of a fold by hand
        return None
    layouts = [_layout(each, x, vectors) for each in applied]
    known = [each for each in layouts if isinstance(each, _Layout)]
    dtypes = frozenset().union(*(each.dtypes for each in known))
    ranks = {each.after + 2 for each in known}
    obstacle = next((each for each in layouts if isinstance(each, Reason)), None)
    if obstacle is None and (len(ranks) > 1 or any(each.before > 1 for each in known)):
        obstacle = Reason.NOT_PER_CHANNEL
    if obstacle is None and any(len(each.users) > 1 for each in products):
        obstacle = Reason.PRODUCT_USED
    return BatchNormCall(
        node=node,
        output=node,
        input=x,
        weight=scale.weight,
        bias=shift.bias,
        running_mean=shift.mean,
        running_var=var,
        training=False,
        eps=eps,
        ranks=frozenset(ranks),
        obstacle=obstacle,
        parts=tuple(sorted(parts - {node})),
        promotes=reduce(torch.promote_types, dtypes) if dtypes else None,
        computed=frozenset().union(*(each.computed for each in known)),
    )


def _between(node: fx.Node, leaves: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes that compute `node` from the leaves, and those that only check one of them."""
    found, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        checks = {user for user in current.users if user.target is _aten._assert_tensor_metadata.default}
        new = (set(current.all_input_nodes) | (checks if current is not node else set())) - leaves - found
        found |= new
        waiting += new
    return found


def _layout(value: Any, x: fx.Node, vectors: set[fx.Node]) -> _Layout | Reason | None:
    """Return the position of the channels in a value, the reason why it is unknown, or None for a number."""
    if not isinstance(value, fx.Node) or is_scalar(value):
        return None
    if value in vectors:
        tensor = tensor_of(value, value.graph)
        if tensor is None:
            return Reason.UNKNOWN_SHAPE
        return _Layout(0, 0, frozenset({tensor.dtype})) if tensor.ndim == 1 else Reason.NOT_PER_CHANNEL
    moves = operation(value) in MOVES
    operands = [_layout(each, x, vectors) for each in value.args[: 1 if moves else None]]
    reason = next((each for each in operands if isinstance(each, Reason)), None)
    known = [each for each in operands if isinstance(each, _Layout)]
    if reason is not None or not known:
        return reason
    if moves:
        return _moved(value, known[0], x)
    if len({each.after for each in known}) > 1:
        return Reason.NOT_PER_CHANNEL
    before = max(each.before for each in known)
    dtypes = frozenset().union(*(each.dtypes for each in known))
    computed = frozenset().union(*(each.computed for each in known))
    return _Layout(before, known[0].after, dtypes, computed).rounded()


def _moved(node: fx.Node, layout: _Layout, x: fx.Node) -> _Layout | Reason:
    """Return the layout after a reshape or a cast."""
    name, arguments = operation(node), list(node.args[1:])
    if name == "index":
        return _indexed(layout, arguments[0])
    if name == "view":
        shape = arguments[0] if arguments and isinstance(arguments[0], list | tuple) else arguments
        if node.kwargs or not all(isinstance(size, int) for size in shape):
            return Reason.DYNAMIC_ARGUMENT
        wide = [index for index, size in enumerate(shape) if size != 1]
        if len(wide) != 1:
            return Reason.NOT_PER_CHANNEL
        return layout._replace(before=wide[0], after=len(shape) - 1 - wide[0])
    if name == "unsqueeze":
        dim, rank = next(iter((*arguments, *node.kwargs.values())), None), layout.before + 1 + layout.after
        if not isinstance(dim, int):
            return Reason.DYNAMIC_ARGUMENT
        if dim % (rank + 1) <= layout.before:
            return layout._replace(before=layout.before + 1)
        return layout._replace(after=layout.after + 1)
    dtype: Any = CASTS.get(name or "")
    if dtype is None:
        if not node.kwargs.keys() <= {"dtype", "device"}:
            return Reason.UNREADABLE_CALL
        given = [each for each in (*arguments, *node.kwargs.values()) if each is not None]
        given = [each for each in given if not isinstance(each, torch.device)]  # in the end all are on one device
        if len(given) != 1:
            return Reason.UNREADABLE_CALL
        dtype = given[0]
    if isinstance(dtype, fx.Node):  # to the dtype of x: then it decides nothing
        same = dtype is x or (dtype.target is getattr and dtype.args == (x, "dtype"))
        return layout._replace(dtypes=frozenset()) if same else Reason.DYNAMIC_ARGUMENT
    return layout._replace(dtypes=frozenset({dtype})).rounded() if dtype in FLOATING else Reason.DTYPE


def _indexed(layout: _Layout, index: Any) -> _Layout | Reason:
    """Return the layout after an index of whole dimensions and new ones."""
    rank = layout.before + 1 + layout.after
    missing = rank - sum(each == slice(None) for each in index)
    whole = [slice(None)] * missing
    at = index.index(...) if ... in index else len(index)
    every = [*index[:at], *whole, *index[at + 1 :]]
    if missing < 0 or index.count(...) > 1:
        return Reason.UNREADABLE_CALL
    dimensions = [position for position, each in enumerate(every) if each is not None]
    own = dimensions[layout.before]
    return layout._replace(before=own, after=len(every) - 1 - own)
