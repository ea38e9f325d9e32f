"""Mark the layers that are not folded, so that backward may compute their activations again."""

from torch import fx

from ..dispatch import kernel_runs
from ..ops import strides
from ..options import Options
from .calls import requires_grad, tensor_of
from .dialects import read_batch_norm
from .findings import Findings
from .fold_nodes import copied_if_saved, copy_example, mark, mark_layer
from .match import unfit


def mark_layers(graph: fx.Graph, findings: Findings, options: Options) -> bool:
    """Mark every BatchNorm in eval mode that is still in the graph. See `post_grad.recompute`.

    If the graph trains on a CPU, their convolutions read the weight through `strides.preserve_strides`, as folds do:
    Inductor would save a channels_last copy of it for backward. ResNet-18 with frozen affine parameters keeps 33 MB
    instead of 77 (measured, perf/results/cpu.csv). On a GPU that copy is a launch: ResNet-50's backward would take 68
    instead of 52 (planned for an H100).

    Returns:
        Whether a layer is marked.
    """
    marked = False
    for node in graph.nodes:
        bn = read_batch_norm(node)
        if bn is not None and bn.obstacle is None and unfit(bn) is None:
            for part in (*bn.parts, bn.node):
                mark_layer(part, options)
            marked = True
    for pair in findings.unprofitable:
        weight, output = pair.conv.weight, tensor_of(pair.bn.output, graph)
        if output is None or not requires_grad(output) or not isinstance(weight, fx.Node):
            continue
        if not kernel_runs(output.device) and copied_if_saved(weight, graph):
            with graph.inserting_before(pair.conv.node):
                kept = graph.call_function(strides.preserve_strides, (weight,))
            copy_example(kept, weight)
            mark([kept], pair.conv.node, options)
            pair.conv.node.replace_input_with(weight, kept)
    return marked
