"""The interpreted backward kernel compared with autograd in fp64."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import triton
from launches import FoldGradients, launch_fold_backward, launch_fold_backward_into
from pair_cases import KINDS, MIXES, alike, pair, random_inputs, random_needs, random_power
from tiers import few
from torch import Tensor
from triton.runtime import interpreter
from triton_convbn.kernels.codegen import generate_fold_backward
from triton_convbn.kernels.config import EMITS, EVICTS, KernelConfig
from triton_convbn.kernels.inputs import FoldInputs, Needs, Unsupported, check_power, grad_spec_of
from triton_convbn.kernels.testing import Guarded, exact_gradients, expand_channels, out_of_bounds

FIELDS = Needs._fields
Grads = tuple[Tensor | None, Tensor | None]


def random_grads(rng: random.Random, inputs: FoldInputs) -> Grads:
    """Return dW' and db' as autograd may: in either layout, and either may be None."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    dtype = inputs.out_dtype or inputs.weight.dtype
    weight = torch.randn(inputs.weight.shape, generator=generator).to(dtype)
    if weight.dim() in (4, 5) and rng.random() < 0.5:
        weight = weight.contiguous(memory_format=torch.channels_last if weight.dim() == 4 else torch.channels_last_3d)
    bias = torch.randn(inputs.running_mean.shape, generator=generator).to(dtype)
    absent = rng.randrange(8)
    return None if absent == 0 else weight, None if absent == 1 else bias


def assert_gradients(
    inputs: FoldInputs, grads: Grads, got: FoldGradients, needs: Needs, power: Tensor | None = None
) -> None:
    """Assert that exactly the gradients that are needed and reached are there, and that they are right."""
    exact = exact_gradients(inputs, *grads, power)
    reached = {"weight": grads[0], "bias": grads[1], "bn_weight": grads[0], "bn_bias": grads[1]}
    if grads[0] is None:
        reached["bn_weight"] = grads[1]
    for field, wanted, value in zip(FIELDS, needs, got, strict=True):
        parameter = getattr(inputs, field)
        if not wanted or parameter is None or reached[field] is None:
            assert value is None, field
            continue
        assert value is not None, field
        assert (value.dtype, value.shape) == (parameter.dtype, parameter.shape)
        wrong = out_of_bounds(value, exact[field])
        assert not wrong.any(), f"{field}: {int(wrong.sum())} of {wrong.numel()} off: {inputs}"


def run_guarded(
    group: list[FoldInputs],
    grads: list[Grads],
    needs: list[Needs],
    config: KernelConfig,
    powers: list[Tensor | None] | None = None,
) -> list[FoldGradients]:
    """Write the needed gradients into NaN outputs between guard bands, and check the bands."""
    bands: list[Guarded] = []
    outs = []
    for inputs, (grad_weight, grad_bias), wanted in zip(group, grads, needs, strict=True):
        spec = grad_spec_of(inputs, grad_weight, grad_bias, wanted)
        fields: list[Tensor | None] = []
        for field, write in zip(FIELDS, spec.needs, strict=True):
            if write:
                bands.append(Guarded.like(getattr(inputs, field)))
            fields.append(bands[-1].tensor if write else None)
        outs.append(FoldGradients(*fields))
    launch_fold_backward_into(group, grads, outs, config, powers)
    for band in bands:
        assert band.intact()
    return outs


@pytest.mark.parametrize("seed", few(range(40), 10))
def test_random_group(seed: int) -> None:
    """Mix kinds, dtypes and layouts, and leave out gradients and needs."""
    rng = random.Random(1000 + seed)
    group = [random_inputs(rng) for _ in range(rng.randint(1, 5))]
    grads = [random_grads(rng, inputs) for inputs in group]
    needs = [random_needs(rng) for _ in group]
    powers = [random_power(rng, inputs) for inputs in group]
    got = run_guarded(group, grads, needs, KernelConfig(block=rng.choice((64, 256, 1024))), powers)
    for inputs, grad, out, wanted, power in zip(group, grads, got, needs, powers, strict=True):
        assert_gradients(inputs, grad, out, wanted, power)


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("rows", [None, 1, 4])
@pytest.mark.parametrize("seed", [0, 3])
def test_random_group_of_any_configuration(seed: int, rows: int | None, emit: str) -> None:
    """Several pairs have the same spec and different values: a shared body must use the right arguments."""
    rng = random.Random(seed)
    kinds = []
    for _ in range(3):
        inputs = random_inputs(rng, largest=20)
        kinds.append((inputs, random_grads(rng, inputs), random_needs(rng)))
    group, grads, needs = [], [], []
    for index in range(8):
        inputs, grad, wanted = rng.choice(kinds)
        group.append(alike(inputs, seed=index))
        weight, bias = (None if g is None else torch.empty_like(g).copy_(g * (1 + index)) for g in grad)
        grads.append((weight, bias))
        needs.append(wanted)
    config = KernelConfig(rng.choice((64, 256)), rng.choice((32, 256)), emit, rows, rng.choice(EVICTS))
    powers = [random_power(rng, inputs) for inputs in group]
    got = run_guarded(group, grads, needs, config, powers)
    for inputs, grad, out, wanted, power in zip(group, grads, got, needs, powers, strict=True):
        assert_gradients(inputs, grad, out, wanted, power)


