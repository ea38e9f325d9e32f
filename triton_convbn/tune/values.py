"""Shrink a call for the interpreter: fewer channels, the same paths through the generated code."""

import math
from dataclasses import replace
from typing import Any

from ..kernels.codegen import KernelConfig
from ..kernels.spec import GradSpec, PairSpec
from .problem import Specs


def reduced(specs: Specs, config: KernelConfig) -> Specs:
    """The same call with fewer channels, which takes the same paths through the generated code.

    A pair keeps its dtypes and layouts, and what decides which paths its text takes: of a fold, which powers of two up
    to a block divide its elements; of a backward, which up to a program's rows divide its channels, and all of what a
    channel holds. Two blocks, or two programs, are left of it, or a few more. Of pairs that are then alike one is left,
    or two that share a body.
    """
    left: list[Any] = []
    for spec in specs:
        each: PairSpec | GradSpec
        if isinstance(spec, GradSpec):
            each = replace(spec, pair=_fewer_channels(spec.pair, config))
        else:
            each = _fewer_elements(spec, config)
        if left.count(each) < (2 if config.emit == "shared" else 1):
            left.append(each)
    return tuple(left)


def _fewer_elements(pair: PairSpec, config: KernelConfig) -> PairSpec:
    """Fewer rows of a weight, whole groups of them: output channels, or input channels of a transposed convolution."""
    a_row = pair.cols * pair.taps * pair.groups
    ends = math.gcd(pair.numel, config.block)
    for fewer in range(2, pair.rows // pair.groups):
        if fewer * a_row >= 2 * config.block and math.gcd(fewer * a_row, config.block) == ends:
            return replace(pair, rows=fewer * pair.groups)
    return pair


def _fewer_channels(pair: PairSpec, config: KernelConfig) -> PairSpec:
    """Fewer output channels. A program holds as many as fill its block, of a transposed convolution at least 32."""
    if not pair.numel:
        return pair
    field = "cols" if pair.transposed else "rows"
    count = getattr(pair, field)
    rows = min(config.block // (pair.numel // pair.channels), config.rows or config.block)
    rows = 1 << max(32 if pair.transposed else 1, rows).bit_length()
    for fewer in range(rows // 2 + 1, count):
        if math.gcd(fewer, rows) == math.gcd(count, rows):
            return replace(pair, **{field: fewer})
    return pair
