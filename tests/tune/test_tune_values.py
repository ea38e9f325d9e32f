"""The check of a candidate's values: right kernels pass, in every dtype and direction, and wrong ones are told."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton_convbn.kernels.codegen import DEFAULT_CONFIG, generate
from triton_convbn.kernels.offline_cases import DTYPE_MIXES, pair
from triton_convbn.kernels.spec import PairSpec

from triton_convbn.tune.problem import Specs, backward_of
from triton_convbn.tune.values import Call

CPU = torch.device("cpu")


def pairs(mix: str) -> tuple[PairSpec, ...]:
    """A convolution with every parameter, one with none, and a transposed one."""
    every = pair(10, 6, 9, mix, conv_bias=True)
    return every, replace(every, bias=None, bn_weight=None, bn_bias=None), replace(every, transposed=True, groups=2)


def call(specs: Specs, **changes: str) -> str | None:
    """What is wrong with what the kernel computes, of whose text each key is replaced by its value."""
    source = generate(specs, DEFAULT_CONFIG)
    text = source.text
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    made: Any = Call(specs, CPU)
    made.run([(slice(0, len(specs)), replace(source, text=text))])
    return made.wrong()


@pytest.mark.parametrize("mix", DTYPE_MIXES)
def test_right_kernels(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert call(pairs(mix)) is None
    assert call(tuple(map(backward_of, pairs(mix)))) is None


@pytest.mark.parametrize(
    ("backward", "old", "new", "wrong"),
    [
        (False, "w * s", "w * s * 1.01", "out_weight of pair 0"),
        (False, "b *= reciprocal(q)", "b *= 1.0", "out_bias of pair 0"),
        (False, "q.to(out", "(q * 4).to(out", "out_power of pair 0"),
        (False, "q.to(out", "(q * 1.5).to(out", "out_power of pair 0"),
        (True, "deviation /= q", "deviation /= q * 2", "d_weight of pair 0"),
        (True, "gb /= q", "gb = gb", "d_bn_bias of pair 0"),
    ],
)
def test_wrong_kernels(backward: bool, old: str, new: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    specs: Specs = pairs("fp32_to_fp16")
    found = call(tuple(map(backward_of, specs)) if backward else specs, **{old: new})  # type: ignore[arg-type]
    assert found is not None
    assert found.startswith(wrong)
