"""Keep the convolutions of merged sums contiguous on a CPU, in training and where weights are large.

Inductor runs the convolutions of a graph channels_last. In that layout oneDNN adds all products of an output element
one after another, and the error grows with the root of their number. Contiguous, it adds them in parts. Errors of a
3 x 3 kernel channels_last over those contiguous, with AVX-512: 1.0 for 16 input channels, 1.3 for 24, 2.0 for 64, 3.3
for 192 (`torch.nn.functional.conv2d` on random numbers, against fp64).

A convolution of all branches adds up larger products than each branch does. Channels_last, gradients of repvgg_a0 have
1.90 times the error of eager's, plain Inductor's 1.48, contiguous 1.01. A training step takes 0.99 to 1.06 of the time
of channels_last. In inference oneDNN probably copies the activations twice a convolution: repvgg_a0 takes 0.96 to 1.04
of the time where its weights have twice as many elements as the inputs of its convolutions, and up to 1.5 where they
have fewer than these. So graphs for inference are contiguous where weights are that large, and else keep Inductor's
layout. So do all graphs where torch does not use AVX-512: oneDNN's AVX2 code adds one after another in both layouts,
and contiguous it starts with the bias, so that every partial sum is rounded at the bias's size. See
docs/experiments.md.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..compat import WRITES_IN_ORDER
from ..compile_context import SUM

CHAIN = 144
"""Up to this number of products in an output element, both layouts have the same error."""

LARGE = 2
"""Weights with this many times the elements of the activations make the layout of the activations cost little."""


def layout_options(gm: fx.GraphModule, is_inference: bool) -> dict[str, Any]:
    """Return the options of Inductor that a graph after autograd is compiled with: contiguous, or none.

    ``force_layout_optimization`` is the user's word, and channels_last. So is torch 2.11, where `add_small_kernels`
    cannot make the contiguous layout as fast. With ``freezing`` the weights are merged once, and channels_last already.
    """
    from torch._inductor import config

    if config.force_layout_optimization or not WRITES_IN_ORDER or (is_inference and config.freezing):
        return {}
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return {}
    convolutions = [
        node
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    ]
    contiguous = any(map(_is_inexact, convolutions)) and (not is_inference or _weights_are_large(convolutions))
    return {"layout_optimization": False} if contiguous else {}


def _weights_are_large(convolutions: Sequence[fx.Node]) -> bool:
    """Return whether the weights of convolutions have `LARGE` times as many elements as their inputs."""
    activations, weights = (
        [convolution.args[index].meta["val"].shape for convolution in convolutions]  # type: ignore[union-attr]
        for index in (0, 1)
    )
    if not all(isinstance(size, int) for shape in (*activations, *weights) for size in shape):
        return False  # comparing dynamic sizes adds a guard
    return sum(map(math.prod, weights)) >= LARGE * sum(map(math.prod, activations))


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
