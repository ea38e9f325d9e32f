"""The interpreted forward kernel compared with the fp64 oracle. Outputs start as NaN between guard bands."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from launches import launch_fold, launch_fold_into
from pair_cases import KINDS, MIXES, alike, assert_folded, assert_powers, pair, random_inputs
from tiers import few
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter
from triton_convbn.kernels import offline_cases
from triton_convbn.kernels.codegen import generate_fold
from triton_convbn.kernels.config import DEFAULT_CONFIG, EMITS, EVICTS, KernelConfig
from triton_convbn.kernels.inputs import FoldInputs, Unsupported, spec_of
from triton_convbn.kernels.kernel_call import KernelCall
from triton_convbn.kernels.kernel_source import in_buffers, starts_in_buffer
from triton_convbn.kernels.launch import launch, run
from triton_convbn.kernels.testing import Guarded, fold_fp64


def run_guarded(group: list[FoldInputs], config: KernelConfig = DEFAULT_CONFIG) -> list[tuple[Tensor, ...]]:
    """Fold into NaN outputs between guard bands, and check the bands."""
    outs: list[list[Guarded]] = []
    for inputs in group:
        dtype = inputs.out_dtype or inputs.weight.dtype
        outs.append(
            [Guarded.like(inputs.weight, dtype, inputs.memory_format), Guarded.like(inputs.running_mean, dtype)]
        )
        if inputs.prescale:
            outs[-1].append(Guarded.like(inputs.running_mean, torch.float16))
    launch_fold_into(group, [tuple(each.tensor for each in out) for out in outs], config)
    for out in outs:
        for each in out:
            assert each.intact()
    return [tuple(each.tensor for each in out) for out in outs]


@pytest.mark.parametrize("seed", few(range(40), 10))
def test_random_group(seed: int) -> None:
    """Blocks are small, so that small shapes have several, full and partial."""
    rng = random.Random(seed)
    group = [random_inputs(rng) for _ in range(rng.randint(1, 6))]
    config = KernelConfig(block=rng.choice((64, 256, 1024)))
    for inputs, out in zip(group, run_guarded(group, config), strict=True):
        assert_folded(inputs, *out)


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("evict", EVICTS)
@pytest.mark.parametrize("seed", range(2))
def test_random_group_of_any_configuration(seed: int, emit: str, evict: str) -> None:
    """Several pairs have the same spec and different values: a shared body must use the right arguments."""
    rng = random.Random(seed)
    kinds = [random_inputs(rng, largest=20) for _ in range(3)]
    group = [alike(rng.choice(kinds), seed=index) for index in range(8)]
    config = KernelConfig(rng.choice((64, 256)), rng.choice((32, 256)), emit, evict=evict)
    for inputs, out in zip(group, run_guarded(group, config), strict=True):
        assert_folded(inputs, *out)


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("seed", few(range(6), 2))
def test_without_biases(seed: int, emit: str) -> None:
    """The weights and powers of two have the bits of the kernel that writes biases too."""
    rng = random.Random(seed)
    group = [random_inputs(rng, largest=20) for _ in range(4)]
    group += [alike(group[0], seed=7), pair(4, 0, 3, 3), pair(0, 4, 1, 1)]
    kept = [rng.random() < 0.3 for _ in group]
    config = KernelConfig(64, emit=emit)
    specs = tuple(replace(spec_of(each), out_bias=bias) for each, bias in zip(group, kept, strict=True))
    source = generate_fold(specs, config)
    assert len(source.arguments) == sum(spec.arguments for spec in specs)
    assert source.bytes_written == sum(spec.written_bytes for spec in specs)
    full = launch_fold(group, config)
    outs = [tuple(torch.full_like(each, torch.nan) for each in out) for out in full]
    fields = [
        inputs._asdict() | dict(zip(("out_weight", "out_bias", "out_power"), out, strict=False))
        for inputs, out in zip(group, outs, strict=True)
    ]
    launch(source, fields, torch.device("cpu"))
    for bias, out, expected in zip(kept, outs, full, strict=True):
        for index, (one, other) in enumerate(zip(out, expected, strict=True)):
            assert torch.equal(one, other) if bias or index != 1 else one.isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", range(len(MIXES)))
def test_kind_and_dtype(kind: str, mix: int) -> None:
    """Each group has all combinations of optional parameters."""
    rng = random.Random(100 * mix + KINDS.index(kind))
    weight_dtype, bias_dtype, bn_dtype, stats_dtype, out_dtype = MIXES[mix]
    base = random_inputs(rng, kind, largest=12)
    n = base.running_mean.shape[0]
    group = [
        base._replace(
            weight=base.weight.to(weight_dtype),
            bias=torch.linspace(-1, 1, n, dtype=bias_dtype) if flags & 1 else None,
            bn_weight=torch.linspace(0.5, 2, n, dtype=bn_dtype) if flags & 2 else None,
            bn_bias=torch.linspace(-2, 1, n, dtype=bn_dtype) if flags & 4 else None,
            running_mean=base.running_mean.to(stats_dtype),
            running_var=base.running_var.to(stats_dtype),
            out_dtype=out_dtype,
        )
        for flags in range(8)
    ]
    for inputs, out in zip(group, run_guarded(group), strict=True):
        assert_folded(inputs, *out)


@pytest.mark.parametrize("block", [64, 1024])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("source", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wanted", [None, torch.contiguous_format, torch.channels_last])
def test_layouts(source: torch.memory_format, wanted: torch.memory_format | None, transposed: bool, block: int) -> None:
    """The output has the requested layout, by default the weight's."""
    if transposed:
        inputs = pair(6, 7, 3, 5, channels=14, transposed=True, groups=2, memory_format=wanted)
    else:
        inputs = pair(6, 7, 3, 5, memory_format=wanted)
    inputs = inputs._replace(weight=inputs.weight.contiguous(memory_format=source))
    ((weight, bias),) = run_guarded([inputs], KernelConfig(block=block))
    assert_folded(inputs, weight, bias)
    ((weight, bias),) = launch_fold([inputs], KernelConfig(block=block))
    assert_folded(inputs, weight, bias)
    assert weight.stride() == torch.empty(6, 7, 3, 5).contiguous(memory_format=wanted or source).stride()


