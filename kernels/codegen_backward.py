"""Generate the text of the kernel for the gradients of a group of folds (device code: templates/fold_backward.py)."""

from __future__ import annotations

import functools

from .config import DEFAULT_CONFIG, KernelConfig
from .kernel_source import Argument, KernelSource, assemble, call, cdiv, offset_type, power_of_two
from .spec import ITEMSIZE, POWER, GradSpec
from .tree import Leaf, Names


def _tile(spec: GradSpec, config: KernelConfig) -> tuple[int, int]:
    """Return (channels, elements of each channel) that a program holds at a time. Both are powers of two.

    Their product is at most `config.block` for 16-bit weights and gradients, half of it for fp32 and a quarter for
    fp64, which is one 16-byte load a thread. With twice that, ResNet-50's last 16 fp32 pairs took 72 registers on sm_75
    instead of 64. If the elements of a channel are contiguous, the tile holds as many of them as fit. If channels
    alternate in memory (transposed convolutions), it holds enough channels for 32 neighbouring elements, so that a warp
    reads whole cache lines. `config.rows` bounds the channels of all other tiles.
    """
    pair = spec.pair
    block = max(1, 2 * config.block // max(ITEMSIZE[pair.weight], ITEMSIZE[spec.grad_weight or pair.weight]))
    per_channel = pair.numel // pair.channels
    where = pair.channel_map(pair.weight_last)
    if where.inner not in (1, per_channel):
        # Triton 3.6 gives each thread of such a tile the addresses of 8 columns instead of 2. With the whole block a
        # transposed convolution in fp16 takes 70 registers on sm_90, with half of it 42. With Triton 3.8: 48 and 32
        # (compiled offline).
        block = min(block, max(1, config.block // 2))
    rows = 1 if where.inner == per_channel else min(power_of_two(cdiv(32, max(1, where.inner))), block)
    cols = min(power_of_two(per_channel), block // rows)
    most = min(block // cols, power_of_two(pair.channels))
    return most if config.rows is None else min(most, max(config.rows, rows)), cols


def _backward_leaf(index: int, spec: GradSpec, config: KernelConfig) -> tuple[Leaf, list[Argument]]:
    """Return the body of one pair: each program computes the gradients of ROWS channels."""
    pair, needs = spec.pair, spec.needs
    numel, channels = pair.numel, pair.channels
    grad_weight = spec.grad_weight if spec.reads_weight_grad else None
    grad_bias = spec.grad_bias if spec.reads_bias_grad else None
    scaled = needs.weight or needs.bias
    fields = {
        "grad_weight": (grad_weight, numel, "read"),
        "grad_bias": (grad_bias, channels * spec.bias_rows, "read"),
        "weight": (pair.weight if grad_weight and needs.bn_weight else None, numel, "read"),
        "bias": (pair.bias if grad_bias and needs.bn_weight else None, channels, "read"),
        "bn_weight": (pair.bn_weight if scaled else None, channels, "read"),
        "running_mean": (pair.running_mean if grad_bias and needs.bn_weight else None, channels, "read"),
        "running_var": (pair.running_var if scaled or needs.bn_weight else None, channels, "read"),
        "power": (POWER if pair.prescale and any(needs) else None, channels, "read"),
        "d_weight": (pair.weight if grad_weight and needs.weight else None, numel, "write"),
        "d_bias": (pair.bias if needs.bias else None, channels, "write"),
        "d_bn_weight": (pair.bn_weight if needs.bn_weight else None, channels, "write"),
        "d_bn_bias": (pair.bn_bias if needs.bn_bias else None, channels, "write"),
    }
    arguments = [Argument(index, field, dtype, n, access) for field, (dtype, n, access) in fields.items() if dtype]
    order = (
        "grad_weight", "grad_bias", "weight", "bias", "bn_weight", "running_mean", "running_var",
        "d_weight", "d_bias", "d_bn_weight", "d_bn_bias",
    )  # fmt: skip
    rows, cols = _tile(spec, config)
    bias_cols = min(power_of_two(spec.bias_rows), max(1, config.block // 4 // rows))

    def body(indent: int, names: Names) -> str:
        where = pair.channel_map(pair.weight_last)
        outer, inner = pair.swap(pair.weight_last, spec.grad_last) or (None, None)
        return call(
            indent,
            "fold_backward",
            ["block", *(names.get(field, "None") for field in order if not field.startswith("d_"))],
            [names.get(field, "None") for field in order if field.startswith("d_")],
            {
                "TOTAL": channels,
                "CHANNELS": where.channels,
                "INNER": where.inner,
                "GROUP_SPAN": where.group_span,
                "PER_CHANNEL": numel // channels,
            },
            {
                "EPS": pair.eps,
                "COMPUTE": f"tl.float{spec.compute[2:]}",
                "OFFSET": offset_type(max(numel, channels * spec.bias_rows), rows * max(cols, bias_cols)),
                "ROWS": rows,
                "COLS": cols,
                "PAIR": index,
            },
            {"SWAP_OUTER": outer, "SWAP_INNER": inner},
            {"BIAS_ROWS": spec.bias_rows, "BIAS_COLS": bias_cols} if grad_bias and spec.bias_rows != 1 else {},
            {"power": names.get("power")},
        )

    names = {a.field: a.name for a in arguments}
    read = ITEMSIZE[grad_weight] if grad_weight else 0
    read += ITEMSIZE[pair.weight] if "weight" in names else 0
    per_channel = numel // channels
    at_once = min(rows * cols, rows * per_channel) * read
    return Leaf(index, spec, cdiv(channels, rows), names, body, max(1, cdiv(per_channel, cols)), at_once), arguments


@functools.lru_cache(maxsize=1024)
def generate_fold_backward(specs: tuple[GradSpec, ...], config: KernelConfig = DEFAULT_CONFIG) -> KernelSource:
    """Return the kernel that computes the needed gradients of `specs` in one launch. Skip pairs that need none."""
    parts = [
        _backward_leaf(index, spec, config)
        for index, spec in enumerate(specs)
        if spec.pair.channels and any((spec.needs.weight and spec.pair.numel, *spec.needs[1:]))
    ]
    return assemble("fold_backward", len(specs), parts, config)