@pytest.mark.parametrize("kind", few(KINDS, 4))
def test_every_combination_of_needs(kind: str) -> None:
    rng = random.Random(KINDS.index(kind))
    inputs = random_inputs(rng, kind, largest=10)._replace(prescale=False)
    n = inputs.running_mean.shape[0]
    dtype = inputs.weight.dtype
    inputs = inputs._replace(bias=torch.ones(n, dtype=dtype), bn_weight=torch.ones(n), bn_bias=torch.ones(n))
    both = random_grads(rng, inputs)
    both = (torch.randn(inputs.weight.shape).to(dtype), torch.randn(n).to(dtype)) if None in both else both
    needs = [Needs(*(bool(flags >> bit & 1) for bit in range(4))) for flags in range(16)]
    config = KernelConfig(block=256)
    for grads in (both, (both[0], None), (None, both[1]), (None, None)):
        for wanted, out in zip(needs, run_guarded([inputs] * 16, [grads] * 16, needs, config), strict=True):
            assert_gradients(inputs, grads, out, wanted)


@pytest.mark.parametrize("mix", range(len(MIXES)))
def test_dtype(mix: int) -> None:
    weight_dtype, bias_dtype, bn_dtype, stats_dtype, out_dtype = MIXES[mix]
    base = random_inputs(random.Random(mix), "conv2d")
    n = base.running_mean.shape[0]
    inputs = base._replace(
        weight=base.weight.to(weight_dtype),
        bias=torch.linspace(-1, 1, n, dtype=bias_dtype),
        bn_weight=torch.linspace(0.5, 2, n, dtype=bn_dtype),
        bn_bias=torch.linspace(-2, 1, n, dtype=bn_dtype),
        running_mean=base.running_mean.to(stats_dtype),
        running_var=base.running_var.to(stats_dtype),
        out_dtype=out_dtype,
        prescale=False,
    )
    dtype = out_dtype or weight_dtype
    grads = (torch.randn(inputs.weight.shape).to(dtype), torch.randn(n).to(dtype))
    (got,) = run_guarded([inputs], [grads], [Needs()], KernelConfig())
    assert_gradients(inputs, grads, got, Needs())


class _Returned:
    """Return the only result of a call."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def get_result(self, index: int) -> Any:
        return self.value


@pytest.mark.parametrize("hip", [False, True])
def test_awkward_shapes_in_one_group(monkeypatch: pytest.MonkeyPatch, hip: bool) -> None:
    """Cover empty weights, which have vectors to differentiate, sums longer than a tile, one and many channels.

    Loops over a channel have another end on AMD, see the template.
    """
    monkeypatch.setattr(triton.language.target_info, "is_hip", lambda: hip)
    builder = interpreter.InterpreterBuilder  # it cannot run assembly, and this one is a comment
    monkeypatch.setattr(builder, "create_inline_asm", lambda self, text, kinds, values, *_: _Returned(values[0]))
    torch.manual_seed(0)
    group = [
        pair(4, 0, 3, 3),
        pair(0, 4, 1, 1),
        pair(0, 3, 2, 2, transposed=True, groups=2, channels=6),
        pair(1, 1),
        pair(1, 5000),
        pair(2500, 1, 1, 1),
        pair(3, 700, 3, 3),
        pair(70, 33, transposed=True, groups=7, channels=231),
    ]
    grads: list[Grads] = [(torch.randn_like(p.weight), torch.randn_like(p.running_mean)) for p in group]
    for inputs, grad, out in zip(
        group, grads, run_guarded(group, grads, [Needs()] * 8, KernelConfig(block=512)), strict=True
    ):
        assert_gradients(inputs, grad, out, Needs())


def test_gamma_gradient_of_an_empty_weight_is_zero() -> None:
    """Only an empty dW' is given: the empty sum is written."""
    inputs = FoldInputs(torch.empty(3, 0), None, torch.ones(3), None, torch.zeros(3), torch.ones(3), 1e-5)
    d_gamma = torch.full((3,), math.nan)
    launch_fold_backward_into([inputs], [(torch.empty(3, 0), None)], [FoldGradients(None, None, d_gamma, None)])
    assert torch.equal(d_gamma, torch.zeros(3))


