"""Lets the gradient of a folded bias be summed in the kernel that makes what it sums.

On a GPU Inductor takes the gradient of a convolution's bias, ``dz.sum((0, 2, 3))``, out of the convolution's backward,
and splits it into two reductions. Neither fuses with the kernel that computes dz: the split cuts dz into runs of
positions that are no loop of that kernel. So dz is read once more, for 49 of ResNet-50's convolutions 0.3 GB and 98
launches. Here it is written as sums over the width alone, [N, H, C]. Those fuse, and ``triton_convbn::fold_backward``
sums the rows that are left.
"""

from typing import Any

import torch
from torch import Tensor, fx

from ..ops.library import fold_backward_op
from . import nodes

_aten = torch.ops.aten

SHORT = 8
"""Inductor unrolls sums of so few elements instead of looping over them, and those do not fuse: both H and W then."""

MOST_ROWS = 1024
"""That the fold's backward may be left with; a program of it adds them up by itself."""


def sum_in_rows(graph: fx.Graph) -> None:
    """Edit one graph after autograd, in place."""
    found: dict[fx.Node, fx.Node] = {}  # by what is summed, which can be the gradient of two convolutions
    for node in [node for node in graph.nodes if node.target is fold_backward_op]:
        grads: list[Any] = list(node.args[0])
        for index, grad in enumerate(grads):
            if _is_bias_gradient(grad) and all(user.target is fold_backward_op for user in grad.users):
                source: fx.Node = grad.args[0]
                grads[index] = found[source] = found.get(source) or _rows(graph, grad, source)
        node.update_arg(0, grads)
    # What is left without users, Inductor does not lower; erased here, so that no pass after this one sees it.
    for node in reversed(list(graph.nodes)):
        if node.target is _aten.sum.dim_IntList and not node.users:
            graph.erase_node(node)


def _is_bias_gradient(node: fx.Node) -> bool:
    """Whether it sums a channels_last tensor of a GPU, all but its channels."""
    if node.target is not _aten.sum.dim_IntList or len(node.args) != 2 or node.kwargs or node.args[1] != [0, 2, 3]:
        return False
    summed = node.args[0].meta.get("val")  # type: ignore[union-attr]
    if not isinstance(summed, Tensor) or summed.ndim != 4 or summed.device.type == "cpu":
        return False
    fixed = all(isinstance(size, int) for size in summed.shape)  # else each size would be a loop of its own kernel
    return fixed and summed.is_contiguous(memory_format=torch.channels_last) and not summed.is_contiguous()


def _rows(graph: fx.Graph, gradient: fx.Node, source: fx.Node) -> fx.Node:
    """The same sum as rows [R, C], or [C] where they would be too many; not rounded below fp32."""
    summed: Tensor = source.meta["val"]
    n, channels, height, width = summed.shape
    dtype = torch.promote_types(summed.dtype, torch.float32)

    def call(target: Any, *arguments: Any, **keywords: Any) -> fx.Node:
        return nodes.call(graph, gradient, target, *arguments, **keywords)

    with graph.inserting_before(gradient):
        last = call(_aten.permute.default, source, [0, 2, 3, 1])
        dims, rows = ([2], n * height) if width > SHORT else ([1, 2], n)
        sums = call(_aten.sum.dim_IntList, last, dims, False, dtype=dtype)
        if rows > MOST_ROWS:
            return call(_aten.sum.dim_IntList, sums, list(range(sums.meta["val"].ndim - 1)), False, dtype=dtype)
        return call(_aten.view.default, sums, [rows, channels])
