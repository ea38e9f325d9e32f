"""Generate the text of the kernel that folds a group of pairs. The device code is templates/fold.py."""

from __future__ import annotations

import functools

from .config import DEFAULT_CONFIG, KernelConfig
from .kernel_source import Argument, KernelSource, assemble, call, cdiv, in_blocks, offset_type
from .spec import ITEMSIZE, POWER, PairSpec
from .tree import Leaf, Names


def _fold_block(pair: PairSpec, config: KernelConfig) -> int:
    """Return the elements of a program: `config.block`, or a quarter of it for fp64, which is a 16-byte load a thread.

    With half of it sm_90 spilled 2 registers, with all of it gfx1100 took 94 (ResNet-50's last 16, compiled offline).
    """
    return max(1, config.block // 4) if "fp64" in (pair.weight, pair.out) else config.block


def _fold_leaf(index: int, pair: PairSpec, config: KernelConfig) -> tuple[Leaf, list[Argument]]:
    """Return the body of one pair: every program folds a block of the weight, the first ones the bias as well."""
    block, numel, channels = _fold_block(pair, config), pair.numel, pair.channels
    fields = {
        "weight": (pair.weight if numel else None, numel, "read"),
        "bias": (pair.bias if pair.out_bias else None, channels, "read"),
        "bn_weight": (pair.bn_weight, channels, "read"),
        "bn_bias": (pair.bn_bias if pair.writes_vectors else None, channels, "read"),
        "running_mean": (pair.running_mean if pair.out_bias else None, channels, "read"),
        "running_var": (pair.running_var, channels, "read"),
        "out_weight": (pair.out if numel else None, numel, "write"),
        "out_bias": (pair.out if pair.out_bias else None, channels, "write"),
        "out_power": (POWER if pair.prescale else None, channels, "write"),
    }
    arguments = [Argument(index, field, dtype, n, access) for field, (dtype, n, access) in fields.items() if dtype]
    compute = f"tl.float{pair.compute[2:]}"
    weight_blocks, bias_blocks = cdiv(numel, block), cdiv(channels, block) if pair.writes_vectors else 0

    def pointers(names: Names, *wanted: str) -> list[str]:
        return ["block", *(names.get(field, "None") for field in wanted)]

    def weight_call(indent: int, names: Names, end: int | None) -> str:
        where = pair.channel_map(pair.out_last)
        outer, inner = pair.swap(pair.out_last, pair.weight_last) or (None, None)
        return call(
            indent,
            "fold_weight",
            pointers(names, "weight", "bn_weight", "running_var", "out_weight"),
            {
                "CHANNELS": where.channels,
                "INNER": where.inner,
                "GROUP_SPAN": where.group_span,
            },
            {"EPS": pair.eps, "COMPUTE": compute, "OFFSET": offset_type(numel, block), "BLOCK": block},
            {"END": end, "SWAP_OUTER": outer, "SWAP_INNER": inner},
            {"PRESCALE": True, "bn_bias": names.get("bn_bias")} if pair.prescale else {},
        )

    def body(indent: int, names: Names) -> str:
        pad = " " * indent
        text = in_blocks(indent, numel, block, lambda indent, end: weight_call(indent, names, end))
        if not pair.writes_vectors:
            return text
        guarded = bias_blocks < weight_blocks
        if guarded:
            text += f"{pad}if block < {bias_blocks}:\n"
        return text + call(
            indent + 4 * guarded,
            "fold_bias",
            pointers(names, "bias", "bn_weight", "bn_bias", "running_mean", "running_var", "out_bias"),
            {"TOTAL": channels, "EPS": pair.eps, "COMPUTE": compute, "BLOCK": block, "PAIR": index},
            {"out_power": names.get("out_power")},
        )

    # A weight that is not empty has an element for each channel, so its blocks cover the biases too.
    names = {a.field: a.name for a in arguments}
    at_once = min(block, numel) * ITEMSIZE[pair.weight]
    return Leaf(index, pair, max(weight_blocks, bias_blocks), names, body, 1, at_once), arguments


@functools.lru_cache(maxsize=1024)
def generate_fold(pairs: tuple[PairSpec, ...], config: KernelConfig = DEFAULT_CONFIG) -> KernelSource:
    """Return the kernel that folds `pairs` in one launch. Skip pairs that write nothing."""
    parts = [_fold_leaf(index, pair, config) for index, pair in enumerate(pairs) if pair.writes]
    return assemble("fold", len(pairs), parts, config)
