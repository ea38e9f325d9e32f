"""Let a fold write its weight in the layout that Inductor gives to the convolution.

Inductor runs convolutions channels_last where it expects a gain. It then copies every contiguous weight of more than
one tap to that layout: 17 copies a forward in ResNet-50, and 16 (91 MB) a backward, of the weights that are folded
again. It decides this after autograd, on the partitioned graph, so the fold is told there. Asking for channels_last
before autograd would change the strides of what the convolution returns.
"""

import operator

import torch
from torch import fx

from ..ops.packed_pairs import LAYOUTS, PackedPairs

_LAYOUT = PackedPairs._fields.index("layouts")
_CONVOLUTION = torch.ops.aten.convolution.default
_BACKWARD = torch.ops.aten.convolution_backward.default


def runs_channels_last(graph: fx.Graph, is_inference: bool) -> bool:
    from torch._inductor.graph import GraphLowering

    module = graph.owning_module
    return module is not None and bool(GraphLowering.decide_layout_opt(module, is_inference=is_inference))


def _wants_channels_last(user: fx.Node, weight: fx.Node, channels_last: bool) -> bool:
    """Whether it is a convolution of that weight that will run in channels_last. channels_last: those of forward will."""
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
    """Whether the graph returns the weight for backward only. Backward takes it in whatever layout it is kept in."""
    if user.op != "output" or "user_visible_output_idxs" not in user.meta:
        return False
    (outputs,) = user.args
    visible = set(user.meta["user_visible_output_idxs"])
    return not any(output is weight and index in visible for index, output in enumerate(outputs))  # type: ignore[arg-type]


def request_channels_last(fold: fx.Node, channels_last: bool) -> None:
    """Ask one fold for channels_last weights, and note the new strides for what Inductor does next."""
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
            continue  # a bias, or powers of two
        convolving = [user for user in taken.users if not _only_kept(user, taken)]
        convolved = bool(convolving) and all(_wants_channels_last(user, taken, channels_last) for user in convolving)
        if convolved and weight.ndim == 4 and weight.is_contiguous():
            layouts[index // 2] = LAYOUTS.index(torch.channels_last)
            taken.meta["val"] = outputs[index] = torch.empty_like(weight, memory_format=torch.channels_last)
    fold.meta["val"] = outputs
    fold.update_arg(_LAYOUT, layouts)
