"""Let Inductor run the passes after autograd on every graph that has folds.

Inductor's configuration is thread-local. On CUDA, autograd compiles a backward graph on first use in a thread of its
own, which does not see a hook that the forward's thread has set. So the graph decides, not the configuration.
"""

import functools
from typing import Any

from torch import fx

from ..compat import get_custom_graph_passes, hook_value
from ..compile_context import MARK
from ..ops.library import fold_backward_op, fold_op
from ..ops.merge_library import merge_backward_op, merge_op
from . import recompute
from .layout_of_sums import layout_options
from .manager import PostGradPass


@functools.cache
def install() -> None:
    """Wrap two functions of Inductor, and the partitioner's minimum cut, once per process.

    Graphs without folds and marked layers are compiled as before, with the same cache keys.
    """
    from torch._inductor import compile_fx, config

    recompute.install()

    compile_inner, joint_passes = compile_fx._compile_fx_inner, compile_fx._recursive_joint_graph_passes

    @functools.wraps(compile_inner)
    def compile_with_passes(gm: fx.GraphModule, *arguments: Any, **keywords: Any) -> Any:
        passes = get_custom_graph_passes(config.post_grad_custom_post_pass)
        if any(isinstance(each, PostGradPass) for each in passes) or not _has_folds(gm):
            return compile_inner(gm, *arguments, **keywords)
        layout = layout_options(gm, is_inference=bool(keywords.get("is_inference")))
        with config.patch(post_grad_custom_post_pass=hook_value([*passes, PostGradPass()]), **layout):
            return compile_inner(gm, *arguments, **keywords)

    @functools.wraps(joint_passes)
    def run_joint_passes(gm: fx.GraphModule, *arguments: Any, **keywords: Any) -> fx.GraphModule:
        result = joint_passes(gm, *arguments, **keywords)
        _unmark_inputs(result)
        return result

    compile_fx._compile_fx_inner = compile_with_passes
    compile_fx._recursive_joint_graph_passes = run_joint_passes


def _unmark_inputs(gm: fx.GraphModule) -> None:
    """Remove the recompute mark from the inputs of a joint graph.

    Inductor replaces an operation that does nothing by its argument, ``running_var + 0`` by ``running_var``, and copies
    the metadata. The partitioner then tries to recompute an input: "Node mul_4 was invalid, but is output".
    """
    for node in gm.graph.find_nodes(op="placeholder"):
        if MARK in (node.meta.get("custom") or {}):
            node.meta.pop("recompute", None)
            node.meta.pop("ac_graph_id", None)


_OPERATORS = (fold_op, fold_backward_op, merge_op, merge_backward_op)


def _has_folds(gm: fx.GraphModule) -> bool:
    return any(
        node.target in _OPERATORS or MARK in (node.meta.get("custom") or {})
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    )
