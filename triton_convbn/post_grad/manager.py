"""The passes after autograd, in one ordered list."""

from collections.abc import Callable
from typing import Any

from torch import fx

from ..compat import CustomInferenceAwareGraphPass
from ..fingerprint import sources
from ..kernels import tuned_files
from . import lower_merge, lower_to_triton
from .add_small_kernels import add_small_kernels
from .bias_grad_rows import split_bias_grads
from .context import PassContext
from .cpu_layout import set_cpu_layouts
from .scale_conv_output import scale_conv_outputs
from .split_conv_backward import split_conv_backward
from .weight_layout import set_weight_layouts

PASSES: list[Callable[[fx.Graph, PassContext], None]] = [
    split_conv_backward,
    set_cpu_layouts,
    set_weight_layouts,
    add_small_kernels,  # after the layouts are set
    scale_conv_outputs,  # compares layouts, so it runs after they are set
    split_bias_grads,
]
"""The passes in the order in which they run. Each edits the graph in place."""


class PostGradPass(CustomInferenceAwareGraphPass):
    """Run the passes after autograd on a partitioned graph, in this order:

    1. `split_conv_backward`: compute the gradient of a large weight by a contiguous convolution on a CPU.
    2. `set_cpu_layouts`: set the layouts of weights and their gradients where Inductor writes C++.
    3. `set_weight_layouts`: let a fold write channels_last weights if Inductor runs the convolution channels_last.
    4. `add_small_kernels`: add the smaller kernel of a contiguous sum in place on a CPU.
    5. `scale_conv_outputs`: scale a convolution's output instead of its weight if that moves fewer bytes.
    6. `split_bias_grads`: leave part of the sum for the gradient of a folded bias to the fold's backward kernel.

    `lower_to_triton` and `lower_merge` are not in the list. They register the lowerings of the remaining operators.

    `install` lets Inductor run it on every graph that has folds.
    """

    def __call__(self, graph: fx.Graph, is_inference: bool = False) -> None:
        lower_to_triton.register()
        lower_merge.register()
        context = PassContext(graph, is_inference)
        for run in PASSES:
            run(graph, context)

    def uuid(self) -> str:
        """Return the key under which Inductor caches the compiled graph.

        Tuned files are part of the key because Inductor's code has the configuration of a lowered fold built in.
        """
        return f"triton_convbn:{sources()}:{tuned_files.digest()}"

    def __deepcopy__(self, memo: dict[int, Any]) -> "PostGradPass":
        return self  # Inductor copies its configuration for every compile
