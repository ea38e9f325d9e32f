"""Let oneDNN compute convolutions with kernels of one element on one thread of a CPU.

With several threads torch calls oneDNN for them. With one thread it calls MKL, unless they are dilated or strided, or
the batch is large (`use_mkldnn` in ATen/native/Convolution.cpp). A kernel of one element is the same with any dilation.

On an AMD CPU, MKL does not use AVX-512, and from Zen 5 on the vector units have 512 bits. There oneDNN takes 0.44 to
0.98 of MKL's time for most shapes, a compiled inference of mobileone_s0 0.77 of the time, and one of fastvit_t8, whose
1 x 1 convolutions have no BatchNorms, 0.72. On Zen 4, whose units have 256 bits, these take 1.01 of the time, and a
training step of ResNet-50 without a compiler 1.02. So nothing changes there, with AVX2 or on other CPUs. See
docs/experiments.md.
"""

from typing import Any

import torch
from torch import fx

from ..cpu import cpu
from ..options import Options
from .calls import ConvCall, is_subclass, tensor_of
from .dialects import read_conv

LEAST_PRODUCTS = 2**22
"""Below, oneDNN's call may take longer: 122 instead of 13 us, forward and backward, for eight thousand."""

ZEN_5 = 26
"""The first family of AMD's CPUs whose vector units have 512 bits."""

NATIVE_IMAGE = 20480
"""Up to so many elements torch computes a dilated convolution of one image by neither of the two."""

LARGE_BATCH = 16
"""From so many images on torch calls oneDNN by itself."""


def by_onednn(conv: ConvCall, graph: fx.Graph, options: Options) -> dict[str, Any]:
    """Return the dilation that makes torch call oneDNN, as a keyword of the convolution, or no keyword."""
    if torch.get_num_threads() > 1 or not _leaves_units_idle():
        return {}
    if not (options.codegen or options.recompute):  # the graph is to run elsewhere
        return {}
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return {}
    x, weight, output = (tensor_of(each, graph) for each in (conv.input, conv.weight, conv.node))
    if x is None or weight is None or output is None or conv.transposed or conv.groups > 1:
        return {}
    if is_subclass(x) or is_subclass(weight):  # DTensor shards the last dimension of an undilated convolution only
        return {}
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[2:] != (1, 1):
        return {}
    if x.device.type != "cpu" or output.dtype != torch.float32:
        return {}
    if not all(isinstance(size, int) for size in (*x.shape, *output.shape)):  # dynamic
        return {}
    small = x.shape[0] == 1 and x.numel() <= NATIVE_IMAGE
    if small or x.shape[0] >= LARGE_BATCH or output.numel() * weight.shape[1] < LEAST_PRODUCTS:
        return {}
    return {"dilation": (2, 2)}


def _leaves_units_idle() -> bool:
    """Return whether MKL leaves half of the CPU's vector units idle, and oneDNN does not."""
    own = cpu()
    wide = own is not None and own.vendor == "AuthenticAMD" and own.family >= ZEN_5
    return wide and torch.backends.cpu.get_cpu_capability() == "AVX512"


def call_onednn(graph: fx.Graph, options: Options) -> None:
    """Let oneDNN compute the convolutions of a rewritten graph that have no BatchNorm, as between two activations."""
    for node in graph.find_nodes(op="call_function", target=torch.conv2d):
        conv = read_conv(node)
        if conv is not None and conv.obstacle is None and (dilation := by_onednn(conv, graph, options)):
            node.args = conv.input, conv.weight, conv.bias
            node.kwargs = dict(conv.options) | dilation
