"""Launch the gradients of a group of folds: one launch, or several if the tuned configuration splits it.

    dW = dW' * s     db = db' * s     d_bn_bias = db'     d_bn_weight = ds * rsqrt(running_var + eps)
    ds = sum_over_channel(dW' * W) + db' * (b - running_mean)

See `fold.py` for the forward. With prescale all four gradients are divided by q. The device code is
templates/fold_backward.py: a program owns whole channels, so there are no atomics and results are deterministic.
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
    """Gradients of one pair, each in its parameter's dtype and layout, or None."""

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
    """Raise ValueError unless `power` can be the q of this pair: a tensor with prescale, None without."""
    mean = inputs.running_mean
    if not inputs.prescale and power is None:
        return
    if (
        power is None
        or not inputs.prescale
        or (power.shape, power.dtype, power.device) != (mean.shape, POWER_DTYPE, mean.device)
        or not power.is_contiguous()
    ):
        raise ValueError(
            "a pair with prescale needs the powers of two that its fold returned, any other pair needs None"
        )


def launch_fold_backward_into(
    group: Sequence[FoldInputs],
    grads: Sequence[tuple[Tensor | None, Tensor | None]],
    outs: Sequence[FoldGradients],
    config: KernelConfig | None = None,
    powers: Sequence[Tensor | None] | None = None,
) -> None:
    """Like `launch_fold_backward`, but write to `outs`. A None in it is a gradient that is not needed.

    Raises:
        ValueError: An output differs from its parameter in shape, dtype, device or layout, or no gradient reaches it.
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
    """Compute the gradients of every pair of `group` on the tensors' device and its current stream.

    Sums are in fp32, or in fp64 if any tensor is fp64.

    Args:
        group: The pairs.
        grads: (dW', db') for each pair; either may be None. dW' has the weight's shape and is contiguous or
            channels_last. db' is [C_out], or [R, C_out] if its rows are still to be summed.
        needs: The gradients to compute. None: all.
        config: The configuration of the kernels. None: what was tuned for the device, see `tuned.choose`.
        powers: For each pair with prescale the q that its fold returned, a constant here; None for others.

    Returns:
        The gradients of each pair. A gradient is None if it is not needed, its parameter is None, or no given gradient
        reaches it. Nothing is computed for it then.

    Raises:
        Unsupported: The kernels cannot take these tensors.
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
