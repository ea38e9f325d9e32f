"""Read the calls that pad: `F.pad`, as a convolution's `padding_mode` calls it, in every dialect."""

import torch
import torch.nn.functional as F
from torch import fx

from ._bind import REQUIRED, Signature, bind

_PAD: Signature = (("input", REQUIRED), ("pad", REQUIRED), ("mode", "constant"), ("value", None))
_PADS = (F.pad, torch._C._nn.pad, torch.ops.aten.pad.default)


def read_padding(node: fx.Node) -> str | None:
    """Return the mode of the padding that `node` adds to its first argument, or None if it does not pad."""
    if node.op != "call_function" or node.target not in _PADS:
        return None
    bound = bind(node, _PAD)
    return str(bound["mode"]) if bound is not None and isinstance(bound["input"], fx.Node) else None