def test_awkward_shapes_in_one_group() -> None:
    """Cover empty weights, no channels, one element, and more channels than a block."""
    group = [
        pair(4, 0, 3, 3),
        pair(0, 4, 1, 1),
        pair(1, 1),
        pair(0, 3, 2, 2, transposed=True, groups=2, channels=6),
        pair(2500, 1, 1, 1),
        pair(2500, 0),
        pair(1, 4096),
        pair(64, 1, 3, 3),
        pair(3, 341, 1),  # 1023 elements
        pair(205, 5),  # 1025
    ]
    for inputs, out in zip(group, run_guarded(group), strict=True):
        assert_folded(inputs, *out)


@pytest.mark.parametrize("emit", EMITS)
def test_parts_of_buffers(emit: str) -> None:
    """All that is read is in one buffer and all that is written in another; in between is NaN, and stays so."""
    device = torch.device("cpu")
    call = KernelCall([offline_cases.pair(7, 5, 9)] * 3 + [offline_cases.pair(6, 1, 1, conv_bias=True)], device)
    source = generate_fold(tuple(call.specs), KernelConfig(64, emit=emit))
    launch(source, call.values, device)
    every, places, buffers = [], [], []
    for number, access in enumerate(("read", "write")):
        own = [each for each in source.arguments if each.access == access]
        *starts, size = starts_in_buffer([each.numel for each in own])
        buffers.append(torch.full((size,), torch.nan))
        every += [(call.values[each.pair][each.field], number, start) for each, start in zip(own, starts, strict=True)]
        places += [(each.name, number, start) for each, start in zip(own, starts, strict=True)]
    want = [buffer.clone() for buffer in buffers]
    for tensor, number, start in every:
        want[number][start : start + tensor.numel()] = tensor.reshape(-1)
    buffers[0].copy_(want[0])
    in_two = in_buffers(source, places)
    run(in_two, [buffers[each.pair] for each in in_two.arguments], device)
    for found, expected in zip(buffers, want, strict=True):
        assert torch.equal(found.nan_to_num(7.5), expected.nan_to_num(7.5))
    assert [each.name for each in in_two.arguments] == ["buffer_0", "buffer_1"]
    assert (in_two.bytes_read, in_two.bytes_written) == (source.bytes_read, source.bytes_written)


