"""Let a fold write its weight in the layout that Inductor gives to the convolution.

Inductor runs convolutions channels_last if it expects a gain. It then copies every contiguous weight with more than
one tap to that layout: 17 copies a forward in ResNet-50, and 16 (91 MB) a backward, of recomputed folded weights. It
decides this after autograd, on the partitioned graph, so this pass does too. A channels_last weight before autograd
would change the strides of the convolution's output.

The body of a loop or a branch (`scan`, `while_loop`, `cond`) keeps its layouts. Torch compares the strides of its
results with those of the carry, or of the other branch, and raises if they differ.
"""

import operator

import torch
from torch import fx

from ..ops.library import fold_op
from ..ops.packed_pairs import LAYOUTS, PackedPairs
from .context import PassContext

_LAYOUT = PackedPairs._fields.index("layouts")
_CONVOLUTION = torch.ops.aten.convolution.default
_BACKWARD = torch.ops.aten.convolution_backward.default


def set_weight_layouts(graph: fx.Graph, context: PassContext) -> None:
    """Make every fold of the graph write the weights channels_last that only channels_last convolutions read."""
    if context.is_body:
        return
    for fold in graph.find_nodes(op="call_function", target=fold_op):
        _request_channels_last(fold, context.channels_last)


def _reads_channels_last(user: fx.Node, weight: fx.Node, channels_last: bool) -> bool:
    """Return whether the user is a convolution with this weight that will run channels_last.

    Forward convolutions do if `channels_last` is set. Backward ones do if they return a channels_last gradient.
    """
    if user.target is _CONVOLUTION:
        return channels_last and user.args[1] is weight
    if user.target is not _BACKWARD or user.args[2] is not weight:
        return False
    grads = [grad for grad in user.meta.get("val", ())[:2] if isinstance(grad, torch.Tensor)]
    return any(
        grad.ndim == 4 and grad.is_contiguous(memory_format=torch.channels_last) and not grad.is_contiguous()
        for grad in grads
    )


def _only_kept(user: fx.Node, weight: fx.Node) -> bool:
    """Return whether the user is the graph's output and saves the weight for backward, which accepts any layout."""
    if user.op != "output" or "user_visible_output_idxs" not in user.meta:
        return False
    (outputs,) = user.args
    visible = set(user.meta["user_visible_output_idxs"])
    return not any(output is weight and index in visible for index, output in enumerate(outputs))  # type: ignore[arg-type]


def _request_channels_last(fold: fx.Node, channels_last: bool) -> None:
    """Change the layouts of one fold, and the examples of its outputs."""
    layouts: list[int] = list(fold.args[_LAYOUT])  # type: ignore[arg-type]
    outputs = list(fold.meta["val"])
    for taken in fold.users:
        weight = taken.meta.get("val")
        index = taken.args[1] if taken.target is operator.getitem else None
        if (
            not isinstance(index, int)
            or index % 2
            or index // 2 >= len(layouts)
            or not isinstance(weight, torch.Tensor)
        ):
            continue  # a bias, or q
        convolving = [user for user in taken.users if not _only_kept(user, taken)]
        convolved = bool(convolving) and all(_reads_channels_last(user, taken, channels_last) for user in convolving)
        if convolved and weight.ndim == 4 and weight.is_contiguous():
            layouts[index // 2] = LAYOUTS.index(torch.channels_last)
            taken.meta["val"] = outputs[index] = torch.empty_like(weight, memory_format=torch.channels_last)
    fold.meta["val"] = outputs
    fold.update_arg(_LAYOUT, layouts)