def test_same_bits_on_every_run_and_in_every_group() -> None:
    rng = random.Random(3)
    group = [random_inputs(rng) for _ in range(4)]
    grads = [random_grads(rng, inputs) for inputs in group]
    powers = [random_power(rng, inputs) for inputs in group]
    first, again = (launch_fold_backward(group, grads, powers=powers) for _ in range(2))
    alone = [
        launch_fold_backward([inputs], [grad], powers=[power])[0]
        for inputs, grad, power in zip(group, grads, powers, strict=True)
    ]
    for one, two, three in zip(first, again, alone, strict=True):
        for a, b, c in zip(one, two, three, strict=True):
            if a is None or b is None or c is None:
                assert a is b is c is None
            else:
                assert torch.equal(a, b)
                assert torch.equal(a, c)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 448, 1000])
@pytest.mark.parametrize("transposed", [False, True])
def test_bias_gradient_in_rows(transposed: bool, rows: int) -> None:
    """Rows of db' give the gradients of their sum, up to the order of additions, also in a mixed group."""
    rng = random.Random(rows)
    inputs = pair(6, 6, 3, 3)._replace(transposed=transposed)
    weight, bias = torch.randn(inputs.weight.shape), torch.randn(rows, len(inputs.running_mean))
    other = random_inputs(rng)._replace(prescale=False)
    first, got, last = run_guarded([other, inputs, other], [(None, None), (weight, bias), (None, None)],
                                   [Needs()] * 3, KernelConfig())  # fmt: skip
    assert set(first) == set(last) == {None}
    assert_gradients(inputs, (weight, bias), got, Needs())


def test_gradients_keep_the_layout_of_their_parameters() -> None:
    weight = torch.randn(6, 5, 3, 3).contiguous(memory_format=torch.channels_last)
    inputs = FoldInputs(weight, None, None, None, torch.zeros(6), torch.ones(6), 1e-5)
    grad = torch.randn(6, 5, 3, 3)
    (got,) = launch_fold_backward([inputs], [(grad, None)])
    assert got.weight is not None
    assert got.weight.stride() == weight.stride()
    assert_gradients(inputs, (grad, None), got, Needs())


def test_only_what_is_needed_is_read() -> None:
    """A kernel has arguments for what it reads only. With a frozen BatchNorm it does not read the weight."""
    inputs = pair(4, 3)
    grads = (torch.ones(4, 3), torch.ones(4))

    def fields(*needed: str) -> set[str]:
        spec = grad_spec_of(inputs, *grads, Needs(*(field in needed for field in FIELDS)))
        return {a.field for a in generate_fold_backward((spec,)).arguments}

    scale = {"bn_weight", "running_var"}
    assert fields("weight") == scale | {"grad_weight", "d_weight"}
    assert fields("bias") == scale | {"grad_bias", "d_bias"}
    assert fields("bn_bias") == {"grad_bias", "d_bn_bias"}
    everything_but_gamma = {"grad_weight", "grad_bias", "weight", "bias", "running_mean", "running_var"}
    assert fields("bn_weight") == everything_but_gamma | {"d_bn_weight"}
    assert fields() == set()
    inputs = inputs._replace(prescale=True)
    assert fields("weight") == scale | {"grad_weight", "d_weight", "power"}
    assert fields("bn_bias") == {"grad_bias", "d_bn_bias", "power"}
    assert fields() == set()


def test_gradients_that_do_not_fit_raise() -> None:
    inputs = FoldInputs(torch.ones(4, 3), None, torch.ones(4), None, torch.zeros(4), torch.ones(4), 1e-5)
    for grad in (torch.ones(3, 4), torch.ones(3, 4).t(), torch.ones(4, 3, dtype=torch.int32)):
        with pytest.raises(Unsupported, match="weight gradient"):
            launch_fold_backward([inputs], [(grad, None)])
    with pytest.raises(Unsupported, match="bias gradient"):
        launch_fold_backward([inputs], [(None, torch.ones(8)[::2])])


@pytest.mark.parametrize("prescale", [False, True])
def test_powers_that_do_not_fit_raise(prescale: bool) -> None:
    inputs, half = pair(4, 3)._replace(prescale=prescale), torch.ones(4).half()
    check_power(inputs, half if prescale else None)
    for power in (None, torch.ones(4), half[:3], half.repeat(2)[::2]) if prescale else (half,):
        with pytest.raises(ValueError, match="powers of two"):
            check_power(inputs, power)


def test_channel_map_agrees_with_the_oracle() -> None:
    """The oracle computes channels independently of the spec. Both agree for every element."""
    rng = random.Random(11)
    for _ in range(30):
        inputs = random_inputs(rng, largest=6)
        spec = grad_spec_of(inputs, inputs.weight, None, Needs()).pair
        n = spec.channels
        channels = expand_channels(torch.arange(n, dtype=torch.float64), inputs)
        layout = torch.empty_like(inputs.weight, dtype=torch.float64).copy_(channels)
        in_memory = layout.as_strided((layout.numel(),), (1,)).tolist()
        where = spec.channel_map(spec.weight_last)
        assert in_memory == [where.channel(e) for e in range(layout.numel())]
