"""Kernels compiled offline for real architectures, in a process of its own without the interpreter.

The whole matrix is `triton-convbn dev offline`; here are the rows that matter most.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from triton_convbn.kernels import offline
from triton_convbn.kernels.disassembly import amd_facts
from triton_convbn.kernels.offline_cases import CASES

ARCHS = ("sm_80", "sm_90", "gfx942")
DTYPES = ("fp32", "fp16", "bf16")
FORWARD = [f"fold_resnet50_last16_{dtype}" for dtype in DTYPES]
BACKWARD = "fold_backward_resnet50_last16_fp32"
IN_ROWS = [f"fold_backward_resnet50_{which}16_bias_in_rows" for which in ("first", "last")]
IN_ONE_BUFFER = [f"fold_resnet50_{which}16_in_one_buffer" for which in ("first", "last")]


def compiled(path: Path, cases: list[str], archs: tuple[str, ...]) -> list[dict[str, str]]:
    command = [sys.executable, "-m", "triton_convbn", "dev", "offline", "--csv", str(path)]
    command += [word for case in cases for word in ("--case", case)] + [word for a in archs for word in ("--arch", a)]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, str]]:
    path = tmp_path_factory.mktemp("offline") / "facts.csv"
    cases = [
        *FORWARD,
        BACKWARD,
        *IN_ROWS,
        *IN_ONE_BUFFER,
        "fold_wide_offsets_fp16",
        "fold_to_channels_last_fp32",
        "fold_odd_sizes_fp16",
    ]
    return {(row["arch"], row["case"]): row for row in compiled(path, cases, ARCHS)}


def counts(cell: str) -> dict[int, int]:
    return {int(bits): int(count) for bits, count in (word.split(":") for word in cell.split())}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", [*FORWARD, BACKWARD, *IN_ROWS, *IN_ONE_BUFFER])
def test_resources_of_sixteen_pairs(rows: dict[tuple[str, str], dict[str, str]], arch: str, case: str) -> None:
    row = rows[arch, case]
    assert row["how"] == "compiled offline"
    assert int(row["spills"]) == 0
    assert 0 < int(row["registers"]) <= 64
    assert int(row["parameter_bytes"]) == CASES[case]().parameter_bytes < 4096


@pytest.mark.slow
def test_backward_does_not_unroll_on_amd(tmp_path: Path) -> None:
    """Unrolled, this is the hungriest: 93 registers, for 18 iterations of 2 loads of 2 x 128 bits in some pairs."""
    (row,) = compiled(tmp_path / "facts.csv", ["fold_backward_resnet50_last16_fp64"], ("gfx1100",))
    assert int(row["spills"]) == 0
    assert 0 < int(row["registers"]) <= 32
    assert counts(row["loads"])[128] == 2 * counts(row["stores"])[128] == 32


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", FORWARD)
def test_weights_move_sixteen_bytes_at_a_time(
    rows: dict[tuple[str, str], dict[str, str]], arch: str, case: str
) -> None:
    """8 elements a thread: 16 or 32 bytes, so one or two 128-bit accesses for each of the 16 weights, and no others.

    The biases of these pairs are at least 512 wide and vectorise too, which adds loads and stores of 128 bits or less;
    in fp16 so do the powers of two that a fold is over.
    """
    row = rows[arch, case]
    per_weight = 2 if case.endswith("fp32") else 1
    loads, stores = counts(row["loads"]), counts(row["stores"])
    assert loads[128] >= 16 * per_weight
    assert stores[128] >= 16 * per_weight
    # A weight that was read narrow would take at least 8 / per_weight times as many instructions.
    assert sum(stores.values()) <= 16 * per_weight * 2 + 16 * case.endswith("fp16")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", IN_ONE_BUFFER)
def test_parts_of_a_buffer_move_sixteen_bytes_at_a_time(
    rows: dict[tuple[str, str], dict[str, str]], arch: str, case: str
) -> None:
    """Where a part begins is a multiple of 16 elements."""
    assert set(counts(rows[arch, case]["stores"])) == {128}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_odd_sizes_keep_wide_accesses(rows: dict[tuple[str, str], dict[str, str]], arch: str) -> None:
    """36,963 elements: whole blocks are unmasked and wide, only the last block is narrow."""
    row = rows[arch, "fold_odd_sizes_fp16"]
    assert counts(row["loads"])[128] == 1
    assert counts(row["stores"])[128] == 1


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_other_layouts_and_wide_offsets_compile(rows: dict[tuple[str, str], dict[str, str]], arch: str) -> None:
    for case in ("fold_wide_offsets_fp16", "fold_to_channels_last_fp32"):
        row = rows[arch, case]
        assert int(row["spills"]) == 0
        assert int(row["registers"]) <= 64
        assert 128 in counts(row["stores"])  # in the output's order, whatever the input's


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'voodoo2'"):
        offline.facts(CASES["fold_one_channel"](), "voodoo2")


def test_widths_of_amd_accesses() -> None:
    loads = ["global_load_dwordx4", "buffer_load_dwordx2", "global_load_dword", "global_load_ushort", "global_load_u16"]
    loads += ["global_load_short_d16_hi", "global_load_b128", "global_load_d16_hi_b16", "global_load_ubyte"]
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "sgpr_count", "kernarg_segment_size")
    metadata = [f"    .{name}: 7" for name in (*names, "group_segment_fixed_size")]
    text = "\n".join([*(f"\t{opcode} v1" for opcode in [*loads, "buffer_store_b32"]), *metadata])
    found = amd_facts(SimpleNamespace(asm={"amdgcn": text}))
    assert found["loads"] == {8: 1, 16: 4, 32: 1, 64: 1, 128: 2}
    assert found["stores"] == {32: 1}
    assert (found["registers"], found["spills"], found["instructions"]) == (7, 14, 10)
