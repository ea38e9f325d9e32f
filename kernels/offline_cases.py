"""The kernels of the offline matrix by name: every template, dtype mix, layout and optional parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .codegen import generate_fold, generate_fold_backward
from .codegen_merge import generate_merge, generate_merge_backward
from .kernel_source import KernelSource, in_buffers, starts_in_buffer
from .merge_spec import MergeGradSpec, MergeSpec, Source
from .spec import Needs, PairSpec, backward_of

# (weight, BatchNorm, output). The last two: mixed precision with BatchNorm kept in fp32, and autocast.
DTYPE_MIXES = {
    "fp32": ("fp32", "fp32", "fp32"),
    "fp16": ("fp16", "fp16", "fp16"),
    "bf16": ("bf16", "bf16", "bf16"),
    "fp64": ("fp64", "fp64", "fp64"),
    "bf16_bn_fp32": ("bf16", "fp32", "bf16"),
    "fp32_to_fp16": ("fp32", "fp32", "fp16"),
}


def pair(rows: int, cols: int, taps: int, mix: str = "fp32", conv_bias: bool = False) -> PairSpec:
    """Return a convolution and an affine BatchNorm. An fp16 output has prescale, as in the pass."""
    weight, bn, out = DTYPE_MIXES[mix]
    bias = weight if conv_bias else None
    prescale = out == "fp16"
    return PairSpec(rows, cols, taps, weight, out, bn, bn, bias=bias, bn_weight=bn, bn_bias=bn, prescale=prescale)


def _resnet50_shapes() -> Iterator[tuple[int, int, int]]:
    yield 64, 3, 49
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield width, inputs, 1
            yield width, width, 9
            yield 4 * width, width, 1
            if block == 0:
                yield 4 * width, inputs, 1
            inputs = 4 * width


def resnet50(mix: str = "fp32") -> tuple[PairSpec, ...]:
    """Return ResNet-50's 53 pairs in the order of its forward, with the shortcut last in each block."""
    return tuple(pair(*shape, mix=mix) for shape in _resnet50_shapes())


def _groups() -> dict[str, tuple[PairSpec, ...]]:
    groups: dict[str, tuple[PairSpec, ...]] = {}
    for mix in DTYPE_MIXES:
        pairs = resnet50(mix)
        groups[f"resnet50_last16_{mix}"] = pairs[-16:]
    groups["resnet50_first16_fp32"] = resnet50()[:16]
    groups["resnet50_all53_fp32"] = resnet50()
    base = pair(256, 256, 9, conv_bias=True)
    for mix in ("fp32", "fp16"):
        mixed = pair(256, 256, 9, mix)
        groups[f"to_channels_last_{mix}"] = (dataclasses.replace(mixed, out_last=True),)
        groups[f"to_contiguous_{mix}"] = (dataclasses.replace(mixed, weight_last=True),)
        groups[f"channels_last_{mix}"] = (dataclasses.replace(mixed, weight_last=True, out_last=True),)
        transposed = dataclasses.replace(mixed, transposed=True, groups=4, cols=64)
        groups[f"transposed_{mix}"] = (transposed,)
        groups[f"transposed_channels_last_{mix}"] = (dataclasses.replace(transposed, weight_last=True, out_last=True),)
        groups[f"transposed_to_channels_last_{mix}"] = (dataclasses.replace(transposed, out_last=True),)
    for mix in ("fp32", "fp32_to_fp16"):  # as in backward
        last = groups[f"resnet50_last16_{mix}"]
        groups[f"resnet50_last16_{mix}_no_bias"] = tuple(dataclasses.replace(each, out_bias=False) for each in last)
    names = ("bias", "bn_weight", "bn_bias")
    for flags in range(8):
        absent = [name for bit, name in enumerate(names) if flags >> bit & 1]
        dtypes: dict[str, Any] = dict.fromkeys(names, "fp32") | dict.fromkeys(absent)
        name = "without_" + "_".join(absent) if absent else "with_everything"
        groups[name] = (dataclasses.replace(base, **dtypes),)
    groups["depthwise_fp16"] = (pair(1024, 1, 9, "fp16"),)
    groups["odd_sizes_fp16"] = (pair(111, 37, 9, "fp16"),)
    groups["one_channel"] = (pair(1, 64, 1),)
    groups["wide_offsets_fp16"] = (pair(65536, 65536, 1, "fp16"),)
    groups["no_elements"] = (pair(64, 0, 1),)
    return groups


