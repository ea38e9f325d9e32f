"""Problems and their configurations, and the reduced problems that are checked."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from triton_convbn.kernels.codegen import generate
from triton_convbn.kernels.config import DEFAULT_CONFIG, EVICTS, KernelConfig, split_launches
from triton_convbn.kernels.offline_cases import pair, resnet50
from triton_convbn.kernels.spec import backward_of
from triton_convbn.kernels.tuned import tuned_key

from triton_convbn.errors import UsageError
from triton_convbn.tune.evaluate import reduced
from triton_convbn.tune.problem import (
    FULL,
    QUICK,
    Problem,
    Space,
    configurations,
    largest_first,
    neighbours,
    problems_of_model,
)

PAIRS = resnet50()[:16]
FOLD = Problem(PAIRS)
BACKWARD = Problem(tuple(map(backward_of, PAIRS)))
MEASURED = replace(QUICK, evict=EVICTS)


# ---- configurations --------------------------------------------------------------------------------------------------


def test_configuration_to_text_and_back() -> None:
    config = KernelConfig(512, 64, "shared", 4, "loads", 8)
    assert KernelConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert KernelConfig.from_dict({}) == DEFAULT_CONFIG
    assert config.describe() == "512 elements, 64 threads, shared bodies, 4 rows, evict loads, 8 pairs a launch"
    assert DEFAULT_CONFIG.describe() == "1024 elements, 128 threads"
    assert len({config, replace(config), DEFAULT_CONFIG}) == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"blocks": 1024},
            "unknown field 'blocks' of a configuration; known: block, threads, emit, rows, evict, pairs_per_launch",
        ),
        ({"block": 1000}, "block is 1000, not a power of two"),
        ({"threads": True}, "threads is True, not a power of two"),
        ({"rows": "4"}, "rows is '4', not a power of two"),
        ({"emit": "loop"}, "emit is 'loop', not one of tree, shared"),
        ({"evict": None}, "evict is None, not one of none, loads"),
        ({"pairs_per_launch": 0}, "pairs_per_launch is 0, not a number of pairs"),
    ],
)
def test_a_bad_configuration_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KernelConfig.from_dict(values)


@pytest.mark.parametrize(("pairs", "sizes"), [(None, [16]), (64, [16]), (8, [8, 8]), (6, [6, 6, 4])])
def test_launches(pairs: int | None, sizes: list[int]) -> None:
    parts = split_launches(PAIRS, KernelConfig(pairs_per_launch=pairs))
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(16)[part]] == list(range(16))
    assert split_launches([], KernelConfig(pairs_per_launch=pairs)) == []


# ---- space -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [QUICK, FULL, MEASURED])
@pytest.mark.parametrize("problem", [FOLD, BACKWARD], ids=["fold", "fold_backward"])
def test_space(space: Space, problem: Problem) -> None:
    """The default is first, and no two generate the same kernels."""
    found = configurations(space, problem)
    assert found[0] == DEFAULT_CONFIG
    specs = problem.specs
    kernels = {tuple(generate(specs[p], c).digest for p in split_launches(specs, c)) for c in found}
    assert len(kernels) == len(found) == len(set(found))
    assert configurations(space, problem) == found
    # A hill climb that starts at the default can reach all of them.
    reached, new = {DEFAULT_CONFIG}, [DEFAULT_CONFIG]
    while new:
        steps = neighbours(space, problem, new.pop())
        assert set(steps) <= set(found)
        new += [step for step in dict.fromkeys(steps) if step not in reached]
        reached |= set(steps)
    assert reached == set(found)


def test_what_is_left_out() -> None:
    found = configurations(FULL, FOLD)
    assert KernelConfig(4096, 64) not in found  # 64 elements a thread
    assert KernelConfig(rows=1) not in found  # the same kernels as the default
    alone = Problem((pair(64, 64, 9),))
    assert all(c.emit == "tree" and c.pairs_per_launch is None for c in configurations(FULL, alone))


def test_hints_are_for_what_is_measured() -> None:
    assert {c.evict for c in configurations(QUICK, BACKWARD)} == {"none"}
    assert {c.evict for c in configurations(MEASURED, BACKWARD)} == set(EVICTS)


# ---- problems --------------------------------------------------------------------------------------------------------


def test_keys() -> None:
    assert FOLD.tuned_key == tuned_key(PAIRS) == "fold/fp32/small"
    assert BACKWARD.tuned_key == "fold_backward/fp32/small"
    assert tuned_key(resnet50("bf16_bn_fp32")[-16:]) == "fold/bf16-fp32-bf16/large"
    assert tuned_key((pair(1024, 2048, 1), pair(8, 8, 1, "fp16"))) == "fold/fp16+fp32/medium"
    assert Problem(PAIRS[:15]).key != FOLD.key
    assert FOLD.key == Problem(resnet50()[:16]).key
    assert FOLD.key.startswith("fold/fp32/small/")
    assert FOLD.describe() == "fold/fp32/small: 16 pairs, 0.66 M elements"


def test_largest_first() -> None:
    small, large = Problem((pair(64, 64, 1),)), Problem((pair(64, 64, 9),))
    assert small.tuned_key == large.tuned_key
    assert largest_first([small, BACKWARD, large, small]) == [large, small, BACKWARD]


@pytest.mark.parametrize("config", [DEFAULT_CONFIG, KernelConfig(256, emit="shared"), KernelConfig(4096, rows=4)])
def test_a_reduced_problem_is_small_and_takes_the_same_paths(config: KernelConfig) -> None:
    """ResNet-50 has 23 M elements. The last block of a pair stays full, or partly masked."""
    pairs = resnet50("fp16")
    for specs in (pairs, tuple(map(backward_of, pairs))):
        fewer = reduced(Problem(specs), config)
        assert fewer.elements < 250_000
        assert fewer.tuned_key == f"{tuned_key(specs).rpartition('/')[0]}/small"
    by_shape = {(spec.cols, spec.taps): spec for spec in reduced(Problem(pairs), config).specs}
    for spec in pairs:
        assert (by_shape[spec.cols, spec.taps].numel % config.block == 0) is (spec.numel % config.block == 0)


@pytest.mark.slow
def test_problems_of_a_model() -> None:
    found = problems_of_model("resnet18", "autocast_bfloat16")
    assert [problem.tuned_key for problem in found] == [
        "fold/fp32-fp32-bf16/medium",
        "fold_backward/fp32-fp32-bf16/medium",
    ]
    with pytest.raises(UsageError, match="no such dtype: fp8; choose from float32"):
        problems_of_model("resnet18", "fp8")
