"""What the GPU check holds values against: pairs, their fold and gradients, and the same in fp64.

The reference is the algebra in fp64, on the CPU. An error is counted in ulps (eps times the exact magnitude) of the
dtype that is written, beyond what the arithmetic itself may lose where terms cancel.
"""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton_convbn.kernels.inputs import DTYPES, FoldInputs
from triton_convbn.kernels.offline_cases import DTYPE_MIXES

from triton_convbn.ops import reference
from triton_convbn.ops.library import fold_op
from triton_convbn.ops.packed_pairs import PackedPairs

from .gpu_bench import by_kernel
from .report import Report
from .table import Key

# Allowed error in ulps. fp32 and fp64: five roundings, one of them a GPU's rsqrt, which PTX allows 1.07 eps. At 2 and 1
# a correctly rounded fold failed 9 and 32 of 32 random cases.
ULPS = {torch.float32: 3.0, torch.float16: 1.0, torch.bfloat16: 1.0, torch.float64: 4.0}

# (weight and conv bias, BatchNorm, output)
MIXES = DTYPE_MIXES | {
    "fp16_bn_fp32": ("fp16", "fp32", "fp16"),
    "fp32_to_bf16": ("fp32", "fp32", "bf16"),
    "bf16_bn_fp64": ("bf16", "fp64", "bf16"),
    "fp16_bn_bf16_to_fp32": ("fp16", "bf16", "fp32"),
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

OUTPUTS = ("folded weight", "folded bias", "power")
FIELDS = ("weight", "bias", "bn_weight", "bn_bias")
Grads = tuple[Tensor, Tensor]


class Kind(NamedTuple):
    """rows and cols are multiplied on a GPU, where tensors can be larger."""

    rows: int
    cols: int
    kernel: tuple[int, ...] = ()
    transposed: bool = False
    groups: int = 1


KINDS = {
    "conv": Kind(9, 5, (3, 3)),
    "depthwise": Kind(12, 0, (3, 3)),
    "linear": Kind(10, 13),
    "transposed_groups": Kind(6, 3, (3, 3), transposed=True, groups=3),
}
GROUP = (Kind(8, 3, (3, 3)), Kind(8, 8, (1, 1)), Kind(16, 8, (3, 3)), Kind(5, 16))


def make(kind: Kind, mix: str, device: torch.device, scale: int = 1, last: bool = False, seed: int = 0) -> FoldInputs:
    """A pair with every parameter, of random values that depend on the seed alone. In fp16 it has prescale."""
    generator = torch.Generator().manual_seed(seed)
    weight_dtype, bn_dtype, out_dtype = (TORCH_DTYPES[name] for name in MIXES[mix])
    rows, cols = kind.rows * scale, max(1, kind.cols * scale)
    channels = cols * kind.groups if kind.transposed else rows

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    weight = normal(rows, cols, *kind.kernel, dtype=weight_dtype)
    if last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    bias, gamma, beta, mean = (normal(channels, dtype=d) for d in (weight_dtype, *[bn_dtype] * 3))
    var = torch.empty(channels, dtype=torch.float64).uniform_(-4, 4, generator=generator).exp().to(device, bn_dtype)
    static: Any = 1e-3, kind.transposed, kind.groups, out_dtype
    return FoldInputs(weight, bias, gamma, beta, mean, var, *static, prescale=out_dtype == torch.float16)


def make_grads(pair: FoldInputs, seed: int = 0) -> Grads:
    """dW' and db', in the layout and dtype of the fold's outputs."""
    generator = torch.Generator().manual_seed(1000 + seed)
    dtype = pair.out_dtype or pair.weight.dtype

    def like(tensor: Tensor) -> Tensor:
        values = torch.randn(tensor.shape, generator=generator)
        return torch.empty_like(tensor, dtype=dtype).copy_(values)

    return like(pair.weight), like(pair.running_mean)


def fold_and_gradients(pair: FoldInputs, grads: Grads, kernel: bool = True) -> dict[str, Tensor]:
    """Return everything that the operator and its backward compute. kernel: nothing else may compute it."""
    leaves = [t.detach().requires_grad_() for t in pair[:4] if t is not None]
    with by_kernel() if kernel else nullcontext():
        folded = fold_op(*PackedPairs.pack([FoldInputs(*leaves, *pair[4:])]))
        gradients = torch.autograd.grad(folded[:2], leaves, grads)
    found = {name: out.detach() for name, out in zip(OUTPUTS, folded, strict=False)}
    return found | dict(zip(FIELDS, gradients, strict=True))


def exact_values(pair: FoldInputs, grads: Grads, power: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same in fp64 on the CPU; and how far the arithmetic may be off by itself, where that is more than ulps.

    power: what a fold with prescale is over. Which powers of two a kernel takes is its own affair.
    """
    wide = (
        torch.float64
        if any(t is not None and t.dtype == torch.float64 for t in (*pair[:6], grads[0]))
        else torch.float32
    )
    eps = torch.finfo(wide).eps
    weight, bias, gamma, beta, mean, var = (t.detach().cpu().double() for t in pair[:6] if t is not None)
    grad_weight, grad_bias = (grad.cpu().double() for grad in grads)
    static: dict[str, Any] = {"transposed": pair.transposed, "groups": pair.groups}
    leaves = [t.requires_grad_() for t in (weight, bias, gamma, beta)]
    q = torch.ones_like(mean) if power is None else power.cpu().double()
    folded = reference.fold_reference(weight, bias, gamma / q, beta / q, mean, var, pair.eps, **static)
    gradients = torch.autograd.grad(folded, leaves, (grad_weight, grad_bias))
    with torch.no_grad():
        terms = (((bias - mean) * gamma * torch.rsqrt(var + pair.eps)).abs() + beta.abs()) / q
        magnitude = reference.fold_backward_reference(
            grad_weight.abs(), grad_bias.abs(), weight.abs(), bias.abs() + mean.abs(), torch.ones_like(gamma), None,
            torch.zeros_like(mean), var, pair.eps, **static,
        )[2]  # fmt: skip
        assert magnitude is not None
        exact = {"folded weight": folded[0].detach(), "folded bias": folded[1].detach()}
        exact |= dict(zip(FIELDS, gradients, strict=True))
        # One addition for every 64 or more elements of a channel, then a tree, then the products.
        chain = weight.numel() / gamma.numel() / 64 + 32
        slack = {name: ULPS[wide] * eps * value.abs() for name, value in exact.items() if name in FIELDS}
        slack["folded bias"] = ULPS[wide] * eps * terms
        slack["bn_weight"] = slack["bn_weight"] + chain * eps / 2 * magnitude / q
    return exact, slack


def ulps(found: Tensor, exact: Tensor, slack: Tensor | float = 0.0) -> float:
    """The largest error in ulps of the dtype of `found`; NaN where an element is NaN."""
    info = torch.finfo(found.dtype)
    error = ((found.cpu().double() - exact).abs() - slack).clamp(min=0)
    return (error / (info.eps * exact.abs().clamp(min=info.tiny))).max().item()


def check(report: Report, case: Key, found: dict[str, Tensor], pair: FoldInputs, grads: Grads) -> None:
    """Two rows: the worst of the fold, and the worst of the gradients."""
    exact, slack = exact_values(pair, grads, found.get("power"))
    for mode, metric, names in (
        ("forward", "fold_error", ("folded weight", "folded bias")),
        ("backward", "gradient_error", FIELDS),
    ):
        errors = {name: ulps(found[name], exact[name], slack.get(name, 0.0)) for name in names}
        share = {name: error / ULPS[found[name].dtype] for name, error in errors.items()}
        worst = max(share, key=lambda name: math.inf if math.isnan(share[name]) else share[name])
        limit = ULPS[found[worst].dtype]
        report.checked(case._replace(mode=mode), metric, "ulp", errors[worst], limit, worst)
    if (power := found.get("power")) is not None:
        ours = reference.prescale(pair.bn_weight, pair.bn_bias, pair.running_var, pair.eps)
        off = (torch.log2(power.float()) - torch.log2(ours.float())).abs().max().item()
        report.checked(case._replace(mode="forward"), "headroom_difference", "powers of two", off, 1)
