"""Specs of supported pairs, reasons for unsupported ones, and how pairs are split into launches."""

from __future__ import annotations

import random
import re

import pytest
import torch
from launches import launch_fold, launch_fold_backward
from pair_cases import pair
from triton_convbn.kernels.codegen import generate, generate_fold, generate_fold_backward
from triton_convbn.kernels.config import DEFAULT_CONFIG, plan_groups, split_launches
from triton_convbn.kernels.inputs import FoldInputs, Unsupported, grad_spec_of, spec_of, unsupported_reason
from triton_convbn.kernels.offline_cases import backward_of, resnet50
from triton_convbn.kernels.spec import ARGUMENT_LIMIT, GradSpec, Needs, PairSpec

REFUSED: dict[str, FoldInputs] = {
    "dimensions": pair(4, 3, weight=torch.ones(4)),
    "torch.int32": pair(4, 3, weight=torch.ones(4, 3, dtype=torch.int32)),
    "torch.complex64": pair(4, 3, running_mean=torch.ones(4, dtype=torch.complex64)),
    "strides": pair(4, 3, weight=torch.ones(3, 4).t()),
    "strides (6, 2)": pair(4, 3, weight=torch.ones(4, 6)[:, ::2]),
    "strides (0, 0)": pair(4, 3, weight=torch.ones(1, 1).expand(4, 3)),
    "bias has shape (5,)": pair(4, 3, bias=torch.ones(5)),
    "running_var has shape (4, 1)": pair(4, 3, running_var=torch.ones(4, 1)),
    "bn_weight is not contiguous": pair(4, 3, bn_weight=torch.ones(8)[::2]),
    "bn_bias is on meta": pair(4, 3, bn_bias=torch.ones(4, device="meta")),
    "in 3 groups": pair(4, 3, transposed=True, groups=3),
    "in 0 groups": pair(4, 3, transposed=True, groups=0),
    "shape (4,), expected (6,)": pair(4, 3, transposed=True, groups=2),
    "output dtype": pair(4, 3, out_dtype=torch.int8),
    "2-D weight": pair(4, 3, memory_format=torch.channels_last),
    "4-D weight": pair(4, 3, 2, 2, memory_format=torch.channels_last_3d),
    "weight is not an ordinary dense tensor": pair(4, 3, weight=torch.ones(4, 3).to_sparse()),
}


@pytest.mark.parametrize("words", REFUSED)
def test_unsupported_reason(words: str) -> None:
    reason = unsupported_reason(REFUSED[words])
    assert reason is not None
    assert words in reason
    with pytest.raises(Unsupported, match=re.escape(words)):
        launch_fold([REFUSED[words]])
    with pytest.raises(Unsupported, match=re.escape(words)):
        launch_fold_backward([REFUSED[words]], [(None, torch.ones(4))])


def test_supported() -> None:
    for inputs in (
        pair(4, 3),
        pair(4, 3, 2, 2, weight=torch.ones(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)),
        pair(4, 3, 2, 2, 2, memory_format=torch.channels_last_3d),
        pair(1, 1, bias=torch.ones(8)[::8]),  # the stride of one element is arbitrary
        pair(0, 3),
    ):
        assert unsupported_reason(inputs) is None


def test_equal_specs() -> None:
    """Layouts with the same order in memory, and groups of ordinary convolutions, have equal specs."""
    assert spec_of(pair(4, 3, 1, 1)) == spec_of(pair(4, 3, 1, 1, memory_format=torch.channels_last))
    assert spec_of(pair(4, 1, 3, 3)) == spec_of(pair(4, 1, 3, 3, memory_format=torch.channels_last, groups=4))
    assert spec_of(pair(4, 3, 3, 3)) != spec_of(pair(4, 3, 3, 3, memory_format=torch.channels_last))
    assert spec_of(pair(4, 3)) != spec_of(pair(4, 3, eps=1.0))
    assert hash(spec_of(pair(4, 3))) == hash(spec_of(pair(4, 3)))


