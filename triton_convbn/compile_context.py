"""Detect whether Dynamo is compiling a graph, and mark the nodes of a fold for the passes after autograd."""

from torch._guards import TracingContext

MARK = "triton_convbn"
"""Key in ``node.meta["custom"]`` of a fold's nodes. AOTAutograd copies it to what it traces them to."""

LAYER = "triton_convbn_layer"
"""Key in ``node.meta["custom"]`` of the output of a layer whose activation backward may compute again."""

SUM = "triton_convbn_sum"
"""Key in ``node.meta["custom"]`` of a convolution that a sum of branches became."""


def compiling() -> bool:
    """Return whether a backend is compiling a graph that Dynamo has captured."""
    return TracingContext.try_get() is not None
