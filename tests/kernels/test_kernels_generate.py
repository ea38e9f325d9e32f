"""The text of generated kernels: goldens, arguments, digests.

TRITON_CONVBN_UPDATE_GOLDENS=1 rewrites the goldens.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_convbn.kernels.codegen import generate_fold, generate_fold_backward
from triton_convbn.kernels.config import KernelConfig
from triton_convbn.kernels.kernel_source import KernelSource
from triton_convbn.kernels.offline_cases import CASES, resnet50
from triton_convbn.kernels.spec import GradSpec, Needs, PairSpec

GOLDENS = Path(__file__).with_name("goldens")

CONV = PairSpec(64, 32, 9, "fp32", "fp16", "fp32", "fp32", bias="fp32", bn_weight="fp32", bn_bias="fp32")
TO_CHANNELS_LAST = PairSpec(33, 20, 9, "bf16", "bf16", "fp32", "fp32", bn_weight="fp32", out_last=True)
TRANSPOSED = PairSpec(6, 7, 4, "fp64", "fp64", "fp64", "fp64", bn_bias="fp64", transposed=True, groups=2)
EMPTY = PairSpec(5, 0, 1, "fp32", "fp32", "fp32", "fp32")

SOURCES = {
    "fold_one": lambda: generate_fold((CONV,)),
    "fold_group": lambda: generate_fold((CONV, TO_CHANNELS_LAST, TRANSPOSED, EMPTY), KernelConfig(block=256)),
    "fold_backward_one": lambda: generate_fold_backward((GradSpec(CONV, "fp16", "fp16", False, Needs()),)),
    "fold_backward_group": lambda: generate_fold_backward(
        (
            GradSpec(CONV, "fp16", None, True, Needs(True, False, True, False)),
            GradSpec(TO_CHANNELS_LAST, "bf16", "fp32", True, Needs(True, False, True, False), bias_rows=72),
            GradSpec(TRANSPOSED, "fp64", "fp64", False, Needs(True, False, False, True)),
            GradSpec(EMPTY, "fp32", "fp32", False, Needs(True, False, False, False)),
        )
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_golden(name: str) -> None:
    source: KernelSource = SOURCES[name]()
    golden = GOLDENS / f"{name}.txt"
    if os.environ.get("TRITON_CONVBN_UPDATE_GOLDENS"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(source.text)
    assert source.text == golden.read_text(), "set TRITON_CONVBN_UPDATE_GOLDENS=1 to accept the new text"


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_those_of_the_text(name: str) -> None:
    """Every text is valid Python. Its last function has the source's arguments, in order."""
    source = CASES[name]()
    kernel = ast.parse(source.text).body[-1]
    assert isinstance(kernel, ast.FunctionDef)
    assert kernel.name == source.name
    assert [a.arg for a in kernel.args.args] == [a.name for a in source.arguments]
    assert f"{source.programs} programs" in source.text


def test_text_depends_on_the_specs_alone() -> None:
    """A process with another hash seed generates the same text, so machines can share digests."""
    program = (
        "from triton_convbn.kernels.codegen import generate_fold; from triton_convbn.kernels.offline_cases import *;"
        "print(generate_fold(resnet50('fp16')[:16]).digest)"
    )
    command = [sys.executable, "-c", program]
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert other.stdout.strip() == generate_fold(resnet50("fp16")[:16]).digest


def test_programs_cover_the_elements_once() -> None:
    """ResNet-50 takes one program for each block of 1024 elements, and none for the biases alone."""
    pairs = resnet50()
    assert generate_fold(pairs).programs == sum(-(-p.numel // 1024) for p in pairs)


@pytest.mark.parametrize("size", [0, 3, 1000])
def test_config_requires_powers_of_two(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        KernelConfig(block=size)
    with pytest.raises(ValueError, match="power of two"):
        KernelConfig(threads=size)
