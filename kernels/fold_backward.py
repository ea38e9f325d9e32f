"""The gradients of a group of folds in one launch, from dW' and db'.

    dW = dW' * s     db = db' * s     d_beta = db'     d_gamma = ds * rsqrt(running_var + eps)
    ds = sum_over_channel(dW' * W) + db' * (b - running_mean)

(`fold.py` has the forward algebra.) The device code is template_fold_backward.py: a program owns whole channels, there
are no atomics, and every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .fold import _one_device
from .generate import DEFAULT_CONFIG, KernelConfig, generate_fold_backward
from .inputs import FoldInputs, Unsupported, grad_spec_of, is_channels_last
from .launch import launch
from .spec import Needs


class FoldGradients(NamedTuple):
    """Gradients of one pair's parameters, each in its parameter's dtype and layout; None where there is none."""

    weight: Tensor | None
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None


def fold_backward_into(
    group: Sequence[FoldInputs],
    grads: Sequence[tuple[Tensor | None, Tensor | None]],
    outs: Sequence[FoldGradients],
    config: KernelConfig = DEFAULT_CONFIG,
) -> None:
    """Like `fold_backward`, into the tensors of `outs`; a None there is a gradient that is not wanted.

    Raises ValueError for an output that does not look like its parameter, or that no given gradient reaches.
    """
    if not group:
        return
    device = _one_device(group)
    specs, values = [], []
    for inputs, (grad_weight, grad_bias), out in zip(group, grads, outs, strict=True):
        needs = Needs(*(t is not None for t in out))
        spec = grad_spec_of(inputs, grad_weight, grad_bias, needs)
        for t in (grad_weight, grad_bias):
            if t is not None and t.device != device:
                raise Unsupported(f"a gradient on {t.device}, parameters on {device}")
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
        values.append(
            {
                "grad_weight": grad_weight,
                "grad_bias": grad_bias,
                "weight": inputs.weight,
                "bias": inputs.bias,
                "bn_weight": inputs.bn_weight,
                "running_mean": inputs.running_mean,
                "running_var": inputs.running_var,
                "eps": float(inputs.eps),
                **{f"d_{field}": t for field, t in zip(Needs._fields, out, strict=True)},
            }
        )
    launch(generate_fold_backward(tuple(specs), config), values, device)


def fold_backward(
    group: Sequence[FoldInputs],
    grads: Sequence[tuple[Tensor | None, Tensor | None]],
    needs: Sequence[Needs] | None = None,
    config: KernelConfig = DEFAULT_CONFIG,
) -> list[FoldGradients]:
    """Gradients of every pair of `group` in one launch on the tensors' device and its current stream.

    grads: (dW', db') a pair, either may be None; dW' of the weight's shape, contiguous or channels_last, db' [C_out].
    needs: which gradients to compute, by default all. A gradient that is not needed, whose parameter is None, or that
    nothing reaches is None; nothing is computed, read or written for it. Sums are fp32, or fp64 where anything is.
    Raises Unsupported (a ValueError) for tensors that the kernel does not take, GroupTooLarge for too many pairs.
    """
    if needs is None:
        needs = [Needs()] * len(group)
    outs = []
    for inputs, (grad_weight, grad_bias), wanted in zip(group, grads, needs, strict=True):
        possible = grad_spec_of(inputs, grad_weight, grad_bias, Needs(*wanted)).needs
        outs.append(
            FoldGradients(
                *(
                    torch.empty_like(getattr(inputs, field), memory_format=torch.preserve_format) if write else None
                    for field, write in zip(Needs._fields, possible, strict=True)
                )
            )
        )
    fold_backward_into(group, grads, outs, config)
    return outs
