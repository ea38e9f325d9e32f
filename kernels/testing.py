"""The fp64 oracle of the fold and its gradients: exact results, one error metric, guarded outputs.

Tests, the tuner and the GPU benchmarks compare with it. It is written out in fp64 torch, apart from `ops.reference`,
and a test compares the two. Errors are counted in ulps of the written dtype (eps times the exact magnitude), beyond
what the kernel's own arithmetic may lose where terms cancel or are summed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import DTYPES, FoldInputs
from .spec import Needs

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

# fp32 and fp64: five roundings (var + eps, rsqrt, two products, a quotient). PTX allows rsqrt 1.07 eps, so that 2 ulps
# failed 9 of 32 random fp32 cases on a GPU. fp16 and bf16 would be 1/2, but Triton's interpreter truncates to bf16.
MAX_ULPS = {torch.float32: 3.0, torch.float16: 1.0, torch.bfloat16: 1.0, torch.float64: 4.0}

GUARD = 64
SENTINEL = 7.0


class Exact(NamedTuple):
    """An exact result in fp64, and the absolute error that the arithmetic may add to the rounding of the output."""

    value: Tensor
    slack: Tensor


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Return eps * |magnitude|, at least the smallest subnormal of `dtype`."""
    info = torch.finfo(dtype)
    return info.eps * magnitude.abs().clamp(min=info.tiny)


def errors_in_ulps(found: Tensor, exact: Exact) -> Tensor:
    """Return the error of each element in ulps of `found`'s dtype, beyond the slack. NaN where `found` is NaN."""
    error = (found.detach().to(exact.value.device).double() - exact.value).abs() - exact.slack
    return error.clamp(min=0) / ulp(exact.value, found.dtype)


def out_of_bounds(found: Tensor, exact: Exact) -> Tensor:
    """Return a mask of the elements with a larger error than MAX_ULPS; NaN counts."""
    return ~(errors_in_ulps(found, exact) <= MAX_ULPS[found.dtype])


def compute_dtype(inputs: FoldInputs, *grads: Tensor | None) -> torch.dtype:
    """Return the dtype that the kernels compute in: fp64 if any tensor is fp64, else fp32."""
    dtypes = {inputs.out_dtype, *(t.dtype for t in (*inputs[:6], *grads) if isinstance(t, Tensor))}
    return torch.float64 if torch.float64 in dtypes else torch.float32


# ---- exact results -------------------------------------------------------------------------------------------------


