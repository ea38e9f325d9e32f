"""Fold a group of pairs by the generated kernels alone, without an operator and its plans."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton_convbn.kernels.config import KernelConfig
from triton_convbn.kernels.inputs import OUTPUTS, POWER_DTYPE, FoldInputs, device_of, grad_spec_of, spec_of
from triton_convbn.kernels.launch import launch
from triton_convbn.kernels.spec import Needs
from triton_convbn.kernels.tuned import config_for, kernels_of

Folded = tuple[Tensor, ...]
"""(W', b') of one pair, or (W' / q, b' / q, q) with prescale."""


class FoldGradients(NamedTuple):
    """Gradients of one pair, None where not computed."""

    weight: Tensor | None
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None


Grads = Sequence[tuple[Tensor | None, Tensor | None]]


def launch_fold_into(group: Sequence[FoldInputs], outs: Sequence[Folded], config: KernelConfig | None = None) -> None:
    """Fold into the given outputs, by the configuration in force if there is no other."""
    specs, device = tuple(map(spec_of, group)), device_of(group)
    values = [inputs._asdict() | dict(zip(OUTPUTS, out, strict=False)) for inputs, out in zip(group, outs, strict=True)]
    for part, source in kernels_of(specs, config or config_for(specs, device)):
        launch(source, values[part], device)


def launch_fold(group: Sequence[FoldInputs], config: KernelConfig | None = None) -> list[Folded]:
    """Fold into new tensors. A weight keeps its strides unless `memory_format` is set."""
    outs = []
    for inputs in group:
        channels = spec_of(inputs).channels  # may raise, so it precedes the allocation
        dtype = inputs.out_dtype or inputs.weight.dtype
        weight = torch.empty_like(
            inputs.weight, dtype=dtype, memory_format=inputs.memory_format or torch.preserve_format
        )
        powers = [weight.new_empty(channels, dtype=POWER_DTYPE)] * inputs.prescale
        outs.append((weight, weight.new_empty(channels), *powers))
    launch_fold_into(group, outs, config)
    return outs


def launch_fold_backward_into(
    group: Sequence[FoldInputs],
    grads: Grads,
    outs: Sequence[FoldGradients],
    config: KernelConfig | None = None,
    powers: Sequence[Tensor | None] | None = None,
) -> None:
    """Compute the gradients whose outputs are given."""
    powers, device = powers or [None] * len(group), device_of(group)
    specs, values = [], []
    for inputs, (grad_weight, grad_bias), out, power in zip(group, grads, outs, powers, strict=True):
        specs.append(grad_spec_of(inputs, grad_weight, grad_bias, Needs(*(each is not None for each in out))))
        given = {"grad_weight": grad_weight, "grad_bias": grad_bias, "power": power}
        values.append(inputs._asdict() | given | {f"d_{field}": each for field, each in out._asdict().items()})
    for part, source in kernels_of(tuple(specs), config or config_for(specs, device)):
        launch(source, values[part], device)


def launch_fold_backward(
    group: Sequence[FoldInputs],
    grads: Grads,
    config: KernelConfig | None = None,
    powers: Sequence[Tensor | None] | None = None,
) -> list[FoldGradients]:
    """Compute every gradient that a given one reaches, into new tensors like the parameters."""
    outs = []
    for inputs, (grad_weight, grad_bias) in zip(group, grads, strict=True):
        needs = grad_spec_of(inputs, grad_weight, grad_bias, Needs()).needs._asdict()
        parameters = [getattr(inputs, field) if needed else None for field, needed in needs.items()]
        outs.append(FoldGradients(*(None if each is None else torch.empty_like(each) for each in parameters)))
    launch_fold_backward_into(group, grads, outs, config, powers)
    return outs
