"""Generate the Triton kernel of one launch from the specs of its pairs."""

from __future__ import annotations

from .codegen_backward import generate_fold_backward
from .codegen_forward import generate_fold
from .config import DEFAULT_CONFIG, KernelConfig
from .kernel_source import KernelSource
from .spec import GradSpec, PairSpec

__all__ = ["generate", "generate_fold", "generate_fold_backward"]


def generate(specs: tuple[PairSpec, ...] | tuple[GradSpec, ...], config: KernelConfig = DEFAULT_CONFIG) -> KernelSource:
    """Return the kernel of one launch: of the fold for `PairSpec`s, of its backward for `GradSpec`s."""
    if specs and isinstance(specs[0], GradSpec):
        return generate_fold_backward(specs, config)
    return generate_fold(specs, config)
