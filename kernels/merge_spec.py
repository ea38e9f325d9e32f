"""Specs of sums of branches: what the kernels that merge them, and differentiate that, are generated from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .spec import ITEMSIZE


@dataclass(frozen=True)
class Source:
    """The weight of one branch, ``[channels, columns, *kernel]``.

    Attributes:
        kernel: Three sizes; missing ones are 1.
        dtype: Triton's name of it.
        last: The weight is channels_last.
    """

    kernel: tuple[int, int, int]
    dtype: str
    last: bool = False

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)


@dataclass(frozen=True)
class MergeSpec:
    """The spec of one sum: ``W' = sum_k embed(s_k * W_k) + diag(s_0)``.

    Attributes:
        channels, columns: C_out, and C_in / groups.
        kernel: That of the largest source, which holds the others in its middle.
        sources: The weights.
        identity: The input is a term. Its scale is the last row of the scales.
        scales: The dtype of the scales, [terms, channels].
        out, out_last: Dtype and layout of W'.
    """

    channels: int
    columns: int
    kernel: tuple[int, int, int]
    sources: tuple[Source, ...]
    scales: str
    out: str
    identity: bool = False
    out_last: bool = False

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def numel(self) -> int:
        return self.channels * self.columns * self.taps

    @property
    def terms(self) -> int:
        return len(self.sources) + self.identity

    @property
    def compute(self) -> str:
        """Return the dtype of the arithmetic: fp64 if any tensor is fp64, else fp32."""
        return "fp64" if "fp64" in (self.scales, self.out, *(source.dtype for source in self.sources)) else "fp32"

    @property
    def arguments(self) -> int:
        """Return the number of kernel arguments of this sum, one for each tensor."""
        return len(self.sources) + 2 if self.numel else 0

    @property
    def written_bytes(self) -> int:
        return self.numel * ITEMSIZE[self.out]

    def describe(self) -> str:
        kernels = " + ".join("x".join(map(str, source.kernel)) for source in self.sources)
        return (
            f"[{self.channels}, {self.columns}] {kernels}{' + identity' * self.identity} "
            f"-> {self.out}{' channels_last' * self.out_last}"
        )


@dataclass(frozen=True)
class MergeGradSpec:
    """The spec of one sum's backward.

    Attributes:
        sum: The spec of the sum.
        grad, grad_last: Dtype and layout of dW'.
        weights: For each source, whether its gradient is written.
        scales: Write the gradients of all scales.
    """

    sum: MergeSpec
    grad: str
    grad_last: bool
    weights: tuple[bool, ...]
    scales: bool

    @property
    def compute(self) -> str:
        return "fp64" if "fp64" in (self.sum.compute, self.grad) else "fp32"

    @property
    def arguments(self) -> int:
        """Return the number of kernel arguments of this sum, one for each tensor."""
        read = 1 + any(self.weights) + len(self.weights) * self.scales
        return read + sum(self.weights) + self.scales if self.sum.channels and (any(self.weights) or self.scales) else 0

    @property
    def written_bytes(self) -> int:
        one = self.sum
        written = sum(
            one.channels * one.columns * source.taps * ITEMSIZE[source.dtype]
            for source, wanted in zip(one.sources, self.weights, strict=True)
            if wanted
        )
        return written + self.scales * one.terms * one.channels * ITEMSIZE[one.scales]

    def describe(self) -> str:
        return self.sum.describe()
