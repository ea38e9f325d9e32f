"""Plans: which kernels a call of an operator launches, and with which tensors.

Computing the specs of 16 pairs takes longer than folding them. So a plan is made once and reused for every later call
whose tensors have the same metadata.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from ..kernels import tuned_files
from ..kernels.inputs import (
    OUTPUTS,
    POWER_DTYPE,
    FoldInputs,
    Unsupported,
    check_power,
    device_of,
    grad_spec_of,
    is_channels_last,
    spec_of,
)
from ..kernels.kernel_source import KernelSource
from ..kernels.launch import on, run
from ..kernels.spec import GradSpec, Needs
from ..kernels.tuned import kernels_for
from .packed_pairs import PackedPairs, grad_pairs, needs_of

# Inductor's code uses these too. 48 tensors take 17 us, and 45 us with torch.empty_like (CPU).
_EMPTY = {kind: getattr(torch._C._dynamo.guards, f"_empty_strided_{kind}") for kind in ("cpu", "cuda", "xpu")}


@dataclass(frozen=True)
class Plan:
    """The launches of a call. Tensors are given by position, outputs after inputs. A plan holds no tensor.

    Attributes:
        device: The device of the tensors.
        reasons: Why the kernels cannot take the group. The other fields are empty then.
        strided: Positions of tensors to make contiguous first.
        outputs: Size, strides and dtype of each output.
        launches: Each kernel, with a function that picks its arguments from the tensors.
    """

    device: torch.device
    reasons: tuple[str, ...] = ()
    strided: tuple[int, ...] = ()
    outputs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...] = ()
    launches: tuple[tuple[KernelSource, Callable[[list[Tensor]], Any]], ...] = ()

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the outputs, computed on the device and its current stream."""
        empty = _EMPTY[self.device.type]
        with on(self.device):
            outputs = [empty(*output) for output in self.outputs]
            for at in self.strided:
                tensors[at] = tensors[at].contiguous()
            tensors += outputs
            for source, arguments in self.launches:
                run(source, arguments(tensors), self.device)
        return outputs


# -- making plans ---------------------------------------------------------------------------------------------------


def plan_fold(*args: Any) -> Plan:
    """Return the plan of `triton_convbn::fold`. Its tensors are weights, then vectors."""
    packed = PackedPairs(*args)
    pairs = packed.unpack()
    specs, reasons = _described(spec_of, [(pair,) for pair in pairs])
    if reasons := reasons or _several_devices(pairs):
        return Plan(pairs[0].weight.device, tuple(reasons))
    positions, end = _positions(packed, count())
    outputs: list[Tensor] = []
    for pair in pairs:
        dtype, layout = pair.out_dtype or pair.weight.dtype, pair.memory_format or torch.preserve_format
        outputs += [like(pair.weight, dtype=dtype, memory_format=layout), like(pair.running_mean, dtype=dtype)]
    outputs += [like(pair.running_mean, dtype=POWER_DTYPE) for pair in pairs if pair.prescale]
    for at, outs in zip(positions, packed.by_pair(range(end, end + len(outputs))), strict=True):
        at.update(zip(OUTPUTS, outs, strict=True))
    device = device_of(pairs)
    return Plan(device, outputs=tuple(map(looks, outputs)), launches=launches_of(kernels_for(specs, device), positions))


def plan_fold_backward(
    grads: Sequence[Tensor], given: Sequence[int], wanted: Sequence[int], powers: Sequence[Tensor], *args: Any
) -> Plan:
    """Return the plan of `triton_convbn::fold_backward`. Its tensors are gradients, powers of two, weights, vectors.

    Raises:
        ValueError: Powers of two are missing or have a wrong shape, or no gradient reaches a wanted one.
    """
    packed = PackedPairs(*args)
    pairs = packed.unpack()
    needs = needs_of(wanted)
    arrived = grad_pairs(list(map(dense, grads)), given)
    each = [(pair, *grad, need) for pair, grad, need in zip(pairs, arrived, needs, strict=True)]
    specs, reasons = _described(_grad_spec, each)
    if reasons := reasons or _several_devices(pairs):
        return Plan(pairs[0].weight.device, tuple(reasons))
    for pair, power, spec, need in zip(pairs, packed.each_power(powers), specs, needs, strict=True):
        check_power(pair, power)
        if spec.needs != need:
            raise ValueError(f"of {need} only {spec.needs} is reached by a gradient")
    numbers = count()
    at_grads = grad_pairs([next(numbers) for _ in grads], given)
    at_powers = packed.each_power([next(numbers) for _ in powers])
    positions, end = _positions(packed, numbers)
    outputs: list[Tensor] = []
    for pair, at, grad, power, need in zip(pairs, positions, at_grads, at_powers, needs, strict=True):
        at |= {"grad_weight": grad[0], "grad_bias": grad[1], "power": power}
        for field in (field for field, wants in need._asdict().items() if wants):
            at[f"d_{field}"] = end + len(outputs)
            outputs.append(like(getattr(pair, field)))
    device = device_of(pairs)
    return Plan(
        device,
        strided=tuple(at for at, grad in enumerate(grads) if dense(grad) is not grad),
        outputs=tuple(map(looks, outputs)),
        launches=launches_of(kernels_for(specs, device), positions),
    )


