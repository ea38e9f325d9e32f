"""Lets a fold write its weight in the layout that Inductor gives to the convolution.

Inductor turns convolutions channels_last where it expects a gain, and copies every contiguous weight of more than one
tap to that layout: 17 copies a forward in ResNet-50. It decides that after autograd, on the partitioned graph, so the
fold can only be told there. Telling it before autograd would change the strides of what the convolution returns.
"""

import operator
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomInferenceAwareGraphPass

from .layout_cpp import lay_out
from .ops import FOLD, LAYOUTS, Columns
from .passes import sources

_LAYOUT = len(Columns._fields) - 1
_CONVOLUTION = torch.ops.aten.convolution.default


class FoldLayoutPass(CustomInferenceAwareGraphPass):
    """Asks ``triton_convbn::fold`` for channels_last weights where Inductor will run the convolutions so.

    A pass for ``torch._inductor.config.post_grad_custom_post_pass``. Only weights that nothing but forward convolutions
    read are asked for: a backward convolution takes its weight as it comes.
    """

    def __call__(self, graph: fx.Graph, is_inference: bool = False) -> None:
        lay_out(graph)
        folds = [node for node in graph.nodes if node.target is FOLD]
        if folds and _turns_channels_last(graph, is_inference):
            for node in folds:
                _ask(node)

    def uuid(self) -> str:
        return f"triton_convbn:{sources()}"

    def __deepcopy__(self, memo: dict[int, Any]) -> "FoldLayoutPass":
        return self  # Inductor copies its configuration for every compile


def _turns_channels_last(graph: fx.Graph, is_inference: bool) -> bool:
    from torch._inductor.graph import GraphLowering

    module = graph.owning_module
    return module is not None and bool(GraphLowering.decide_layout_opt(module, is_inference=is_inference))


def _ask(fold: fx.Node) -> None:
    """Ask one fold for channels_last weights, and note the new strides for what Inductor does next."""
    layouts: list[int] = list(fold.args[_LAYOUT])  # type: ignore[arg-type]
    outputs = list(fold.meta["val"])
    for taken in fold.users:
        weight = taken.meta.get("val")
        index = taken.args[1] if taken.target is operator.getitem else None
        if not isinstance(index, int) or index % 2 or not isinstance(weight, torch.Tensor):
            continue
        convolved = all(user.target is _CONVOLUTION and user.args[1] is taken for user in taken.users)
        if convolved and weight.ndim == 4 and weight.is_contiguous():
            layouts[index // 2] = LAYOUTS.index(torch.channels_last)
            taken.meta["val"] = outputs[index] = torch.empty_like(weight, memory_format=torch.channels_last)
    fold.meta["val"] = outputs
    fold.update_arg(_LAYOUT, layouts)
