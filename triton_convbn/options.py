"""The options of the pass: the same keywords in every place that takes them."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Kernel = Literal["auto", "torch", "triton"]
OnDecline = Literal["ignore", "warn", "raise"]
When = Literal["always", "pays"]


class OptionError(ValueError):
    """An option that does not exist or has a value that it cannot have; the message says what it can be."""


@dataclass(frozen=True)
class Options:
    """What the pass may do.

    kernel: what computes the fold: ``"torch"`` is the plain decomposition, ``"triton"`` the generated kernels,
        ``"auto"`` the best that works for the device of the tensors.
    recompute: compute the folded weights again in backward instead of keeping them. For ResNet-50 at batch 8 that is
        94 MB less kept, for one more fold a step.
    group: how many pairs one launch of a kernel folds at most; 1 folds each by itself, as plain torch always does.
        At 16 a group compiles in 2 s and stays at 32 registers, at 53 it takes 8 s (compiled offline for sm_90).
    when: ``"pays"`` leaves alone, under Inductor, what gains nothing by the fold: inference, and BatchNorms whose
        affine parameters are frozen. ``"always"`` folds whatever folds. A trained affine is folded either way.
    on_decline: what happens at a BatchNorm that cannot fold: nothing, a warning, or a DeclinedError.
    codegen: False where no compiler gets the graph and it runs as it is written: each pair becomes one function, which
        folds again in backward by itself (`group` has no effect then). Inductor cannot be patched with it.
    """

    kernel: Kernel = "auto"
    recompute: bool = True
    group: int = 16
    when: When = "pays"
    on_decline: OnDecline = "ignore"
    codegen: bool = True

    def __post_init__(self) -> None:
        _one_of("kernel", self.kernel, get_args(Kernel))
        _one_of("recompute", self.recompute, (True, False))
        if not isinstance(self.group, int) or isinstance(self.group, bool) or not 1 <= self.group <= 64:
            raise OptionError(f"group={self.group!r} is not an option; choose a number from 1 to 64")
        _one_of("when", self.when, get_args(When))
        _one_of("on_decline", self.on_decline, get_args(OnDecline))
        _one_of("codegen", self.codegen, (True, False))

    @classmethod
    def of(cls, **keywords: Any) -> "Options":
        """Options from keywords; an unknown one is an OptionError that names the known."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(keywords) - set(known))
        if unknown:
            raise OptionError(f"unknown option {', '.join(unknown)}; the options are {', '.join(known)}")
        return cls(**keywords)


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise OptionError(f"{name}={value!r} is not an option; choose {' or '.join(map(repr, choices))}")
