"""Let backward compute activations again, so that each layer keeps one tensor.

Between two convolutions are a BatchNorm in eval mode, folded or not, and an activation, say SiLU. The gradients read
the first convolution's output y and the second one's input a. Inductor's partitioner keeps both, although a is a
function of y: it does not recompute what a convolution in backward reads, because that has to be written to memory
again. This module allows it for what follows y. The partitioner's minimum cut then keeps y alone, or what is smallest.

Nothing expensive is computed twice: no convolution, product of matrices or random number. A node may be computed again
if that reads at most twice the elements that it writes, so no mean over an image either. It may add the output of a
layer to a tensor that is kept, but a chain of residual sums is computed from every second sum. Otherwise the last sum
would be computed from the outputs of all layers before it, and as many sums would be in memory at once.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch import partitioners
from torch.utils._ordered_set import OrderedSet

from ..compile_context import LAYER

_aten = torch.ops.aten

SMALL = 8
"""A tensor that is smaller than a result by this factor does not count among what the result is computed from."""

READS = 2
"""The elements that may be read to compute one again."""


def install() -> None:
    """Wrap the partitioner's minimum cut. Graphs without marked layers are cut as before."""
    solve = partitioners.solve_min_cut

    @functools.wraps(solve)
    def solve_with_layers(
        joint_graph: fx.Graph,
        node_info: partitioners.NodeInfo,
        min_cut_options: partitioners.MinCutOptions,
        dont_ban: OrderedSet[fx.Node] | None = None,
    ) -> tuple[list[fx.Node], OrderedSet[fx.Node]]:
        allowed = recomputable(joint_graph, node_info.is_required_fw)
        return solve(joint_graph, node_info, min_cut_options, OrderedSet([*(dont_ban or ()), *allowed]))

    partitioners.solve_min_cut = solve_with_layers


def recomputable(graph: fx.Graph, is_forward: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Return the nodes after the marked layers of a joint graph that backward may compute again."""
    # Inductor writes to these inputs at the end of the forward, before backward reads them.
    written = {node.args[0] for node in graph.find_nodes(op="call_function", target=_aten.copy_.default)}
    types = partitioners.get_default_op_list()
    found: dict[fx.Node, Mapping[fx.Node, int]] = {}  # each with the kept tensors that it is computed from
    for node in graph.nodes:
        if node.op != "call_function" or not is_forward(node):
            continue
        inputs = node.all_input_nodes
        if types.is_recomputable(node) and written.intersection(inputs):
            written.add(node)
        if not _is_cheap(node, types):
            continue
        if not _is_marked(node) and not any(each in found or _is_marked(each) for each in inputs):
            continue
        size = _elements(node)
        sources: dict[fx.Node, int] = {}
        for each in inputs:
            sources |= found[each] if each in found else {each: _elements(each)}
        large = {each: own for each, own in sources.items() if SMALL * own > size}
        if sources.keys() & written or not any(map(_is_activation, large)) or sum(large.values()) > READS * size:
            continue
        found[node] = sources
    return list(found)


def _is_marked(node: fx.Node) -> bool:
    return LAYER in (node.meta.get("custom") or {})


def _is_cheap(node: fx.Node, types: Any) -> bool:
    """Return whether the node computes elements, or moves them, and no checkpoint decides about it."""
    if not isinstance(node.meta.get("val"), Tensor) or "recompute" in node.meta:
        return False
    if types.is_random(node) or types.is_compute_intensive(node):
        return False
    return types.is_recomputable(node) or node.target is _aten.cat.default


def _elements(node: fx.Node) -> int:
    """Return the number of elements. Bytes would count the mask of a PReLU as a quarter of what it is computed from."""
    value = node.meta.get("val")
    return partitioners._size_of(node) // value.itemsize if isinstance(value, Tensor) else 0


def _is_activation(node: fx.Node) -> bool:
    """Return whether the node is no vector. What is computed from vectors alone is small, and stays as it is."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 1
