"""Make calls from bound arguments, for the dialects of functions."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..calls import BatchNormCall, ConvCall, Moves, PassthroughCall
from ..reasons import Reason

REQUIRED = object()
"""The default of an argument that has none."""

Signature = tuple[tuple[str, Any], ...]
"""The names of the arguments, in order, each with its default."""


def bind(node: fx.Node, signature: Signature) -> dict[str, Any] | None:
    """Return the arguments of a call by name, with defaults, or None if they do not fit the signature."""
    names = [name for name, _ in signature]
    if len(node.args) > len(names) or not set(node.kwargs) <= set(names[len(node.args) :]):
        return None
    bound = dict(signature) | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return None if any(value is REQUIRED for value in bound.values()) else bound


def conv_call(
    node: fx.Node,
    function: Callable[..., Any],
    bound: Mapping[str, Any] | None,
    *,
    transposed: bool = False,
    linear: bool = False,
) -> ConvCall:
    """Return a ConvCall from arguments named input, weight, bias and so on. An unreadable one has an obstacle."""
    rest = dict(bound or {})
    x, weight, bias = (rest.pop(name, None) for name in ("input", "weight", "bias"))
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not isinstance(bias, fx.Node | None):
        return ConvCall(node, function, node, None, None, obstacle=Reason.UNREADABLE_CALL)
    groups = rest.get("groups", 1)
    constant = isinstance(groups, int) and isinstance(rest.get("transposed", False), bool)
    return ConvCall(
        node=node,
        function=function,
        input=x,
        weight=weight,
        bias=bias,
        options=rest,
        transposed=transposed or rest.get("transposed") is True,
        groups=groups if constant else 1,
        linear=linear,
        obstacle=None if constant else Reason.DYNAMIC_ARGUMENT,
    )


def batch_norm_call(node: fx.Node, bound: Mapping[str, Any] | None, *, in_tuple: bool = False) -> BatchNormCall | None:
    """Return a BatchNormCall from arguments named as in `F.batch_norm`. One that cannot be read has an obstacle.

    in_tuple: The call returns a tuple: the normalized tensor, then saved statistics.
    """
    x = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(x, fx.Node):
        return None
    values: list[Any] = [(bound or {}).get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    if bound is None or not all(isinstance(value, fx.Node | None) for value in values):
        return BatchNormCall(node, node, x, None, None, None, None, None, None, obstacle=Reason.UNREADABLE_CALL)
    obstacle, output = None, node
    if in_tuple:
        taken = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
        if len(taken) != 1 or any(user.users for user in node.users if user is not taken[0]):
            obstacle = Reason.STATISTICS_USED
        if any(user.target is not operator.getitem for user in node.users):
            obstacle = Reason.STATISTICS_USED
        output = taken[0] if taken else node
    training, eps = bound.get("training", False), bound["eps"]
    return BatchNormCall(
        node,
        output,
        x,
        values[0],
        values[1],
        values[2],
        values[3],
        training=training if isinstance(training, bool) else None,
        eps=float(eps) if isinstance(eps, int | float) else eps if isinstance(eps, fx.Node) else None,
        obstacle=obstacle,
    )


def passthrough_call(node: fx.Node, kind: Moves) -> PassthroughCall | None:
    """Return a PassthroughCall of the kind "same", "reshape" or "cat".

    Return None if the arguments change its meaning: a view as another dtype, or a result that is written elsewhere.
    """
    if not node.args or "out" in node.kwargs:
        return None
    if kind == "cat":
        bound = bind(node, (("tensors", REQUIRED), ("dim", 0)))
        tensors, dim = (bound or {}).get("tensors"), (bound or {}).get("dim")
        if not isinstance(tensors, list | tuple) or not all(isinstance(each, fx.Node) for each in tensors):
            return None
        return PassthroughCall(node, tuple(tensors), kind, dim) if tensors and isinstance(dim, int) else None
    x, *rest = node.args
    if not isinstance(x, fx.Node) or any(isinstance(each, torch.dtype) for each in (*rest, *node.kwargs.values())):
        return None
    return PassthroughCall(node, (x,), kind)