def test_needs_are_limited_to_reached_gradients() -> None:
    inputs = pair(4, 3, bias=None)
    assert grad_spec_of(inputs, torch.ones(4, 3), None, Needs()).needs == (True, False, True, False)
    assert grad_spec_of(inputs, None, torch.ones(4), Needs()).needs == (False, False, True, True)
    assert grad_spec_of(inputs, None, None, Needs()).needs == (False, False, False, False)
    spec = spec_of(inputs)
    with pytest.raises(ValueError, match="no gradient reaches bias"):
        GradSpec(spec, "fp32", "fp32", False, Needs(True, True, True, True))


def test_resnet50_takes_four_launches() -> None:
    pairs = resnet50()
    assert len(pairs) == 53
    assert sum(p.numel for p in pairs) == 23_454_912  # torchvision's resnet50, its convolutions
    assert [len(g) for g in plan_groups(pairs, 16)] == [16, 16, 16, 5]
    assert [len(g) for g in plan_groups([backward_of(p) for p in pairs], 16)] == [16, 16, 16, 5]


def test_groups_keep_order_and_limits() -> None:
    pairs = resnet50()
    for budget in (None, 1, 2**20, 2**23, 2**30):
        for max_pairs in (1, 3, 100):
            groups = plan_groups(pairs, max_pairs, budget)
            assert [i for g in groups for i in g] == list(range(53))
            for group in groups:
                assert len(group) <= max_pairs
                written = sum(pairs[i].written_bytes for i in group)
                assert budget is None or written <= budget or len(group) == 1
    assert plan_groups([], 16) == []
    with pytest.raises(ValueError, match="max_pairs"):
        plan_groups(pairs, 0)


def random_spec(rng: random.Random) -> GradSpec:
    """Return the backward spec of a random pair, which may be empty, with random gradients."""
    bias, bn_weight, bn_bias, grad_weight, grad_bias = (rng.choice((None, "fp32", "fp64")) for _ in range(5))
    rows, cols = rng.choice(((4, 3), (4, 3), (4, 0), (0, 3)))
    spec = PairSpec(rows, cols, 1, *["fp32"] * 4, bias, bn_weight, bn_bias, prescale=rng.random() < 0.5)
    reached = (grad_weight, grad_bias and bias, (grad_weight or grad_bias) and bn_weight, grad_bias and bn_bias)
    needs = Needs(*(bool(possible) and rng.random() < 0.7 for possible in reached))
    return GradSpec(spec, grad_weight, grad_bias, False, needs)


def test_spec_counts_the_kernel_arguments() -> None:
    rng = random.Random(0)
    for spec in (random_spec(rng) for _ in range(500)):
        assert spec.arguments == len(generate_fold_backward((spec,)).arguments), spec
        assert spec.pair.arguments == len(generate_fold((spec.pair,)).arguments), spec.pair


@pytest.mark.parametrize("limit", [ARGUMENT_LIMIT, 119, 1])
def test_launches_respect_the_argument_limit(limit: int) -> None:
    """Launches are as few as possible: a pair starts one only if it does not fit into the previous one."""
    rng = random.Random(limit)
    grads = [random_spec(rng) for _ in range(200)]
    for specs in (grads, [spec.pair for spec in grads]):
        parts = split_launches(specs, DEFAULT_CONFIG, limit)
        assert [i for part in parts for i in range(200)[part]] == list(range(200))
        sizes = [sum(spec.arguments for spec in specs[part]) for part in parts]
        for part, size, after in zip(parts, sizes, [*parts[1:], None], strict=True):
            assert size <= limit or part.stop - part.start == 1
            assert after is None or size + specs[after.start].arguments > limit
            if limit == ARGUMENT_LIMIT:
                assert generate(tuple(specs[part])).parameter_bytes <= 4096
