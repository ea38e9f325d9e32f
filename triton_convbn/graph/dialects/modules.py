"""`call_module` nodes, as `torch.fx.symbolic_trace` writes them: what the module's forward would do, spelled out.

A module is read as it is now. A graph that was rewritten while a BatchNorm was in eval mode stays in eval mode.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import module as _global
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from ..calls import Attribute, BatchNormCall, ConvCall, Moves, PassthroughCall
from ..reasons import Reason

_CONVS: dict[type[nn.Module], Any] = {
    nn.Linear: F.linear,
    nn.Conv1d: torch.conv1d,
    nn.Conv2d: torch.conv2d,
    nn.Conv3d: torch.conv3d,
    nn.ConvTranspose1d: torch.conv_transpose1d,
    nn.ConvTranspose2d: torch.conv_transpose2d,
    nn.ConvTranspose3d: torch.conv_transpose3d,
}

# In eval mode, all of them hand on what they are given.
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# The number of dimensions that a BatchNorm accepts is what its check accepts; SyncBatchNorm's takes any.
_RANKS = {
    nn.BatchNorm1d._check_input_dim: frozenset({2, 3}),
    nn.BatchNorm2d._check_input_dim: frozenset({4}),
    nn.BatchNorm3d._check_input_dim: frozenset({5}),
}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")


class Functional(NamedTuple):
    """A module's forward as ``function(input, weight, bias, **options)``, after ``F.pad(input, *pad)`` if any."""

    base: type[nn.Module]
    function: Callable[..., torch.Tensor]
    options: dict[str, Any]
    pad: tuple[tuple[int, ...], str] | None


def conv(node: fx.Node) -> ConvCall | None:
    """Return the convolution or Linear that `node` calls, or None."""
    module = _module(node)
    spelled = None if module is None else spell_out(module)
    if module is None or spelled is None:
        return None
    x = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(x, fx.Node):
        return ConvCall(node, spelled.function, node, None, None, obstacle=Reason.UNREADABLE_CALL)
    found = obstacle(module, spelled.base, "forward", "_conv_forward")
    if len(node.args) > 1 or node.kwargs.get("output_size") is not None:
        found = Reason.DYNAMIC_ARGUMENT  # output_padding follows from output_size and the input's size
    return ConvCall(
        node=node,
        function=spelled.function,
        input=x,
        weight=Attribute(f"{node.target}.weight"),
        bias=_attribute(module, node, "bias"),
        options=spelled.options,
        transposed="output_padding" in spelled.options,
        groups=spelled.options.get("groups", 1),
        linear=spelled.base is nn.Linear,
        pad=spelled.pad,
        obstacle=found,
    )


def batch_norm(node: fx.Node) -> BatchNormCall | None:
    """Return the BatchNorm that `node` calls, or None."""
    module = _module(node)
    if not isinstance(module, _BatchNorm):
        return None
    x = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(x, fx.Node):
        return None
    return BatchNormCall(
        node=node,
        output=node,
        input=x,
        weight=_attribute(module, node, "weight"),
        bias=_attribute(module, node, "bias"),
        running_mean=_attribute(module, node, "running_mean"),
        running_var=_attribute(module, node, "running_var"),
        training=module.training,
        eps=float(module.eps),
        ranks=_RANKS.get(type(module)._check_input_dim),
        obstacle=batch_norm_obstacle(module),
    )


def step(node: fx.Node) -> PassthroughCall | None:
    """Return the call that `node` is if it only moves, drops or repeats elements, or None."""
    module = _module(node)
    base = next(
        (base for base in (nn.Identity, nn.Flatten, nn.Unflatten, *_DROPOUTS) if isinstance(module, base)), None
    )
    if module is None or base is None or obstacle(module, base, "forward") or (base in _DROPOUTS and module.training):
        return None
    x = node.args[0] if node.args else node.kwargs.get("input")
    kind: Moves = "reshape" if base in (nn.Flatten, nn.Unflatten) else "same"
    return PassthroughCall(node, (x,), kind) if isinstance(x, fx.Node) else None


def batch_norm_obstacle(module: _BatchNorm) -> Reason | None:
    """Return what a BatchNorm module does besides normalizing, if anything."""
    return obstacle(module, nn.SyncBatchNorm if isinstance(module, nn.SyncBatchNorm) else _BatchNorm, "forward")


def _module(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return None
    return owner.get_submodule(str(node.target))


def _attribute(module: nn.Module, node: fx.Node, name: str) -> Attribute | None:
    return None if getattr(module, name) is None else Attribute(f"{node.target}.{name}")


def spell_out(conv: nn.Module) -> Functional | None:
    """Return what a convolution module or Linear calls, or None for other modules."""
    base = next((base for base in _CONVS if isinstance(conv, base)), None)
    if base is None:
        return None
    if base is nn.Linear:
        return Functional(base, _CONVS[base], {}, None)
    options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
    if conv.transposed:
        options["output_padding"] = conv.output_padding
    if conv.padding_mode == "zeros":
        return Functional(base, _CONVS[base], options, None)
    amounts: Any = conv._reversed_padding_repeated_twice
    pad = tuple(amounts), str(conv.padding_mode)
    return Functional(base, _CONVS[base], options | {"padding": 0}, pad)


def obstacle(module: nn.Module, base: type[nn.Module], *methods: str) -> Reason | None:
    """Return what the module does besides what its base class does, if anything."""
    if any(getattr(module, hooks) for hooks in _HOOKS) or any(getattr(_global, hooks) for hooks in _GLOBAL_HOOKS):
        return Reason.HOOKS
    for name in ("__call__", *methods):
        own = getattr(type(module), name, None)
        if own is not getattr(base, name, None) or name in vars(module):
            return Reason.CUSTOM_FORWARD
    return Reason.PARAMETRIZED if is_parametrized(module) else None