def expand_channels(values: Tensor, inputs: FoldInputs) -> Tensor:
    """Broadcast values of shape [C_out] to the weight's shape."""
    shape = inputs.weight.shape
    kernel = (1,) * (len(shape) - 2)
    if not inputs.transposed:
        return values.view(-1, 1, *kernel).expand(shape)
    by_group = values.view(inputs.groups, 1, shape[1], *kernel)
    return by_group.expand(inputs.groups, shape[0] // inputs.groups, *shape[1:]).reshape(shape)


def fold_fp64(inputs: FoldInputs, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return W' and b' in fp64, divided by the powers of two `q` if given: s = gamma / sqrt(var + eps), W' = W * s,
    b' = (b - mean) * s + beta. Differentiable."""
    weight, bias, gamma, beta, mean, var = (None if t is None else t.double() for t in inputs[:6])
    assert weight is not None
    assert mean is not None
    assert var is not None
    divisor = torch.ones_like(var) if q is None else q.double()
    scale = torch.rsqrt(var + inputs.eps) / divisor
    scale = scale if gamma is None else gamma * scale
    centred = -mean if bias is None else bias - mean
    shift = torch.zeros_like(scale) if beta is None else beta / divisor
    return weight * expand_channels(scale, inputs), centred * scale + shift


def _absolute(inputs: FoldInputs) -> FoldInputs:
    """Return the pair whose fold and gradients sum the magnitudes of the terms: nothing cancels in |b| - -|mean|."""
    absolute: dict[str, Any] = {
        name: t.detach().double().abs() for name, t in inputs._asdict().items() if isinstance(t, Tensor)
    }
    return inputs._replace(**absolute | {"running_mean": -absolute["running_mean"]})


def exact_fold(inputs: FoldInputs, q: Tensor | None = None) -> tuple[Exact, Exact]:
    """Return W' and b', divided by `q` if given. b' has slack, as (b - mean) * s and beta may cancel."""
    with torch.no_grad():
        weight, bias = fold_fp64(inputs, q)
        dtype = compute_dtype(inputs)
        slack = MAX_ULPS[dtype] * ulp(fold_fp64(_absolute(inputs), q)[1], dtype)
    return Exact(weight, torch.zeros_like(weight)), Exact(bias, slack)


def exact_gradients(
    inputs: FoldInputs, grad_weight: Tensor | None, grad_bias: Tensor | None, q: Tensor | None = None
) -> dict[str, Exact]:
    """Return the gradients of the parameters that are there, by the names in `Needs`; zero where none arrives.

    grad_weight, grad_bias: of W' and b', divided by `q` if given. grad_bias may have rows, [rows, C_out], to be summed.
    """
    rows = grad_bias.shape[0] if grad_bias is not None and grad_bias.ndim == 2 else 1
    dtype = compute_dtype(inputs, grad_weight, grad_bias)
    eps = torch.finfo(dtype).eps
    values = _gradients(inputs, grad_weight, grad_bias, q)
    size_weight, size_bias = (None if grad is None else grad.abs() for grad in (grad_weight, grad_bias))
    terms = _gradients(_absolute(inputs), size_weight, size_bias, q)
    # A sum of n terms in any order is off by at most (n - 1) * eps / 2 of their magnitudes. A lane adds every 32nd or
    # fewer elements of a channel, then a tree adds the lanes. 32 covers the tree and the products.
    elements = inputs.weight.numel() / max(1, inputs.running_mean.numel())
    chain = {"weight": 0.0, "bias": rows, "bn_weight": elements / 32 + rows + 32, "bn_bias": rows}
    return {
        name: Exact(value, MAX_ULPS[dtype] * eps * value.abs() + chain[name] * eps / 2 * terms[name])
        for name, value in values.items()
    }


def _gradients(
    inputs: FoldInputs, grad_weight: Tensor | None, grad_bias: Tensor | None, q: Tensor | None
) -> dict[str, Tensor]:
    leaves = {
        name: t.detach().double().requires_grad_() for name in Needs._fields if (t := getattr(inputs, name)) is not None
    }
    weight, bias = fold_fp64(inputs._replace(**leaves), q)
    loss = 0 * weight.sum() + 0 * bias.sum()
    if grad_weight is not None:
        loss = loss + (weight * grad_weight.double()).sum()
    if grad_bias is not None:
        loss = loss + (bias * grad_bias.double().sum_to_size(bias.shape)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def wrong_powers(inputs: FoldInputs, q: Tensor) -> Tensor:
    """Return a mask of the channels whose q is no power of two or not the smallest with |s / q| <= 1/2 and
    |beta / q| <= 1024, clamped to [2**-14, 2**15]."""
    exact = q.double()
    mantissa, exponent = torch.frexp(exact)
    scale = torch.rsqrt(inputs.running_var.double() + inputs.eps)
    scale = (scale if inputs.bn_weight is None else scale * inputs.bn_weight.double()).abs()
    beta = torch.zeros_like(scale) if inputs.bn_bias is None else inputs.bn_bias.double().abs()
    near = 1 + 1e-6  # at a power of two, rounding decides
    fits = (scale <= exact / 2 * near) & (beta <= exact * 1024 * near) | (exact == 2**15)
    smallest = (scale * near > exact / 4) | (beta * near > exact * 512) | (exact == 2**-14)
    return ~((mantissa == 0.5) & (exponent >= -13) & (exponent <= 16) & fits & smallest)


# ---- guarded outputs ----------------------------------------------------------------------------------------------


class Guarded(NamedTuple):
    """A tensor full of NaN between two guard bands of one buffer."""

    tensor: Tensor
    buffer: Tensor

    @classmethod
    def like(
        cls, like: Tensor, dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None
    ) -> Guarded:
        """Return one with the shape of `like`, in its strides unless `memory_format` is given."""
        shape = torch.empty_like(like, device="meta", memory_format=memory_format or torch.preserve_format)
        buffer = torch.full((like.numel() + 2 * GUARD,), SENTINEL, dtype=dtype or like.dtype, device=like.device)
        buffer[GUARD : GUARD + like.numel()] = math.nan
        return cls(buffer.as_strided(shape.shape, shape.stride(), GUARD), buffer)

    def intact(self) -> bool:
        """Return True if nothing was written to the guard bands."""
        return bool((self.buffer[:GUARD] == SENTINEL).all() and (self.buffer[-GUARD:] == SENTINEL).all())
