"""torch's own functions, as Dynamo writes them: `torch.conv2d`, `F.linear`, `F.batch_norm`, `torch.batch_norm`."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..calls import BatchNormCall, ConvCall, Moves, PassthroughCall
from ._bind import REQUIRED, Signature, batch_norm_call, bind, conv_call, passthrough_call

_HEAD: Signature = (("input", REQUIRED), ("weight", REQUIRED), ("bias", None))
_STRIDE: Signature = (("stride", 1), ("padding", 0))
_CONV: Signature = (*_HEAD, *_STRIDE, ("dilation", 1), ("groups", 1))
_TRANSPOSED: Signature = (*_HEAD, *_STRIDE, ("output_padding", 0), ("groups", 1), ("dilation", 1))
_CONVOLUTION: Signature = tuple(
    (name, REQUIRED)
    for name in "input weight bias stride padding dilation transposed output_padding groups".split()  # noqa: SIM905
)

# F.conv2d is torch.conv2d and F.linear is torch._C._nn.linear: the same objects, so that each stands here once.
_CONVS: dict[Any, tuple[Signature, dict[str, bool]]] = {
    torch.conv1d: (_CONV, {}),
    torch.conv2d: (_CONV, {}),
    torch.conv3d: (_CONV, {}),
    torch.conv_transpose1d: (_TRANSPOSED, {"transposed": True}),
    torch.conv_transpose2d: (_TRANSPOSED, {"transposed": True}),
    torch.conv_transpose3d: (_TRANSPOSED, {"transposed": True}),
    torch.convolution: (_CONVOLUTION, {}),
    F.linear: (_HEAD, {"linear": True}),
}

_BATCH_NORMS: dict[Any, Signature] = {
    F.batch_norm: (
        ("input", REQUIRED),
        ("running_mean", REQUIRED),
        ("running_var", REQUIRED),
        ("weight", None),
        ("bias", None),
        ("training", False),
        ("momentum", 0.1),
        ("eps", 1e-5),
    ),
    torch.batch_norm: tuple(
        (name, REQUIRED)
        for name in "input weight bias running_mean running_var training momentum eps cudnn_enabled".split()  # noqa: SIM905
    ),
}

# A method's target is its name.
_STEPS: dict[Any, Moves] = {
    **dict.fromkeys(("contiguous", "clone", torch.clone), "same"),
    **dict.fromkeys(
        ("flatten", "unflatten", "reshape", "reshape_as", "view", "view_as", "squeeze", "unsqueeze"), "reshape"
    ),
    **dict.fromkeys((torch.flatten, torch.unflatten, torch.reshape, torch.squeeze, torch.unsqueeze), "reshape"),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "cat"),
}
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_DROPOUT: Signature = (("input", REQUIRED), ("p", 0.5), ("training", None), ("inplace", False))


# torch.addmm(bias, x, weight.t()) is a Linear, and so is a product with a transposed weight.
_TRANSPOSES = ("t", torch.t, torch.ops.aten.numpy_T, torch.ops.aten.mT)  # w.T and w.mT of Dynamo's are the last two
_PRODUCTS = (torch.addmm, torch.mm, torch.matmul, operator.matmul, "mm", "matmul")


def _product(node: fx.Node) -> ConvCall | None:
    if node.target is torch.addmm:
        signature: Signature = (("bias", REQUIRED), ("input", REQUIRED), ("mat2", REQUIRED), ("beta", 1), ("alpha", 1))
    else:
        signature = (("input", REQUIRED), ("mat2", REQUIRED))
    bound = bind(node, signature)
    weight = None if bound is None else _transposed(bound["mat2"])
    if bound is None or weight is None or bound.get("beta", 1) != 1 or bound.get("alpha", 1) != 1:
        return None
    named = {"input": bound["input"], "weight": weight, "bias": bound.get("bias")}
    return conv_call(node, F.linear, named, linear=True)


def _transposed(value: Any) -> fx.Node | None:
    """Return the matrix that the value is the transpose of."""
    if not isinstance(value, fx.Node) or not value.args or not isinstance(value.args[0], fx.Node):
        return None
    matrix, *rest = value.args
    if value.target in _TRANSPOSES and not rest:
        return matrix  # type: ignore[return-value]
    if value.target is getattr and rest in (["T"], ["mT"]):
        return matrix  # type: ignore[return-value]
    if value.target in ("transpose", torch.transpose) and rest in ([0, 1], [1, 0]):
        return matrix  # type: ignore[return-value]
    return None


def conv(node: fx.Node) -> ConvCall | None:
    """Return the convolution or Linear that `node` calls, or None."""
    if node.op in ("call_function", "call_method") and node.target in _PRODUCTS:
        return _product(node)
    if node.op != "call_function" or node.target not in _CONVS:
        return None
    signature, kind = _CONVS[node.target]
    return conv_call(node, node.target, bind(node, signature), **kind)  # type: ignore[arg-type]


def batch_norm(node: fx.Node) -> BatchNormCall | None:
    """Return the BatchNorm that `node` calls, or None."""
    if node.op != "call_function" or node.target not in _BATCH_NORMS:
        return None
    return batch_norm_call(node, bind(node, _BATCH_NORMS[node.target]))


def step(node: fx.Node) -> PassthroughCall | None:
    """Return the call that `node` is if it only moves, drops or repeats elements, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.op == "call_function" and node.target in _DROPOUTS:
        bound = bind(node, _DROPOUT) or {}
        return PassthroughCall(node, (bound["input"],)) if bound.get("training") is False else None
    kind = _STEPS.get(node.target)
    return None if kind is None else passthrough_call(node, kind)
