"""Compile up to the partitioner: the graphs of forward and backward run as they are, without generated code."""

from collections.abc import Callable
from typing import Any

from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from triton_convbn.graph.conv_bn_pass import ConvBNPass


def partitioned(graphs: list[fx.GraphModule], convbn: bool = True, **options: Any) -> Callable[..., Any]:
    """Return a backend of `torch.compile`. It appends every forward and backward graph to `graphs`."""

    def keep(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        if convbn:
            ConvBNPass(**options)(gm.graph)
            gm.recompile()
        compiler = aot_autograd(
            fw_compiler=keep,
            bw_compiler=keep,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        return compiler(gm, example_inputs)

    return backend


def targets(gm: fx.GraphModule) -> list[str]:
    """Return the names of what a graph calls."""
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
