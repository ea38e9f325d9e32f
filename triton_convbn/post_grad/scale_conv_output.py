"""Scale a convolution's output instead of its weight if that costs nothing.

    conv(x, W * s, b') = conv(x, W) * s + b'

A fold reads the weight and writes it again. If it also casts the weight or changes its layout, that traffic is needed
anyway. Otherwise (1x1 convolutions, channels_last weights) the kernel after the convolution can scale instead, because
it has every element in registers. Inductor compiles an eval-mode BatchNorm the same way, but it has to save the
convolution's output for the gradient of the scale, and a fold does not. So this pass runs after autograd, on the
forward graph, and the backward graph is unchanged.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import is_pointwise_use
from torch.fx.experimental.proxy_tensor import make_fx

from ..compile_context import MARK
from ..kernels.inputs import FoldInputs
from ..ops import reference
from ..ops.library import fold_op
from ..ops.packed_pairs import PackedPairs
from ..ops.strides import would_be_copied
from .context import PassContext
from .nodes import call

_aten, _prims = torch.ops.aten, torch.ops.prims
_CONVOLUTION = _aten.convolution.default


def _is_plain_fold(node: fx.Node) -> bool:
    """Return whether the node is a multiplication of a fold in plain torch, of a weight or of a vector."""
    return node.target is _aten.mul.Tensor and MARK in node.meta.get("custom", ())


def scale_conv_outputs(graph: fx.Graph, context: PassContext) -> None:
    """Unfold the weights whose convolutions can be scaled at no cost. Requires that `set_weight_layouts` has run."""
    for node in list(graph.nodes):
        if node.target is fold_op:
            _scale_group(graph, node)
        elif _is_plain_fold(node) and not (context.channels_last and would_be_copied(node.meta["val"])):
            _scale_plain(graph, node)


def _scale_group(graph: fx.Graph, fold: fx.Node) -> None:
    """Remove from one fold operator the pairs whose convolutions can be scaled."""
    taken: dict[Any, fx.Node] = {user.args[1]: user for user in fold.users if user.target is operator.getitem}
    if len(taken) != len(fold.users):
        return
    packed = PackedPairs(*fold.args)  # type: ignore[arg-type]
    pairs, outputs = packed.unpack(), packed.by_pair(range(len(fold.meta["val"])))
    kept = []
    for index, (pair, (weight, bias, power)) in enumerate(zip(pairs, outputs, strict=True)):
        # With prescale the convolution's output is multiplied by q, which only the fold computes.
        convolutions = _scalable(taken.get(weight), taken.get(bias), pair.weight) if power is None else []
        for convolution in convolutions:
            with graph.inserting_before(convolution):
                scale, shift = _scale_and_shift(graph, pair)
            _scale(graph, convolution, pair.weight, scale, shift)
        if not convolutions:
            kept.append(index)
    if len(kept) == len(pairs):
        return
    fewer = PackedPairs.pack([pairs[index] for index in kept])
    numbers = fewer.by_pair(range(2 * len(kept) + sum(fewer.prescale)))
    moved = {
        old: new
        for index, own in zip(kept, numbers, strict=True)
        for old, new in zip(outputs[index], own, strict=True)
        if old is not None
    }
    for number, user in taken.items():
        if number in moved:
            user.args = (fold, moved[number])
        else:
            graph.erase_node(user)
    if not kept:
        graph.erase_node(fold)
        return
    fold.args = tuple(fewer)
    fold.meta["val"] = [fold.meta["val"][old] for old in sorted(moved, key=lambda old: moved[old])]
    if "eager_input_vals" in fold.meta:  # Inductor gives their strides to the operator's inputs
        fold.meta["eager_input_vals"] = fx.map_arg(fold.args, lambda node: node.meta["val"]), {}


def _scale_and_shift(graph: fx.Graph, pair: FoldInputs) -> tuple[fx.Node, fx.Node]:
    """Add `reference.scale_and_shift` of the pair, not rounded, as the aten calls that Inductor lowers."""
    given: list[Any] = list(pair[:6])
    nodes = [node for node in given if node is not None]

    def traced(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(tensors)
        values: list[Any] = [None if node is None else next(rest) for node in given]
        wide = reference.arithmetic(tensors)
        keywords: dict[str, Any] = {"transposed": pair.transposed, "groups": pair.groups, "dtype": wide}
        return reference.scale_and_shift(*values, pair.eps, **keywords)  # type: ignore[call-arg]

    inner = make_fx(traced, select_decomp_table())(*[node.meta["val"] for node in nodes]).graph
    copied: Any = graph.graph_copy(inner, dict(zip(inner.find_nodes(op="placeholder"), nodes, strict=True)))
    scale, shift = copied
    return scale, shift


def _scale_plain(graph: fx.Graph, folded: fx.Node) -> None:
    """Scale the convolutions of a fold in plain torch, ``mul(W, s)``, if all of them can be scaled."""
    weight, scale = folded.args
    vector = _vector(scale)
    convolution = next(iter(folded.users), None)
    if (
        not isinstance(weight, fx.Node)
        or vector is None
        or not _is_per_output(scale.meta["val"], weight.meta["val"])  # type: ignore[union-attr]
        or convolution is None
        or convolution.target is not _CONVOLUTION
    ):
        return
    shift = convolution.args[2]
    if not isinstance(shift, fx.Node) or folded.meta["val"].dtype != vector.meta["val"].dtype:
        return
    for convolution in _scalable(folded, shift, weight):
        _scale(graph, convolution, weight, vector, shift)


def _is_per_output(scale: Tensor, weight: Tensor) -> bool:
    """Return whether the scale has one number per output channel. That of a fold of the input has one per input."""
    return tuple(scale.shape) == (weight.shape[0], *(1,) * (weight.ndim - 1))


def _vector(scale: Any) -> fx.Node | None:
    """Return the vector that a fold reshapes to ``s``, with or without the steps of `strides.fold_vectorized`."""
    node = scale
    if isinstance(node, fx.Node) and node.target in (_aten.reshape.default, _aten.view.default):
        node = node.args[0]
    if isinstance(node, fx.Node) and node.target is _aten.select.int:
        for target in (_aten.select.int, _aten.as_strided.default, _aten.cat.default, _aten.unsqueeze.default):
            if not isinstance(node, fx.Node) or node.target is not target:
                return None
            node = node.args[0][0] if target is _aten.cat.default else node.args[0]  # type: ignore[index]
    if not isinstance(node, fx.Node):
        return None
    return node if node.meta["val"].ndim == 1 else None


def _scalable(weight: fx.Node | None, bias: fx.Node | None, source: fx.Node) -> list[fx.Node]:
    """Return the convolutions of a folded weight if they can use the unfolded weight, `source`, instead.

    They must be the only readers of the folded weight, which must have the strides and the dtype of its source. On a
    CPU only pointwise kernels may read their outputs. On a GPU a pointwise kernel follows anyway, to add the bias.
    """
    if weight is None or bias is None:
        return []
    convolutions = list(weight.users)
    for user in convolutions:
        if user.target is not _CONVOLUTION or user.args[1:3] != (weight, bias) or user.args[0] is weight:
            return []
        on_cpu = user.meta["val"].device.type == "cpu"
        if on_cpu and not (user.users and all(is_pointwise_use(each) for each in user.users)):
            return []
    before, after = source.meta["val"], weight.meta["val"]
    return convolutions if before.dtype == after.dtype and _order(before) == _order(after) else []


def _order(tensor: Tensor) -> list[Any]:
    """Return the strides of the dimensions with more than one element."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def _scale(graph: fx.Graph, convolution: fx.Node, weight: fx.Node, scale: fx.Node, shift: fx.Node) -> None:
    """Convolve with the unfolded weight, then multiply and add in the dtype of the scale. Rounded once."""
    example: Tensor = convolution.meta["val"]
    with graph.inserting_before(convolution):
        plain = call(graph, convolution, _CONVOLUTION, convolution.args[0], weight, None, *convolution.args[3:])
        wide = scale.meta["val"].dtype
        shape = [-1, *[1] * (example.ndim - 2)]
        scale, shift = (
            call(graph, convolution, _aten.reshape.default, _converted(graph, convolution, each, wide), shape)
            for each in (scale, shift)
        )
        output = call(graph, convolution, _aten.mul.Tensor, _converted(graph, convolution, plain, wide), scale)
        output = call(graph, convolution, _aten.add.Tensor, output, shift)
        output = _converted(graph, convolution, output, example.dtype)
    convolution.replace_all_uses_with(output)
    graph.erase_node(convolution)


def _converted(graph: fx.Graph, like: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    if node.meta["val"].dtype == dtype:
        return node
    return call(graph, like, _prims.convert_element_type.default, node, dtype)
