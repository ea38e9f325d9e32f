"""The passes after autograd, in one ordered list."""

import functools
from typing import Any

from torch import fx

from ..compat import CustomInferenceAwareGraphPass, get_custom_graph_passes, hook_value
from ..compile_context import MARK
from ..fingerprint import sources
from ..kernels import tuned
from ..ops.library import fold_backward_op, fold_op
from . import lower_to_triton
from .bias_grad_rows import sum_in_rows
from .cpu_layout import lay_out
from .scale_conv_output import is_plain_fold, scale_outputs
from .weight_layout import request_channels_last, runs_channels_last


class PostGradPass(CustomInferenceAwareGraphPass):
    """Run the passes after autograd on a partitioned graph, in this order:

    1. `cpu_layout`: fix the layout of what a CPU's convolutions read.
    2. `weight_layout`: let a fold write channels_last weights where Inductor runs the convolution so.
    3. `scale_conv_output`: scale a convolution's output instead of its weight where that moves fewer bytes.
    4. `bias_grad_rows`: hand the gradient of a folded bias on as rows that the backward kernel adds up.

    `lower_to_triton` registers the lowerings that Inductor calls afterwards, for the folds that are left.

    Use it as ``torch._inductor.config.post_grad_custom_post_pass``; `patch` and the backend install it.
    """

    def __call__(self, graph: fx.Graph, is_inference: bool = False) -> None:
        lower_to_triton.register()
        lay_out(graph)
        folds = [node for node in graph.nodes if node.target is fold_op]
        folding = bool(folds) or any(map(is_plain_fold, graph.nodes))
        channels_last = folding and runs_channels_last(graph, is_inference)
        for fold in folds:
            request_channels_last(fold, channels_last)
        scale_outputs(graph, channels_last)
        sum_in_rows(graph)

    def uuid(self) -> str:
        """Return the key under which Inductor caches what the passes make.

        A lowered fold has its kernel configuration fixed in the code that Inductor caches, so tuned files count too.
        """
        return f"triton_convbn:{sources()}:{tuned.digest()}"

    def __deepcopy__(self, memo: dict[int, Any]) -> "PostGradPass":
        return self  # Inductor copies its configuration for every compile


@functools.cache
def follow_folds() -> None:
    """Let Inductor run `PostGradPass` on every graph that holds folds, whichever thread compiles it.

    Inductor's configuration is thread-local. A backward that autograd's thread compiles on first use would not see a
    hook that was set in the thread that compiled forward. A graph without folds is compiled as if this package were not
    there, under the same cache key.
    """
    from torch._inductor import compile_fx, config

    compile_inner, joint_passes = compile_fx._compile_fx_inner, compile_fx._recursive_joint_graph_passes

    @functools.wraps(compile_inner)
    def compile_with_passes(gm: fx.GraphModule, *arguments: Any, **keywords: Any) -> Any:
        passes = get_custom_graph_passes(config.post_grad_custom_post_pass)
        if any(isinstance(each, PostGradPass) for each in passes) or not _holds_folds(gm):
            return compile_inner(gm, *arguments, **keywords)
        with config.patch(post_grad_custom_post_pass=hook_value([*passes, PostGradPass()])):
            return compile_inner(gm, *arguments, **keywords)

    @functools.wraps(joint_passes)
    def run_joint_passes(gm: fx.GraphModule, *arguments: Any, **keywords: Any) -> fx.GraphModule:
        found = joint_passes(gm, *arguments, **keywords)
        keep_inputs(found)
        return found

    compile_fx._compile_fx_inner = compile_with_passes
    compile_fx._recursive_joint_graph_passes = run_joint_passes


def keep_inputs(gm: fx.GraphModule) -> None:
    """Take the mark that a node is recomputed off the inputs of a joint graph.

    Inductor copies the metadata of an operation that does nothing to its argument: that of ``running_var + 0`` to
    ``running_var``. The partitioner then computes an input again, from nothing ("Node mul_4 was invalid, but is output").
    """
    for node in gm.graph.find_nodes(op="placeholder"):
        if MARK in (node.meta.get("custom") or {}):
            node.meta.pop("recompute", None)
            node.meta.pop("ac_graph_id", None)


def _holds_folds(gm: fx.GraphModule) -> bool:
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return any(
        node.target in (fold_op, fold_backward_op) or MARK in (node.meta.get("custom") or {})
        for graph in graphs
        for node in graph.nodes
    )