def _described(describe: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> tuple[tuple[Any, ...], list[str]]:
    """Return the specs of the supported pairs, and the reasons of the others."""
    specs, reasons = [], []
    for arguments in calls:
        try:
            specs.append(describe(*arguments))
        except Unsupported as error:
            reasons.append(str(error))
    return tuple(specs), reasons


def _grad_spec(pair: FoldInputs, grad_weight: Tensor | None, grad_bias: Tensor | None, needs: Needs) -> GradSpec:
    for grad in (grad_weight, grad_bias):
        if grad is not None and grad.device != pair.weight.device:
            raise Unsupported(f"a gradient on {grad.device}, parameters on {pair.weight.device}")
    return grad_spec_of(pair, grad_weight, grad_bias, needs)


def _several_devices(pairs: Sequence[FoldInputs]) -> list[str]:
    try:
        device_of(pairs)
    except Unsupported as error:
        return [str(error)]
    return []


def _positions(packed: PackedPairs, numbers: Iterator[int]) -> tuple[list[dict[str, Any]], int]:
    """Return the fields of each pair with positions instead of tensors, and the position after the last."""
    weights, vectors = ([next(numbers) for _ in tensors] for tensors in packed[:2])
    return [pair._asdict() for pair in PackedPairs(weights, vectors, *packed[2:]).unpack()], next(numbers)


def launches_of(
    kernels: Iterable[tuple[slice, KernelSource]], positions: list[dict[str, Any]]
) -> tuple[tuple[KernelSource, Callable[[list[Tensor]], Any]], ...]:
    """Return the launches of kernels, each with the slice of pairs or sums that it computes, see `Plan`."""
    found = []
    for part, source in kernels:
        arguments = [positions[part][argument.pair][argument.field] for argument in source.arguments]
        if source.programs:
            found.append((source, itemgetter(*arguments)))
    return tuple(found)


def like(tensor: Tensor, **options: Any) -> Tensor:
    """Return a meta tensor like the given one."""
    return torch.empty_like(tensor, device="meta", **options)


def looks(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    """Return the sizes, the strides and the dtype of a tensor."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def dense(grad: Tensor) -> Tensor:
    """Return dW' or db' as the kernel reads it: made contiguous if it is a slice or expanded."""
    return grad.contiguous() if is_channels_last(grad) is None else grad


# -- reusing plans --------------------------------------------------------------------------------------------

_SHAPE, _DTYPE, _DEVICE = attrgetter("shape"), attrgetter("dtype"), attrgetter("device")


def planned_fold(*args: Any) -> Plan:
    """Return what `plan_fold` does, or the plan of an earlier call whose tensors have the same metadata.

    The metadata are shape, strides, dtype and device. Tensors must be strided and not lazily negated, which the
    dispatcher ensures for kernels of a backend.
    """
    return reuse_plan(plan_fold, args, [*args[0]], args[1], args[2:])


def planned_fold_backward(*args: Any) -> Plan:
    """Return what `plan_fold_backward` does, or the plan of an earlier call whose tensors have the same metadata."""
    grads, given, wanted, powers, weights, vectors, *static = args
    return reuse_plan(plan_fold_backward, args, [*grads, *weights], [*powers, *vectors], (given, wanted, *static))


def reuse_plan(
    make: Callable[..., Plan],
    args: tuple[Any, ...],
    weights: list[Tensor],
    vectors: list[Tensor],
    static: Sequence[list[Any]],
) -> Plan:
    """Return the plan of calls like this one. `make` makes it from the arguments for the first of them.

    Args:
        make: The function that makes a plan. It is a part of the key.
        args: The arguments of the call, lists of tensors and of others.
        weights: The tensors whose shapes, dtypes, devices and strides decide the plan.
        vectors: Those of which only being contiguous counts instead of the strides.
        static: The lists of what is no tensor.
    """
    # One map for each attribute runs in C and takes half the time of one loop over tensors. The lengths make the key
    # unambiguous.
    tensors = weights + vectors
    key = (
        make,
        *map(len, args),
        *map(_SHAPE, tensors),
        *map(_DTYPE, tensors),
        *map(_DEVICE, tensors),
        *map(Tensor.stride, weights),
        *map(Tensor.is_contiguous, vectors),
        *map(tuple, static),
    )
    place = _place(key)
    if not place:
        place.append(make(*args))
    return place[0]


@lru_cache(maxsize=1024)
def _place(key: tuple[Any, ...]) -> list[Plan]:
    """Return the list that holds the plan of a key, empty at first. `lru_cache` gives it a bound and a lock."""
    return []


tuned_files.when_forgotten.append(_place.cache_clear)
