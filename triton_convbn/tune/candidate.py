"""A candidate: a call, a configuration and a generator. It can be pickled, and shrunk for the interpreter."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..kernels.codegen import KernelSource
from ..kernels.config import KernelConfig, split_launches
from ..kernels.spec import GradSpec, PairSpec
from .problem import Specs

Generate = Callable[[Specs, KernelConfig], KernelSource]
"""Generates the kernel of one launch, such as `kernels.codegen.generate`. Importable by name."""


@dataclass(frozen=True)
class Candidate:
    """A configuration of a call. arch: the architecture that it is compiled for; empty if it runs on a device."""

    specs: Specs
    config: KernelConfig
    generate: Generate
    arch: str = ""

    def sources(self) -> list[tuple[slice, KernelSource]]:
        """Return the kernel of each launch, and the pairs that it serves."""
        parts = split_launches(self.specs, self.config)
        return [(part, self.generate(self.specs[part], self.config)) for part in parts]

    def reduced(self) -> "Candidate":
        """Return the candidate with fewer channels, such that the generated code takes the same paths.

        Dtypes and layouts stay, and so does what selects a path: in a fold, the powers of two up to a block that divide
        the elements; in a backward, the powers of two up to a program's rows that divide the channels. Two blocks or
        programs remain, or a few more. Of equal pairs one remains, or two if they share a body.
        """
        left: list[PairSpec | GradSpec] = []
        for spec in self.specs:
            if isinstance(spec, GradSpec):
                each: PairSpec | GradSpec = replace(spec, pair=_fewer_channels(spec.pair, self.config))
            else:
                each = _fewer_elements(spec, self.config)
            if left.count(each) < (2 if self.config.emit == "shared" else 1):
                left.append(each)
        return replace(self, specs=tuple(left))


def _fewer_elements(pair: PairSpec, config: KernelConfig) -> PairSpec:
    """Return the pair with fewer rows, in whole groups."""
    row_elements = pair.cols * pair.taps * pair.groups
    ends = math.gcd(pair.numel, config.block)
    for fewer in range(2, pair.rows // pair.groups):
        if fewer * row_elements >= 2 * config.block and math.gcd(fewer * row_elements, config.block) == ends:
            return replace(pair, rows=fewer * pair.groups)
    return pair


def _fewer_channels(pair: PairSpec, config: KernelConfig) -> PairSpec:
    """Return the pair with fewer output channels. A program fills its block; of a transposed one it holds >= 32."""
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
