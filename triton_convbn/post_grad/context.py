"""Context of the passes after autograd."""

from dataclasses import dataclass
from functools import cached_property

from torch import fx


@dataclass
class PassContext:
    """Facts about a partitioned graph that its nodes do not have.

    Attributes:
        graph: The partitioned graph.
        is_inference: The graph has no backward.
    """

    graph: fx.Graph
    is_inference: bool = False

    @cached_property
    def channels_last(self) -> bool:
        """Return whether Inductor will run this graph's forward convolutions channels_last."""
        from torch._inductor.graph import GraphLowering

        module = self.graph.owning_module
        return module is not None and bool(GraphLowering.decide_layout_opt(module, is_inference=self.is_inference))

    @property
    def is_body(self) -> bool:
        """Return whether this is the body of a loop or branch. Inductor records visible outputs of all other graphs."""
        return "user_visible_output_idxs" not in self.graph.output_node().meta
