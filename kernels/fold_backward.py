"""The gradients of a group of folds from dW' and db', in one launch or in as many as were found to be faster.

    dW = dW' * s     db = db' * s     d_beta = db'     d_gamma = ds * rsqrt(running_var + eps)
    ds = sum_over_channel(dW' * W) + db' * (b - running_mean)

(`fold.py` has the forward formulas; with prescale all four are over q.) The device code is templates/fold_backward.py: a
program owns whole channels, there are no atomics, and every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .codegen import KernelConfig
from .fold import kernels_for
from .inputs import POWER_DTYPE, FoldInputs, Unsupported, device_of, grad_spec_of, is_channels_last
from .launch import launch
from .spec import GradSpec, Needs


class FoldGradients(NamedTuple):
    """Gradients of one pair's parameters, each in its parameter's dtype and layout; None where there is none."""

    weight: Tensor | None
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None


def _launch(
    group: Sequence[FoldInputs],
    specs: tuple[GradSpec, ...],
    grads: Sequence[tuple[Tensor | None, Tensor | None]],
    outs: Sequence[FoldGradients],
    config: KernelConfig | None,
    powers: Sequence[Tensor | None] | None,
) -> None:
    device = device_of(group)
    values = []
    powers = [None] * len(group) if powers is None else powers
    for inputs, (grad_weight, grad_bias), out, power in zip(group, grads, outs, powers, strict=True):
        for t in (grad_weight, grad_bias):
            if t is not None and t.device != device:
                raise Unsupported(f"a gradient on {t.device}, parameters on {device}")
        check_power(inputs, power)
        fields: dict[str, Any] = inputs._asdict()
        fields |= {"grad_weight": grad_weight, "grad_bias": grad_bias, "power": power}
        values.append(fields | {f"d_{field}": t for field, t in out._asdict().items()})
    for part, source in kernels_for(specs, device, config):
        launch(source, values[part], device)


def check_power(inputs: FoldInputs, power: Tensor | None) -> None:
    """Raise ValueError unless `power` is what the pair's fold wrote, or None for a pair without prescale."""
    mean = inputs.running_mean
    if not inputs.prescale and power is None:
        return
    if (
        power is None
        or not inputs.prescale
        or (power.shape, power.dtype, power.device) != (mean.shape, POWER_DTYPE, mean.device)
        or not power.is_contiguous()
    ):
        raise ValueError("the powers of two of a pair are those that its fold wrote, if it has prescale")


def launch_fold_backward_into(
    group: Sequence[FoldInputs],
    grads: Sequence[tuple[Tensor | None, Tensor | None]],
    outs: Sequence[FoldGradients],
    config: KernelConfig | None = None,
    powers: Sequence[Tensor | None] | None = None,
) -> None:
    """Like `launch_fold_backward`, into the tensors of `outs`; a None there is a gradient that is not wanted.

    Raises ValueError for an output that does not look like its parameter, or that no given gradient reaches.
    """
    if not group:
        return
    specs = []
    for inputs, (grad_weight, grad_bias), out in zip(group, grads, outs, strict=True):
        needs = Needs(*(t is not None for t in out))
        spec = grad_spec_of(inputs, grad_weight, grad_bias, needs)
        for field, wanted, possible, t in zip(Needs._fields, needs, spec.needs, out, strict=True):
            if wanted and not possible:
                raise ValueError(f"no gradient reaches {field}")
            parameter = getattr(inputs, field)
            if t is not None and not (
                (t.shape, t.dtype, t.device) == (parameter.shape, parameter.dtype, parameter.device)
                and (t.stride() == parameter.stride() or is_channels_last(t) is is_channels_last(parameter) is False)
            ):
                raise ValueError(
                    f"gradient of {field}: {tuple(t.shape)} {t.stride()} {t.dtype} is not like its parameter"
                )
        specs.append(spec)
    _launch(group, tuple(specs), grads, outs, config, powers)


def launch_fold_backward(
    group: Sequence[FoldInputs],
    grads: Sequence[tuple[Tensor | None, Tensor | None]],
    needs: Sequence[Needs] | None = None,
    config: KernelConfig | None = None,
    powers: Sequence[Tensor | None] | None = None,
) -> list[FoldGradients]:
    """Gradients of every pair of `group` on the tensors' device and its current stream.

    grads: (dW', db') a pair, either may be None; dW' of the weight's shape, contiguous or channels_last, db' [C_out] or
    rows [R, C_out] of which it is the sum.
    needs: which gradients to compute, by default all. A gradient that is not needed, whose parameter is None, or that
    nothing reaches is None; nothing is computed, read or written for it. Sums are fp32, or fp64 where anything is.
    config: how the kernels are made; None for what was tuned for the device, see `tuned.choose`.
    powers: of each pair with prescale the q that its fold wrote, a constant here; None for the others.
    Raises Unsupported (a ValueError) for tensors that the kernel does not take.
    """
    if not group:
        return []
    if needs is None:
        needs = [Needs()] * len(group)
    specs, outs = [], []
    for inputs, (grad_weight, grad_bias), wanted in zip(group, grads, needs, strict=True):
        specs.append(grad_spec_of(inputs, grad_weight, grad_bias, Needs(*wanted)))
        outs.append(
            FoldGradients(
                *(
                    torch.empty_like(getattr(inputs, field), memory_format=torch.preserve_format) if write else None
                    for field, write in zip(Needs._fields, specs[-1].needs, strict=True)
                )
            )
        )
    _launch(group, tuple(specs), grads, outs, config, powers)
    return outs
