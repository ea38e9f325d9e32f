"""The fp64 oracle agrees with `ops.reference`, and tells wrong kernels from right ones."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from pair_cases import random_inputs, random_power
from triton_convbn.kernels.codegen import generate
from triton_convbn.kernels.kernel_call import KernelCall
from triton_convbn.kernels.offline_cases import DTYPE_MIXES, pair
from triton_convbn.kernels.spec import GradSpec, PairSpec, backward_of
from triton_convbn.kernels.testing import exact_gradients, fold_fp64

from triton_convbn.ops import reference


@pytest.mark.parametrize("seed", range(20))
def test_oracle_agrees_with_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    inputs = random_inputs(rng)
    power = random_power(rng, inputs)
    weight, bias, gamma, beta, mean, var = (None if t is None else t.double() for t in inputs[:6])
    assert weight is not None
    assert mean is not None
    assert var is not None
    if power is not None:
        gamma = (torch.ones_like(mean) if gamma is None else gamma) / power.double()
        beta = None if beta is None else beta / power.double()
    static = {"eps": inputs.eps, "transposed": inputs.transposed, "groups": inputs.groups}
    want = reference.fold_reference(weight, bias, gamma, beta, mean, var, **static)  # type: ignore[arg-type]
    torch.testing.assert_close(fold_fp64(inputs, power), want, rtol=1e-12, atol=1e-12)
    grads = torch.randn_like(want[0]), torch.randn_like(want[1])
    found = exact_gradients(inputs, *grads, power)
    gradients = reference.fold_backward_reference(*grads, weight, bias, gamma, beta, mean, var, **static)  # type: ignore[arg-type]
    q = 1 if power is None else power.double()
    for name, exact, over in zip(("weight", "bias", "bn_weight", "bn_bias"), gradients, (1, 1, q, q), strict=True):
        if name in found and exact is not None:
            torch.testing.assert_close(found[name].value, exact / over, rtol=1e-12, atol=1e-12)


def pairs(mix: str) -> tuple[PairSpec, ...]:
    """Return a convolution with every parameter, one with none, and a transposed one."""
    every = pair(10, 6, 9, mix, conv_bias=True)
    return every, replace(every, bias=None, bn_weight=None, bn_bias=None), replace(every, transposed=True, groups=2)


def wrong(specs: tuple[PairSpec, ...] | tuple[GradSpec, ...], **changes: str) -> str | None:
    """Return what is wrong with a kernel's outputs after each key in its text is replaced by its value."""
    source = generate(specs)
    text = source.text
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    call = KernelCall(specs, torch.device("cpu"))
    call.run([(slice(0, len(specs)), replace(source, text=text))])
    return call.wrong()


@pytest.mark.parametrize("mix", DTYPE_MIXES)
def test_right_kernels(mix: str) -> None:
    assert wrong(pairs(mix)) is None
    assert wrong(tuple(map(backward_of, pairs(mix)))) is None


@pytest.mark.parametrize(
    ("backward", "old", "new", "words"),
    [
        (False, "w * s", "w * s * 1.01", "out_weight of pair 0"),
        (False, "b *= reciprocal(q)", "b *= 1.0", "out_bias of pair 0"),
        (False, "q.to(out", "(q * 4).to(out", "out_power of pair 0"),
        (False, "q.to(out", "(q * 1.5).to(out", "out_power of pair 0"),
        (True, "deviation /= q", "deviation /= q * 2", "d_weight of pair 0"),
        (True, "gb /= q", "gb = gb", "d_bn_bias of pair 0"),
    ],
)
def test_wrong_kernels(backward: bool, old: str, new: str, words: str) -> None:
    specs = pairs("fp32_to_fp16")
    found = wrong(tuple(map(backward_of, specs)) if backward else specs, **{old: new})
    assert found is not None
    assert found.startswith(words)