def test_nothing_to_do() -> None:
    ((weight, bias),) = launch_fold([pair(0, 4, 1, 1)])
    assert weight.shape == (0, 4, 1, 1)
    assert bias.shape == (0,)


def test_eps_is_not_rounded_for_fp64() -> None:
    """With variance 0, s is 1 / sqrt(eps): an eps rounded to fp32 changes the eighth digit."""
    inputs = pair(3, 4, dtype=torch.float64)._replace(running_var=torch.zeros(3, dtype=torch.float64), eps=1e-5)
    ((weight, bias),) = launch_fold([inputs])
    assert_folded(inputs, weight, bias)


def test_every_argument_is_a_pointer() -> None:
    """Triton passes a Python float as fp32, so eps is a constant of the text, with all its bits."""
    eps = 1e-3 / 3
    inputs = pair(8, 4, dtype=torch.float64)._replace(eps=eps)
    source = generate_fold((spec_of(inputs),))
    assert "eps" not in {argument.field for argument in source.arguments}
    assert f"EPS={eps!r}" in source.text
    ((weight, bias),) = launch_fold([inputs])
    assert_folded(inputs, weight, bias)


@pytest.mark.parametrize("eps", [float("inf"), float("nan")])
def test_eps_that_is_not_finite_raises(eps: float) -> None:
    with pytest.raises(Unsupported, match="eps"):
        launch_fold([pair(8, 4)._replace(eps=eps)])


def test_group_has_the_bits_of_single_folds() -> None:
    rng = random.Random(5)
    group = [random_inputs(rng) for _ in range(5)]
    for inputs, out in zip(group, launch_fold(group), strict=True):
        (alone,) = launch_fold([inputs])
        for one, other in zip(out, alone, strict=True):
            assert torch.equal(one, other)


def test_infinite_and_nan_weights_do_not_spread() -> None:
    inputs = pair(8, 16)
    inputs.weight[2, 3], inputs.weight[5, 6] = torch.inf, torch.nan
    ((weight, _),) = launch_fold([inputs])
    assert weight[2, 3].isinf()
    assert weight[5, 6].isnan()
    assert weight.isfinite().sum() == weight.numel() - 2


def test_wide_offsets() -> None:
    """A weight of 2**31 elements has 64-bit offsets. With small sizes the same text gives the same bits."""
    spec = spec_of(pair(48, 20, 3, 3))
    for rows, offset in ((2**21 - 1, "tl.int32"), (2**21, "tl.int64")):
        assert f"OFFSET={offset}" in generate_fold((replace(spec, rows=rows, cols=1024, taps=1),)).text

    inputs = pair(48, 20, 3, 3)
    narrow = generate_fold((spec_of(inputs),))
    wide = replace(narrow, text=narrow.text.replace("OFFSET=tl.int32", "OFFSET=tl.int64"))
    assert wide.text != narrow.text
    ((weight, bias),) = launch_fold([inputs])
    values = inputs._asdict() | {"out_weight": torch.empty_like(weight), "out_bias": torch.empty_like(bias)}
    launch(wide, [values], weight.device)
    assert torch.equal(values["out_weight"], weight)
    assert torch.equal(values["out_bias"], bias)


