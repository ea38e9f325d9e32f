"""Fix which inputs of each ReLU are positive, to compare gradients in fp32.

Rounding may move a ReLU's input across zero, by chance. That changes gradients by far more than rounding does: one such
input in repvgg_a0 has moved the error of a gradient from 2e-6 to 8e-3, in eager.
"""

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from triton_convbn.errors import UsageError


class Mask(nn.Module):
    """A ReLU that records in fp64 which inputs are positive, and multiplies by that record in other dtypes."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.empty(0, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            self.mask = x.detach() > 0
        return x * self.mask


def with_masks(model: nn.Module) -> fx.GraphModule:
    """Return the model with a `Mask` of its own for each call of a ReLU, not in place. Parameters keep their names.

    Raises:
        UsageError: If torch.fx cannot trace the model.
    """
    try:
        gm = fx.symbolic_trace(model)
    except Exception as error:  # tracing runs the code of the model, which may raise anything
        raise UsageError(f"fixed ReLU masks need a model that torch.fx traces: {error}") from error
    modules = dict(gm.named_modules())
    for number, node in enumerate(gm.graph.nodes):
        function = modules.get(str(node.target)) if node.op == "call_module" else node.target
        if isinstance(function, nn.ReLU) or function in (torch.relu, F.relu, F.relu_, "relu", "relu_"):
            name = f"mask_{number}"
            gm.add_submodule(name, Mask())
            with gm.graph.inserting_before(node):
                node.replace_all_uses_with(gm.graph.call_module(name, tuple(node.all_input_nodes)))
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


def copy_masks(source: nn.Module, target: nn.Module) -> None:
    """Copy to `target` the masks that `source`, its copy in fp64, has recorded."""
    for path, module in source.named_modules():
        if isinstance(module, Mask):
            target.get_submodule(path).register_buffer("mask", module.mask)
