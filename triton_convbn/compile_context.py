"""Who is compiling: what the pass does for a compiler's sake it leaves out of a graph that it is given by hand."""

import torch
from torch import fx
from torch._guards import TracingContext

from .graph.calls import Value, tensor_of

MARK = "triton_convbn"
"""In ``node.meta["custom"]`` of a fold, and so of whatever AOTAutograd traces it to: what comes after that finds it."""


def compiling() -> bool:
    """Whether the graph is one that Dynamo has captured and that its backend compiles now."""
    return TracingContext.try_get() is not None


def compiles_to_cpp(weight: Value, graph: fx.Graph) -> bool:
    """Whether Inductor is about to write C++ for what is computed from this weight."""
    tensor = tensor_of(weight, graph)
    return compiling() and tensor is not None and tensor.device == torch.device("cpu")