def trace(monkeypatch: pytest.MonkeyPatch, group: list[FoldInputs]) -> tuple[list[np.ndarray], list[np.ndarray], list]:
    """Return the addresses of the active lanes of every load and store of a fold."""
    loads: list[np.ndarray] = []
    stores: list[np.ndarray] = []
    builder = triton_interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def traced_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        loads.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel())
        return load(self, ptrs, mask, *rest)

    def traced_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        stores.append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].ravel())
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", traced_load)
    monkeypatch.setattr(builder, "create_masked_store", traced_store)
    outs = launch_fold(group)
    return loads, stores, outs


def test_every_weight_is_read_once_and_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the addresses that the generated code uses, and compare with `bytes_read` and `bytes_written`."""
    group = [
        pair(33, 20, 3, 3),
        pair(16, 8, 3, 3, memory_format=torch.channels_last),
        pair(6, 7, 3, 3, transposed=True, groups=2, channels=14),
        pair(1030, 1, dtype=torch.float16),
        pair(65, 20, 3, 3, prescale=True, out_dtype=torch.float16),
    ]
    loads, stores, outs = trace(monkeypatch, group)
    loaded, stored = np.concatenate(loads), np.concatenate(stores)

    def addresses(t: Tensor) -> np.ndarray:
        return t.data_ptr() + t.element_size() * np.arange(t.numel(), dtype=np.uint64)

    unique_loaded = np.unique(loaded)
    want_loaded = np.concatenate([addresses(t) for inputs in group for t in inputs if isinstance(t, Tensor)])
    want_stored = np.concatenate([addresses(t) for out in outs for t in out])
    assert np.array_equal(unique_loaded, np.sort(want_loaded))
    assert np.array_equal(np.sort(stored), np.sort(want_stored))  # not made unique, so each store happens once
    for inputs in group:
        first, last = addresses(inputs.weight)[[0, -1]]
        assert ((loaded >= first) & (loaded <= last)).sum() == inputs.weight.numel()
    source = generate_fold(tuple(map(spec_of, group)))
    assert source.bytes_read == sum(t.nbytes for inputs in group for t in inputs if isinstance(t, Tensor))
    assert source.bytes_written == sum(t.nbytes for out in outs for t in out)
    assert source.bytes_moved == source.bytes_read + source.bytes_written


def test_several_devices_raise() -> None:
    on_meta = pair(4, 4)
    moved: dict[str, Any] = {k: v.to("meta") for k, v in on_meta._asdict().items() if isinstance(v, Tensor)}
    with pytest.raises(Unsupported, match="several devices"):
        launch_fold([pair(4, 4), on_meta._replace(**moved)])


@pytest.mark.parametrize("out", [torch.float16, torch.float32, torch.float64])
def test_prescale_of_extreme_channels(out: torch.dtype) -> None:
    """Cover scales that are powers of two, zero, subnormal or huge, and biases that determine q."""
    scales = [1.0, 2.0, 0.5, 2.0**14, 2.0**15, 2.0**20, 0.0, 1e-30, 3e-5, 1 + 2**-20, 1 - 2**-20, 1e4, -3.0]
    betas = [0.0, 1.0, 1e5, 1e8, -6e4]
    gamma, beta = torch.tensor([(s, b) for s in scales for b in betas]).t().contiguous()
    n = len(gamma)
    inputs = FoldInputs(
        torch.linspace(-2, 2, n * 7).reshape(n, 7), None, gamma, beta,
        torch.zeros(n), torch.ones(n), 0.0, out_dtype=out, prescale=True,
    )  # fmt: skip
    ((weight, bias, power),) = run_guarded([inputs], KernelConfig(block=64))
    assert_powers(inputs, power)
    exact_weight, exact_bias = fold_fp64(inputs, power)
    torch.testing.assert_close(weight.double(), exact_weight, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(bias.double(), exact_bias, rtol=1e-3, atol=1e-7)
