"""Plans of `triton_convbn::merge` and its backward, see `plan`."""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.codegen_merge import generate_merge, generate_merge_backward
from ..kernels.config import DEFAULT_CONFIG, split_launches
from ..kernels.inputs import Unsupported
from ..kernels.kernel_source import KernelSource
from ..kernels.merge_inputs import largest_of, merge_grad_spec_of, merge_spec_of
from ..kernels.merge_spec import MergeGradSpec, MergeSpec
from . import reference
from .plan import Plan, dense, launches_of, like, looks, reuse_plan


class PackedSums(NamedTuple):
    """The arguments of the operators: sums of branches, packed into lists.

    Attributes:
        weights: Those of every sum, one sum after another.
        scales: For each sum [terms, C_out]: a row for each weight, and one more if the input is a term.
        counts: The number of weights of each sum.
        dtypes: The dtype of each merged weight, an index into `reference.FLOATING`.
    """

    weights: list[Any]
    scales: list[Any]
    counts: list[int]
    dtypes: list[int]

    def unpack(self) -> list[tuple[list[Any], Any, torch.dtype]]:
        """Return the weights, the scales and the dtype of each sum."""
        return [
            (own, scales, reference.FLOATING[dtype])
            for own, scales, dtype in zip(self.each(self.weights), self.scales, self.dtypes, strict=True)
        ]

    def each(self, values: Sequence[Any]) -> list[list[Any]]:
        """Split one value for each weight into those of each sum."""
        rest = iter(values)
        return [[next(rest) for _ in range(number)] for number in self.counts]


class Wanted(NamedTuple):
    """The needed gradients of one sum: of each weight, and of all scales."""

    weights: list[bool]
    scales: bool

    @classmethod
    def of(cls, mask: int, weights: int) -> "Wanted":
        """Return the gradients of a mask: bit k for weight k, then a bit for the scales."""
        flags = [bool(mask >> bit & 1) for bit in range(weights + 1)]
        return cls(flags[:-1], flags[-1])

    @property
    def mask(self) -> int:
        return sum(flag << bit for bit, flag in enumerate((*self.weights, self.scales)))


def merge_kernels(
    specs: tuple[MergeSpec, ...] | tuple[MergeGradSpec, ...],
) -> Iterator[tuple[slice, KernelSource]]:
    """Yield the kernels of a call, forward or backward, each with the slice of sums that it computes."""
    for part in split_launches(specs, DEFAULT_CONFIG):
        own: Any = specs[part]
        yield part, generate_merge(own) if isinstance(own[0], MergeSpec) else generate_merge_backward(own)


def fields_of(weights: Sequence[Any], scales: Any) -> dict[str, Any]:
    """Return the arguments that both kernels read, by field."""
    return {"scales": scales} | {f"weight_{k}": weight for k, weight in enumerate(weights)}


def plan_merge(*arguments: Any) -> Plan:
    """Return the plan of `triton_convbn::merge`. Its tensors are weights, then scales."""
    packed = PackedSums(*arguments)
    sums = packed.unpack()
    device = packed.weights[0].device
    try:
        specs = tuple(merge_spec_of(*one) for one in sums)
    except Unsupported as error:
        return Plan(device, (str(error),))
    numbers = count()
    at_weights = packed.each([next(numbers) for _ in packed.weights])
    positions = [fields_of(own, next(numbers)) for own in at_weights]
    outputs = []
    for at, (own, _, dtype) in zip(positions, sums, strict=True):
        at["out"] = next(numbers)
        outputs.append(like(largest_of(own), dtype=dtype))
    return Plan(device, outputs=tuple(map(looks, outputs)), launches=launches_of(merge_kernels(specs), positions))


def plan_merge_backward(grads: Sequence[Tensor], wanted: Sequence[int], *arguments: Any) -> Plan:
    """Return the plan of `triton_convbn::merge_backward`. Its tensors are gradients, weights, scales."""
    packed = PackedSums(*arguments)
    sums = packed.unpack()
    device = packed.weights[0].device
    needs = [Wanted.of(mask, number) for mask, number in zip(wanted, packed.counts, strict=True)]
    try:
        specs = tuple(
            merge_grad_spec_of(merge_spec_of(*one), dense(grad), *need)
            for one, grad, need in zip(sums, grads, needs, strict=True)
        )
        if any(grad.device != device for grad in grads):
            raise Unsupported("a gradient is on another device than the parameters")
    except Unsupported as error:
        return Plan(device, (str(error),))
    numbers = count()
    at_grads = [next(numbers) for _ in grads]
    at_weights = packed.each([next(numbers) for _ in packed.weights])
    positions = [fields_of(own, next(numbers)) for own in at_weights]
    outputs = []
    for at, at_grad, (own, scales, _), need in zip(positions, at_grads, sums, needs, strict=True):
        at["grad"] = at_grad
        for k, weight in enumerate(own):
            if need.weights[k]:
                at[f"d_weight_{k}"] = next(numbers)
                outputs.append(like(weight))
        if need.scales:
            at["d_scales"] = next(numbers)
            outputs.append(like(scales))
    return Plan(
        device,
        strided=tuple(at for at, grad in enumerate(grads) if dense(grad) is not grad),
        outputs=tuple(map(looks, outputs)),
        launches=launches_of(merge_kernels(specs), positions),
    )


def planned_merge(*arguments: Any) -> Plan:
    """Return what `plan_merge` does, or the plan of an earlier call whose tensors have the same metadata."""
    weights, scales, *static = arguments
    return reuse_plan(plan_merge, arguments, [*weights, *scales], [], static)


def planned_merge_backward(*arguments: Any) -> Plan:
    """Return what `plan_merge_backward` does, or the plan of an earlier call whose tensors have the same metadata."""
    grads, wanted, weights, scales, *static = arguments
    return reuse_plan(plan_merge_backward, arguments, [*grads, *weights, *scales], [], (wanted, *static))
