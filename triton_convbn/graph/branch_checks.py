"""Check what makes a sum of branches one convolution."""

import torch
from torch import Tensor, fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from ..ops.reference import FLOATING
from .branch import Branch, ConvShape, Grid, sum_obstacle
from .calls import BatchNormCall, ConvCall, dtype_of, is_subclass, rank_of, shape_of, tensor_of
from .fit import changes_dtype, example_misleads
from .fold_nodes import GENERAL
from .reasons import Reason
from .views import called_name


class CannotMerge(Exception):
    """A sum is not known to be one convolution, for this reason, because of this node."""

    def __init__(self, reason: Reason, node: fx.Node | None = None) -> None:
        super().__init__(reason, node)
        self.reason, self.node = reason, node


def check(branch: Branch, graph: fx.Graph) -> None:
    """Raise CannotMerge unless one convolution has the terms' values."""
    largest, _ = branch.largest
    dtype, shape = dtype_of(largest.node, graph), shape_of(largest.node, graph)
    values = branch.values()
    known = {value: tensor for value in values if (tensor := tensor_of(value, graph)) is not None}
    if dtype is None or shape is None or len(known) < len(values):
        raise CannotMerge(Reason.UNKNOWN_SHAPE, largest.node)
    tensors = list(known.values())
    convs: list[tuple[fx.Node, ConvShape]] = []
    for conv, own in branch.convs:
        weight = known[conv.weight]
        if example_misleads(weight, tensor_of(conv.node, graph), tensors):
            raise CannotMerge(Reason.DTYPE, conv.node)
        # Autocast rounds what one kind of call returns and not the other, and the graph may have been captured before.
        if dtype_of(conv.node, graph) != dtype or (conv.function in GENERAL) != (largest.function in GENERAL):
            raise CannotMerge(Reason.DTYPE, conv.node)
        convs.append((conv.node, ConvShape(weight.shape[0], weight.shape[1], conv.groups, own)))
    norms = [(bn.node, tensor.shape[0]) for bn in branch.norms for tensor in _vectors(bn, graph) if tensor is not None]
    x = branch.input if branch.reads_input else None
    found = sum_obstacle(convs, norms, x)
    if found is not None:
        raise CannotMerge(*found)
    if x is not None and (dtype_of(x, graph) != dtype or _autocast_rounds(largest.node, dtype, graph)):
        raise CannotMerge(Reason.DTYPE, x)
    nodes = branch.input, largest.node, branch.node
    activations = [tensor for node in nodes if (tensor := tensor_of(node, graph)) is not None]
    if any(map(is_subclass, (*tensors, *activations))):
        raise CannotMerge(Reason.TENSOR_SUBCLASS, branch.node)
    for tensor in tensors:
        if tensor.dtype not in FLOATING or dtype not in FLOATING:
            raise CannotMerge(Reason.DTYPE, branch.node)
        if tensor.device != tensors[0].device:
            raise CannotMerge(Reason.DEVICE, branch.node)
    if dtype_of(branch.node, graph) != dtype:
        raise CannotMerge(Reason.DTYPE, branch.node)
    if shape_of(branch.node, graph) != shape:
        raise CannotMerge(Reason.BROADCAST, branch.node)


def _autocast_rounds(conv: fx.Node, dtype: torch.dtype, graph: fx.Graph) -> bool:
    """Return whether autocast, entered by a call of the graph, gives a convolution another dtype than its example.

    When make_fx traces such a graph again, autocast is recorded and not entered. In a run it rounds the convolutions of
    a sum and not its input, so that the sum is wider.
    """
    for enter in graph.find_nodes(op="call_function", target=_enter_autocast):
        rounded = enter.args[1] if len(enter.args) > 1 else None
        enabled = len(enter.args) < 3 or enter.args[2]
        exits = [user for user in enter.users if user.target is _exit_autocast]
        inside = enter < conv and all(conv < node for node in exits)
        if inside and enabled and dtype not in (torch.float64, rounded):
            return True
    return False


def vectors_fit(bn: BatchNormCall, graph: fx.Graph) -> bool:
    """Return whether the BatchNorm acts on dim 1 and rounds nothing more coarsely than its result."""
    dtype, rank = dtype_of(bn.output, graph), rank_of(bn.input, graph)
    vectors = _vectors(bn, graph)
    if dtype is None or rank is None or (bn.ranks is not None and rank not in bn.ranks):
        return False
    if changes_dtype(bn, dtype):
        return False
    return all(each is not None and each.ndim == 1 and _is_plain(each) for each in vectors)


def _vectors(bn: BatchNormCall, graph: fx.Graph) -> list[Tensor | None]:
    """Return the vectors of a BatchNorm, None for one that is unknown."""
    return [tensor_of(each, graph) for each in bn.vectors if each is not None]


def is_factor(factor: fx.Node, branch: Branch, graph: fx.Graph) -> bool:
    """Return whether a tensor is one number, or one number per channel, along dim 1."""
    tensor, shape = tensor_of(factor, graph), shape_of(branch.node, graph)
    dtype = dtype_of(branch.node, graph)
    if tensor is None or shape is None or dtype is None or not _is_plain(tensor):
        return False
    if len(shape) < 3 or tensor.ndim > len(shape):
        return False
    if factor in branch.own or factor is branch.input or _comes_from_call(factor):
        return False
    ones = (1,) * (len(shape) - 2)
    if (1,) * (len(shape) - tensor.ndim) + tuple(tensor.shape) not in ((1, 1, *ones), (1, shape[1], *ones)):
        return False
    return tensor.ndim == 0 or torch.promote_types(dtype, tensor.dtype) == dtype


def _comes_from_call(factor: fx.Node) -> bool:
    """Return whether a factor is computed in the graph, by more than a change of its shape."""
    while factor.op in ("call_function", "call_method"):
        if factor.target not in _RESHAPES or not isinstance(factor.args[0], fx.Node):
            return True
        factor = factor.args[0]
    return factor.op not in ("placeholder", "get_attr")


_RESHAPES = {"view", "reshape", "unsqueeze", torch.reshape, torch.unsqueeze}
_RESHAPES |= {torch.ops.aten.view.default, torch.ops.aten.unsqueeze.default, torch.ops.aten.reshape.default}


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATING and not is_subclass(tensor)


def changes_layout(node: fx.Node) -> bool:
    """Return whether a call that computes nothing may return other strides than those of its input."""
    return called_name(node) == "contiguous" or "memory_format" in node.kwargs


def grid_of(conv: ConvCall, graph: fx.Graph) -> Grid | None:
    """Return where a convolution reads. None for one that is no term: transposed, Linear, or padded by F.pad."""
    weight = tensor_of(conv.weight, graph)
    if conv.obstacle or conv.transposed or conv.linear or conv.pad is not None or weight is None or weight.ndim < 3:
        return None
    options = [conv.options.get(name) for name in ("stride", "padding", "dilation")]
    return Grid.of(tuple(weight.shape[2:]), *options)
