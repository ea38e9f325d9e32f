"""Specs: what a kernel is generated from.

A spec describes one pair without its tensors. It is frozen and hashable, and holds exactly what changes the generated
text or its signature. Tensors change between calls, so they are kernel arguments and not part of a spec.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of an element, by Triton's name of its dtype."""

POWER = "fp16"
"""The dtype of q, the powers of two by which a fold with prescale is divided."""

POINTER_BYTES = 8
# CUDA allows 4096 bytes of parameters a kernel (32,764 from CUDA 12.1 on sm_70 and later). Triton adds two pointers of
# its own, as the kernels compiled by offline.py show.
HIDDEN_PARAMETER_BYTES = 2 * POINTER_BYTES
ARGUMENT_LIMIT = (4096 - HIDDEN_PARAMETER_BYTES) // POINTER_BYTES
"""The maximum number of arguments of a kernel."""


@dataclass(frozen=True)
class ChannelMap:
    """The channel of element e in memory order: ``(e // group_span) * channels + (e // inner) % channels``."""

    inner: int
    channels: int
    group_span: int

    def channel(self, e: int) -> int:
        return (e // self.group_span) * self.channels + (e // self.inner) % self.channels


@dataclass(frozen=True)
class PairSpec:
    """The spec of one fold: sizes, dtypes and layouts.

    The weight is [rows, cols, taps], where taps is the product of the kernel sizes. Dtypes have Triton's names; None
    means that the pair has no such tensor.
    """

    rows: int
    cols: int
    taps: int
    weight: str
    out: str
    running_mean: str
    running_var: str
    bias: str | None = None
    bn_weight: str | None = None
    bn_bias: str | None = None
    transposed: bool = False
    groups: int = 1  # of a transposed convolution; 1 for all others
    weight_last: bool = False  # the weight is channels_last
    out_last: bool = False  # the folded weight is channels_last
    prescale: bool = False  # the fold is divided by powers of two q, a third output
    eps: float = 1e-5  # finite
    out_bias: bool = True  # the folded bias is written; backward reads the folded weight alone

    @property
    def numel(self) -> int:
        return self.rows * self.cols * self.taps

    @property
    def channels(self) -> int:
        """Return C_out, over all groups."""
        return self.cols * self.groups if self.transposed else self.rows

    @property
    def compute(self) -> str:
        """Return the dtype of the arithmetic: fp64 if any tensor is fp64, else fp32."""
        every = (self.weight, self.bias, self.bn_weight, self.bn_bias, self.running_mean, self.running_var, self.out)
        return "fp64" if "fp64" in every else "fp32"

    def channel_map(self, channels_last: bool) -> ChannelMap:
        """Return the map for a contiguous or channels_last weight. Undefined (inner is 0) for an empty weight."""
        if not self.transposed:
            return ChannelMap(self.cols * self.taps, self.rows, self.numel)
        return ChannelMap(1 if channels_last else self.taps, self.cols, self.numel // self.groups)

    def swap(self, walked_last: bool, other_last: bool) -> tuple[int, int] | None:
        """Return the two innermost sizes of the walked weight if the other tensor swaps them, else None."""
        if walked_last == other_last:
            return None
        return (self.taps, self.cols) if walked_last else (self.cols, self.taps)

    def describe(self) -> str:
        kind = "transposed conv" if self.transposed else "conv"
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        names = {False: "contiguous", True: "channels_last"}
        return (
            f"{kind} [{self.rows}, {self.cols}, {self.taps}]{groups}, "
            f"{self.weight} {names[self.weight_last]} -> {self.out} {names[self.out_last]}{' / q' * self.prescale}"
            f"{'' if self.out_bias else ', no bias'}"
        )

    @property
    def writes_vectors(self) -> bool:
        """Return whether the folded bias or q is written."""
        return self.channels > 0 and (self.out_bias or self.prescale)

    @property
    def writes(self) -> bool:
        """Return whether anything is written."""
        return self.numel > 0 or self.writes_vectors

    @property
    def arguments(self) -> int:
        """Return the number of kernel arguments of this pair, one for each tensor."""
        tensors = (
            2 * (self.numel > 0),  # the weight and W'
            1 + (self.bn_weight is not None),  # the variance
            self.bn_bias is not None and self.writes_vectors,
            self.prescale,  # q
            self.out_bias * (2 + (self.bias is not None)),  # the mean and b'
        )
        return sum(tensors) if self.writes else 0

    @property
    def written_bytes(self) -> int:
        biases = self.channels * self.out_bias
        return (self.numel + biases) * ITEMSIZE[self.out] + self.channels * ITEMSIZE[POWER] * self.prescale


class Needs(NamedTuple):
    """Which gradients to compute."""

    weight: bool = True
    bias: bool = True
    bn_weight: bool = True
    bn_bias: bool = True


@dataclass(frozen=True)
class GradSpec:
    """The spec of one fold's backward.

    Attributes:
        pair: The spec of the fold.
        grad_weight, grad_bias: Dtypes of dW' and db'; None if there is no such gradient.
        grad_last: dW' is channels_last.
        needs: The gradients to write.
        bias_rows: db' is given as this many rows, to be summed.
    """

    pair: PairSpec
    grad_weight: str | None
    grad_bias: str | None
    grad_last: bool
    needs: Needs
    bias_rows: int = 1

    def __post_init__(self) -> None:
        pair, needs = self.pair, self.needs
        absent = [
            name
            for name, wanted, possible in (
                ("weight", needs.weight, self.grad_weight),
                ("bias", needs.bias, self.grad_bias and pair.bias),
                ("bn_weight", needs.bn_weight, (self.grad_weight or self.grad_bias) and pair.bn_weight),
                ("bn_bias", needs.bn_bias, self.grad_bias and pair.bn_bias),
            )
            if wanted and not possible
        ]
        if absent:
            raise ValueError(f"no gradient reaches {', '.join(absent)}")

    def describe(self) -> str:
        return self.pair.describe()

    @property
    def compute(self) -> str:
        return "fp64" if "fp64" in (self.pair.compute, self.grad_weight, self.grad_bias) else "fp32"

    @property
    def reads_weight_grad(self) -> bool:
        return self.grad_weight is not None and self.pair.numel > 0 and (self.needs.weight or self.needs.bn_weight)

    @property
    def reads_bias_grad(self) -> bool:
        return self.grad_bias is not None and (self.needs.bias or self.needs.bn_weight or self.needs.bn_bias)

    @property
    def arguments(self) -> int:
        """Return the number of kernel arguments of this pair, one for each tensor."""
        pair, needs = self.pair, self.needs
        scaled = needs.weight or needs.bias
        tensors = (
            self.reads_weight_grad * (1 + needs.weight + needs.bn_weight),  # dW', dW, the weight
            self.reads_bias_grad * (1 + needs.bn_weight * (1 + (pair.bias is not None))),  # db', the mean, the bias
            scaled and pair.bn_weight is not None,
            scaled or needs.bn_weight,  # the variance
            pair.prescale and any(needs),
            sum(needs[1:]),  # the gradients of vectors
        )
        writes = any((needs.weight and pair.numel, *needs[1:]))
        return sum(tensors) if pair.channels and writes else 0

    @property
    def written_bytes(self) -> int:
        pair, needs = self.pair, self.needs
        size = pair.numel * ITEMSIZE[pair.weight] * needs.weight
        for dtype, wanted in (
            (pair.bias, needs.bias),
            (pair.bn_weight, needs.bn_weight),
            (pair.bn_bias, needs.bn_bias),
        ):
            if wanted and dtype is not None:
                size += pair.channels * ITEMSIZE[dtype]
        return size


def backward_of(spec: PairSpec, needs: Needs | None = None, grad_last: bool | None = None) -> GradSpec:
    """Return the backward spec of a pair whose gradients have the dtype and layout of the fold's outputs."""
    wanted = needs or Needs(True, spec.bias is not None, spec.bn_weight is not None, spec.bn_bias is not None)
    return GradSpec(spec, spec.out, spec.out, spec.out_last if grad_last is None else grad_last, wanted)