def block(
    channels: int, columns: int, mix: str = "fp32", largest: int = 4, taps: int = 3, last: bool = False
) -> MergeSpec:
    """Return a block of MobileOne: `largest` square kernels, 1 x 1 (if those are larger), and the input."""
    weight, _, out = DTYPE_MIXES[mix]
    kernel, point = (taps, taps, 1), (1, 1, 1)
    sources = [Source(kernel, weight, last)] * largest + [Source(point, weight)] * (taps > 1)
    scales = "fp64" if weight == "fp64" else "fp32"
    return MergeSpec(channels, columns, kernel, tuple(sources), scales, out, identity=True, out_last=last)


def _sums() -> dict[str, tuple[MergeSpec, ...]]:
    sums: dict[str, tuple[MergeSpec, ...]] = {}
    for mix in ("fp32", "fp16", "bf16", "fp64", "fp32_to_fp16"):
        sums[f"depthwise8_{mix}"] = tuple(block(128, 1, mix) for _ in range(8))
        sums[f"pointwise8_{mix}"] = tuple(block(128, 128, mix, taps=1) for _ in range(8))
        sums[f"repvgg8_{mix}"] = tuple(block(192, 192, mix, largest=1) for _ in range(8))
    for mix in ("fp32", "fp16"):
        sums[f"channels_last_{mix}"] = (block(256, 256, mix, last=True),)
        mixed = block(256, 256, mix)
        sums[f"to_channels_last_{mix}"] = (dataclasses.replace(mixed, out_last=True),)
    line = (Source((3, 3, 1), "fp32"), Source((3, 1, 1), "fp32"), Source((1, 3, 1), "fp32"))
    sums["acnet"] = (MergeSpec(64, 64, (3, 3, 1), line, "fp32", "fp32"),)
    sums["odd_sizes_fp16"] = (block(111, 111, "fp16"),)
    return sums


def _in_one_buffer(group: tuple[PairSpec, ...]) -> KernelSource:
    """Return a fold whose biases and q are in one buffer, as Inductor launches it."""
    source = generate_fold(group)
    vectors = [each for each in source.arguments if each.access == "write" and each.field != "out_weight"]
    starts = starts_in_buffer([each.numel for each in vectors])
    return in_buffers(source, [(each.name, 0, start) for each, start in zip(vectors, starts, strict=False)])


def _cases() -> dict[str, Callable[[], KernelSource]]:
    """Return a function for each case that generates its kernel. All texts together are 1 MB, so none is made here."""
    cases: dict[str, Callable[[], KernelSource]] = {}
    for name, group in _groups().items():
        cases[f"fold_{name}"] = partial(generate_fold, group)
        if len(group) <= 16 and not name.endswith("no_bias"):
            cases[f"fold_backward_{name}"] = partial(generate_fold_backward, tuple(map(backward_of, group)))
    for name, group in (("first", resnet50("fp32_to_fp16")[:16]), ("last", resnet50("fp32_to_fp16")[-16:])):
        cases[f"fold_resnet50_{name}16_in_one_buffer"] = partial(_in_one_buffer, group)
    conv = pair(256, 256, 9, conv_bias=True)
    for field in Needs._fields:
        only = Needs(**{f: f == field for f in Needs._fields})
        cases[f"fold_backward_only_{field}"] = partial(generate_fold_backward, (backward_of(conv, only),))
    for name, group, rows in (("first", resnet50()[:16], 448), ("last", resnet50()[-16:], 8)):
        specs = tuple(dataclasses.replace(backward_of(each), bias_rows=rows) for each in group)
        cases[f"fold_backward_resnet50_{name}16_bias_in_rows"] = partial(generate_fold_backward, specs)
    gradient_last = backward_of(conv, grad_last=True)
    cases["fold_backward_gradient_channels_last"] = partial(generate_fold_backward, (gradient_last,))
    for name, sums in _sums().items():
        cases[f"merge_{name}"] = partial(generate_merge, sums)
        grads = tuple(MergeGradSpec(one, one.out, one.out_last, (True,) * len(one.sources), True) for one in sums)
        cases[f"merge_backward_{name}"] = partial(generate_merge_backward, grads)
    return cases


CASES = _cases()
