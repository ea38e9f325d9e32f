"""The options of the pass, which `patch`, `patched`, `ConvBNPass` and the backends take as keywords."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Kernel = Literal["auto", "torch", "triton"]
OnDecline = Literal["ignore", "warn", "raise"]
When = Literal["profitable", "always"]


class OptionError(ValueError):
    """An option does not exist or has a wrong value. The message lists what is allowed."""


@dataclass(frozen=True)
class Options:
    """Options of the pass.

    Args:
        kernel: What computes a fold. ``"torch"``: plain torch. ``"triton"``: the generated kernels, and plain torch for
            what they do not support, such as a BatchNorm before its layer. ``"auto"``: the kernels where they can run,
            else plain torch.
        recompute: Compute the folded weights again in backward instead of saving them. At batch 8, ResNet-50 saves
            94 MB less and folds once more per step.
        recompute_activations: Let backward compute the activations between two convolutions again instead of saving
            them, and under Inductor also BatchNorms that are not folded, so that each layer keeps one tensor. Six
            layers with SiLU keep 7 activations instead of 12.
        pairs_per_launch: The maximum number of pairs that one kernel launch folds, 1 to 64. A launch of 16 compiles in
            2 s, one of 53 in 8 s (compiled offline for sm_90). Under Inductor, plain torch folds each pair by itself.
            Without a compiler it computes the scales of as many pairs or sums in one call.
        when: ``"profitable"``: under Inductor, skip folds that save neither memory nor time, as in inference and for
            frozen affine parameters. ``"always"``: fold every pair that can fold.
        on_decline: What happens if a BatchNorm cannot be folded: nothing, a DeclinedWarning, or a DeclinedError.
        codegen: False if no compiler gets the graph and it runs as it is. Folds and convolutions are then autograd
            functions that fold again in backward, and small folded weights are kept. Not for `patch`.

    Raises:
        OptionError: a value is not allowed. A compile raises it for ``kernel="triton"`` if no kernel can run on the
            model's device.
    """

    kernel: Kernel = "auto"
    recompute: bool = True
    recompute_activations: bool = True
    pairs_per_launch: int = 16
    when: When = "profitable"
    on_decline: OnDecline = "ignore"
    codegen: bool = True

    def __post_init__(self) -> None:
        _check("kernel", self.kernel, get_args(Kernel))
        _check("recompute", self.recompute, (True, False))
        _check("recompute_activations", self.recompute_activations, (True, False))
        pairs = self.pairs_per_launch
        if not isinstance(pairs, int) or isinstance(pairs, bool) or not 1 <= pairs <= 64:
            raise OptionError(f"pairs_per_launch={pairs!r} is not an option; choose a number from 1 to 64")
        _check("when", self.when, get_args(When))
        _check("on_decline", self.on_decline, get_args(OnDecline))
        _check("codegen", self.codegen, (True, False))

    @classmethod
    def of(cls, **keywords: Any) -> "Options":
        """Return the options with these names.

        Raises:
            OptionError: a name is unknown or a value is not allowed.
        """
        unknown = sorted(set(keywords) - set(names()))
        if unknown:
            raise OptionError(f"unknown option {', '.join(unknown)}; the options are {', '.join(names())}")
        return cls(**keywords)


def names() -> list[str]:
    """Return the names of the options."""
    return [field.name for field in fields(Options)]


def _check(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise OptionError(f"{name}={value!r} is not an option; choose {' or '.join(map(repr, choices))}")
