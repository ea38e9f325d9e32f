"""Eval-mode BatchNorm folded into convolutions inside torch.compile, on every call and differentiably."""

from typing import TYPE_CHECKING, Any

from .options import OptionError, Options

if TYPE_CHECKING:
    from .eager import bn_conv_eval, conv_bn_eval, conv_sum_eval, fold
    from .explanation import explain
    from .export import fold_exported
    from .freeze import freeze_statistics, unfreeze_statistics
    from .graph.conv_bn_pass import ConvBNPass, DeclinedError, DeclinedWarning
    from .inductor import patch, patched, unpatch

__version__ = "0.1.0"

__all__ = [
    "ConvBNPass",
    "DeclinedError",
    "DeclinedWarning",
    "OptionError",
    "Options",
    "bn_conv_eval",
    "conv_bn_eval",
    "conv_sum_eval",
    "explain",
    "fold",
    "fold_exported",
    "freeze_statistics",
    "patch",
    "patched",
    "unfreeze_statistics",
    "unpatch",
]

# Imported when first asked for: Dynamo and Inductor take seconds.
_LAZY = {
    "ConvBNPass": "graph.conv_bn_pass",
    "DeclinedError": "graph.conv_bn_pass",
    "DeclinedWarning": "graph.conv_bn_pass",
    "bn_conv_eval": "eager",
    "conv_bn_eval": "eager",
    "conv_sum_eval": "eager",
    "explain": "explanation",
    "fold": "eager",
    "fold_exported": "export",
    "freeze_statistics": "freeze",
    "patch": "inductor",
    "patched": "inductor",
    "unfreeze_statistics": "freeze",
    "unpatch": "inductor",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
