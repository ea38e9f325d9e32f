"""The passes after autograd, in one ordered list."""

from typing import Any

from torch import fx

from ..compat import CustomInferenceAwareGraphPass
from ..fingerprint import sources
from ..kernels import tuned
from ..ops.library import fold_op
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
