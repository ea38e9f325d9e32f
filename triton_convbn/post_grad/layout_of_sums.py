"""Keep the convolutions of merged sums contiguous in training on a CPU.

Inductor runs the convolutions of a graph channels_last. In that layout oneDNN adds all products of an output element
one after another, and the error grows with the root of their number. Contiguous, it adds them in parts. Errors of a
3 x 3 kernel channels_last over those contiguous, with AVX-512: 1.0 for 16 input channels, 1.3 for 24, 2.0 for 64, 3.3
for 192 (`torch.nn.functional.conv2d` on random numbers, against fp64).

A convolution of all branches adds up larger products than each branch does. Channels_last, gradients of repvgg_a0 have
1.90 times the error of eager's, plain Inductor's 1.48, contiguous 1.01. A training step takes 0.99 to 1.06 of the time
of channels_last, but an inference 1.00 to 1.5, probably because oneDNN copies the activations twice a convolution. So
graphs for inference keep Inductor's layout. So do all graphs where torch does not use AVX-512: oneDNN's AVX2 code adds
one after another in both layouts, and contiguous it starts with the bias, so that every partial sum is rounded at the
bias's size. See docs/experiments.md.
"""

from typing import Any

import torch
from torch import Tensor, fx

from ..compat import WRITES_IN_ORDER
from ..compile_context import SUM

CHAIN = 144
"""Up to this number of products in an output element, both layouts have the same error."""


def layout_options(gm: fx.GraphModule, is_inference: bool) -> dict[str, Any]:
    """Return the options of Inductor that a graph after autograd is compiled with: contiguous, or none.

    ``force_layout_optimization`` is the user's word, and channels_last. So is torch 2.11, where `add_small_kernels`
    cannot make the contiguous layout as fast.
    """
    from torch._inductor import config

    if is_inference or config.force_layout_optimization or not WRITES_IN_ORDER:
        return {}
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return {}
    modules = (module for module in gm.modules() if isinstance(module, fx.GraphModule))
    convolutions = (
        node
        for module in modules
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    )
    return {"layout_optimization": False} if any(map(_is_inexact, convolutions)) else {}


def _is_inexact(convolution: fx.Node) -> bool:
    """Return whether a convolution is a merged sum that channels_last would make less exact."""
    if SUM not in (convolution.meta.get("custom") or {}):
        return False
    weight: Tensor = convolution.args[1].meta["val"]  # type: ignore[union-attr]
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.ndim != 4:
        return False
    if not all(isinstance(size, int) for size in weight.shape):
        return False  # comparing dynamic sizes adds a guard
    return weight.shape[2:].numel() > 1 and weight.shape[1:].numel() > CHAIN
