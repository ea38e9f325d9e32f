"""Read the calls that pad: `F.pad`, as a convolution's `padding_mode` calls it, in every dialect."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ._bind import REQUIRED, Signature, bind

_PAD: Signature = (("input", REQUIRED), ("pad", REQUIRED), ("mode", "constant"), ("value", None))
_CONSTANT: Signature = (("input", REQUIRED), ("pad", REQUIRED), ("value", 0))
_PADS = (F.pad, torch._C._nn.pad, torch.ops.aten.pad.default)
_CONSTANT_PADS = (torch.constant_pad_nd, torch.ops.aten.constant_pad_nd.default)

REPEATING = ("reflect", "replicate", "circular")
"""The modes that pad with elements of the input."""


def read_padding(node: fx.Node) -> str | None:
    """Return the mode of the padding that `node` adds to its first argument, or None if it does not pad."""
    bound = _bound(node)
    return None if bound is None else str(bound["mode"])


def repeated_dims(node: fx.Node) -> tuple[int, ...] | None:
    """Return the dimensions, counted from the last, along which a pad repeats or drops elements.

    Return None if `node` does not pad, or pads with a constant.
    """
    bound = _bound(node)
    if bound is None or not isinstance(bound["pad"], list | tuple):
        return None
    sizes = bound["pad"]
    if bound["mode"] not in REPEATING and not all(isinstance(size, int) and size <= 0 for size in sizes):
        return None
    return tuple(-1 - index for index in range((len(sizes) + 1) // 2))


def _bound(node: fx.Node) -> dict[str, Any] | None:
    if node.op != "call_function" or node.target not in (*_PADS, *_CONSTANT_PADS):
        return None
    bound = bind(node, _PAD if node.target in _PADS else _CONSTANT)
    if bound is None or not isinstance(bound["input"], fx.Node):
        return None
    return {"mode": "constant"} | bound
