"""Generate the kernels that merge sums of branches, and their gradients (templates/merge.py, merge_backward.py)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

from .config import DEFAULT_CONFIG, KernelConfig
from .kernel_source import Argument, KernelSource, assemble, call, cdiv, in_blocks, offset_type, power_of_two
from .merge_spec import MergeGradSpec, MergeSpec, Source
from .spec import ITEMSIZE
from .tree import Leaf, Names


def _sizes(one: MergeSpec, source: Source) -> dict[str, object]:
    merged = {f"K{i}": size for i, size in enumerate(one.kernel)}
    return {"COLUMNS": one.columns, **merged, **{f"N{i}": size for i, size in enumerate(source.kernel)}}


def _merge_block(one: MergeSpec, config: KernelConfig) -> int:
    """Return the elements of a program: half of `config.block`, or a quarter for fp64: one 16-byte load a thread.

    With half of that, depthwise weights and odd sizes take 34 and 41 registers on gfx1100 instead of 67 and 81 (eight
    blocks of MobileOne in fp32, one of 111 channels in fp16, compiled offline).
    """
    largest = max(ITEMSIZE[dtype] for dtype in (one.out, *(source.dtype for source in one.sources)))
    irregular = one.columns == 1 or one.numel % 16 != 0
    return max(1, 2 * config.block // max(4, largest) // (1 + irregular))


def _merge_leaf(index: int, one: MergeSpec, config: KernelConfig) -> tuple[Leaf, list[Argument]]:
    """Return the body of one sum: every program merges one block of its weight."""
    block = _merge_block(one, config)
    fields = {
        f"weight_{k}": (source.dtype, one.channels * one.columns * source.taps, "read")
        for k, source in enumerate(one.sources)
    }
    fields |= {
        "scales": (one.scales, one.terms * one.channels, "read"),
        "out": (one.out, one.numel, "write"),
    }
    arguments = [Argument(index, field, dtype, n, access) for field, (dtype, n, access) in fields.items()]
    constants: dict[str, object] = {
        "COMPUTE": f"tl.float{one.compute[2:]}",
        "OFFSET": offset_type(one.numel, block),
        "BLOCK": block,
    }

    def terms(indent: int, names: Names, end: int | None) -> Iterator[str]:
        for k, source in enumerate(one.sources):
            yield call(
                indent,
                "scaled_source",
                ["block", names[f"weight_{k}"], names["scales"]],
                {"ROW": k * one.channels, **_sizes(one, source)},
                {"LAST": source.last, "OUT_LAST": one.out_last, **constants, "END": end},
            )
        if one.identity:
            yield call(
                indent,
                "scaled_identity",
                ["block", names["scales"]],
                {"ROW": len(one.sources) * one.channels, "COLUMNS": one.columns, "TAPS": one.taps},
                {"OUT_LAST": one.out_last, **constants, "END": end},
            )

    def store(indent: int, names: Names, end: int | None) -> str:
        pad = " " * (indent + 4)
        added = f"{pad}+ ".join(each.removeprefix(pad) for each in terms(indent + 4, names, end))
        return (
            f"{pad[4:]}store_merged(\n{pad}block,\n{pad}{added[:-1]},\n"
            + call(indent, "", [names["out"]], {**constants, "PAIR": index, "END": end}).split("\n", 1)[1]
        )

    def body(indent: int, names: Names) -> str:
        return in_blocks(indent, one.numel, block, lambda indent, end: store(indent, names, end))

    names = {a.field: a.name for a in arguments}
    at_once = min(block, one.numel) * sum(ITEMSIZE[source.dtype] for source in one.sources)
    return Leaf(index, one, cdiv(one.numel, block), names, body, 1, at_once), arguments


@functools.lru_cache(maxsize=1024)
def generate_merge(sums: tuple[MergeSpec, ...], config: KernelConfig = DEFAULT_CONFIG) -> KernelSource:
    """Return the kernel that merges `sums` in one launch. Skip sums without elements."""
    parts = [_merge_leaf(index, one, config) for index, one in enumerate(sums) if one.numel]
    return assemble("merge", len(sums), parts, config)


def _backward_leaf(index: int, spec: MergeGradSpec, config: KernelConfig, first: int) -> tuple[Leaf, list[Argument]]:
    """Return the body of one sum: each program computes the gradients of ROWS channels, source after source.

    first: The number of sources of the sums before it. With it every store has a number of its own.
    """
    one = spec.sum
    wanted = list(zip(one.sources, spec.weights, strict=True))
    fields: dict[str, tuple[str, int, str]] = {"grad": (spec.grad, one.numel, "read")}
    if any(spec.weights):
        fields["scales"] = one.scales, one.terms * one.channels, "read"
    for k, (source, _) in enumerate(wanted):
        if spec.scales:
            fields[f"weight_{k}"] = source.dtype, one.channels * one.columns * source.taps, "read"
    for k, (source, writes) in enumerate(wanted):
        if writes:
            fields[f"d_weight_{k}"] = source.dtype, one.channels * one.columns * source.taps, "write"
    if spec.scales:
        fields["d_scales"] = one.scales, one.terms * one.channels, "write"
    arguments = [Argument(index, field, dtype, n, access) for field, (dtype, n, access) in fields.items()]

    largest = max(ITEMSIZE[dtype] for dtype in (spec.grad, *(source.dtype for source in one.sources)))
    # fp64: 8 bytes a thread. With 16, eight blocks of RepVGG take 72 registers on sm_90 (compiled offline).
    block = max(1, 2 * config.block // largest // (1 + (largest == 8)))
    per_channel = one.columns * one.taps
    width = min(power_of_two(per_channel), block)
    rows = min(block // width, power_of_two(one.channels))
    shared: dict[str, object] = {
        "GRAD_LAST": spec.grad_last,
        "COMPUTE": f"tl.float{spec.compute[2:]}",
        "OFFSET": offset_type(one.numel, rows * width),
        "ROWS": rows,
    }

    def body(indent: int, names: Names) -> str:
        text = ""
        for k, (source, writes) in enumerate(wanted):
            if not writes and not spec.scales:
                continue
            pointers = ["grad", f"weight_{k}", "scales", f"d_weight_{k}", "d_scales"]
            text += call(
                indent,
                "source_gradients",
                ["block", *(names.get(field, "None") for field in pointers)],
                {"ROW": k * one.channels, "TOTAL": one.channels, **_sizes(one, source)},
                {"LAST": source.last, **shared},
                {"WIDTH": min(power_of_two(one.columns * source.taps), width), "PAIR": first + index + k},
            )
        if one.identity and spec.scales:
            text += call(
                indent,
                "identity_gradient",
                ["block", names["grad"], names["d_scales"]],
                {"ROW": len(wanted) * one.channels, "TOTAL": one.channels, "COLUMNS": one.columns, "TAPS": one.taps},
                {**shared, "PAIR": first + index + len(wanted)},
            )
        return text

    names = {a.field: a.name for a in arguments}
    at_once = min(rows * width, rows * per_channel) * (ITEMSIZE[spec.grad] + largest * spec.scales)
    passes = sum(max(1, cdiv(one.columns * source.taps, width)) for source in one.sources)
    return Leaf(index, spec, cdiv(one.channels, rows), names, body, passes, at_once), arguments


@functools.lru_cache(maxsize=1024)
def generate_merge_backward(specs: tuple[MergeGradSpec, ...], config: KernelConfig = DEFAULT_CONFIG) -> KernelSource:
    """Return the kernel that computes the needed gradients of `specs` in one launch. Skip sums that need none."""
    first = list(itertools.accumulate((len(spec.sum.sources) for spec in specs), initial=0))
    parts = [
        _backward_leaf(index, spec, config, first[index])
        for index, spec in enumerate(specs)
        if spec.sum.numel and (any(spec.weights) or spec.scales)
    ]
    return assemble("merge_backward", len(specs), parts, config)
