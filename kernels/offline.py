"""Compile generated kernels for a GPU that need not be there, and report facts about the machine code.

Nothing runs on a GPU: the facts come from Triton's ptxas and LLVM and are labelled "compiled offline". Triton's own
function specialises pointers for the alignment of PyTorch's allocators, 512 bytes. torch is not imported, so that a
process that compiles starts in half a second.

    python -m triton_convbn.kernels.offline --csv FILE [--arch sm_90 ...] [--case NAME ...]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .disassembly import amd_facts, nvidia_facts
from .files import write_atomically
from .kernel_source import Argument, KernelSource
from .launch import load

CUDA_ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
HIP_WARP = {"gfx90a": 64, "gfx942": 64, "gfx1100": 32}
ARCHS = CUDA_ARCHS + tuple(HIP_WARP)
TORCH_NAMES = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16", "fp64": "torch.float64"}


@dataclass(frozen=True)
class KernelFacts:
    """Facts about one kernel compiled for one architecture. None if the target does not report a fact."""

    kernel: str
    digest: str  # of the generated text
    arch: str
    how: str  # always "compiled offline"
    programs: int
    warps: int
    registers: int  # of a thread; vector registers on AMD
    spills: int  # NVIDIA: instructions on local memory. AMD: spilled registers, scalar and vector
    shared_bytes: int
    load_bits: tuple[int, ...]  # widths of global loads, ascending
    store_bits: tuple[int, ...]
    loads: Mapping[int, int]  # global load instructions by width in bits
    stores: Mapping[int, int]
    instructions: int
    parameter_bytes: int  # what the compiler laid out, Triton's own parameters included
    scalar_registers: int | None  # AMD only
    bytes_read: int  # by the whole launch, from the generated structure: every tensor once
    bytes_written: int
    compile_seconds: float  # of a core, ptxas included: other processes on the machine do not count
    triton: str


@dataclass
class _Pointer:
    """A stand-in for a tensor in Triton's specialisation: the dtype by torch's name, an aligned address, the extent."""

    dtype: str
    extent: int

    def data_ptr(self) -> int:
        return 512

    def ptr_range(self) -> int:
        return self.extent


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if arch in HIP_WARP:
        return GPUTarget("hip", arch, HIP_WARP[arch])
    if re.fullmatch(r"sm_\d+", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    raise ValueError(f"unknown architecture {arch!r}; known are {', '.join(ARCHS)}")


def _specialise(backend: Any, argument: Argument) -> tuple[str, Any]:
    """Return the type and the attributes that a launch on real tensors gives an argument."""
    from triton._C.libtriton import native_specialize_impl

    pointer = _Pointer(TORCH_NAMES[argument.dtype], argument.bytes)
    kind, attributes = native_specialize_impl(type(backend), pointer, False, True, True)
    return kind, backend.parse_attr(attributes)


@contextlib.contextmanager
def _active(target: Any) -> Iterator[None]:
    """Make `tl.target_info`, which reads the active driver, report `target`."""
    from triton.runtime import driver

    before = driver._active  # not `driver.active`, which would look for a GPU
    driver.set_active(types.SimpleNamespace(get_current_target=lambda: target))
    try:
        yield
    finally:
        driver.set_active(before)


def _compile(source: KernelSource, arch: str) -> tuple[Any, int, float]:
    """Return Triton's compiled kernel, its warps, and the CPU seconds. Triton's cache is neither read nor written."""
    import triton
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    target = _target(arch)
    backend = make_backend(target)
    warps = max(1, source.config.threads // target.warp_size)
    kinds = [_specialise(backend, argument) for argument in source.arguments]
    with (
        tempfile.TemporaryDirectory() as cache,
        triton.knobs.runtime.scope(),
        triton.knobs.cache.scope(),
        _active(target),
    ):
        triton.knobs.runtime.interpret = False
        triton.knobs.cache.dir = cache
        ast = ASTSource(
            load(source),
            {argument.name: kind for argument, (kind, _) in zip(source.arguments, kinds, strict=True)},
            {},
            {(i,): attributes for i, (_, attributes) in enumerate(kinds) if attributes},
        )
        start = sum(os.times()[:4])
        compiled = triton.compile(ast, target=target, options={"num_warps": warps})
        return compiled, warps, sum(os.times()[:4]) - start


def facts(source: KernelSource, arch: str) -> KernelFacts:
    """Return the facts of `source` compiled for `arch`: one of ARCHS, or any sm_NN that Triton knows.

    Needs no GPU and no driver.

    Raises:
        ValueError: The architecture is unknown. Errors of Triton's compiler are raised as they are.
    """
    import triton

    compiled, warps, seconds = _compile(source, arch)
    found = amd_facts(compiled) if arch in HIP_WARP else nvidia_facts(compiled)
    return KernelFacts(
        kernel=source.name,
        digest=source.digest,
        arch=arch,
        how="compiled offline",
        programs=source.programs,
        warps=warps,
        load_bits=tuple(found["loads"]),
        store_bits=tuple(found["stores"]),
        bytes_read=source.bytes_read,
        bytes_written=source.bytes_written,
        compile_seconds=round(seconds, 2),
        triton=triton.__version__,
        **found,
    )


def _cell(value: Any) -> Any:
    """Return a CSV cell: `32:24 128:14` for counts by width, `32 128` for widths."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{count}" for key, count in value.items())
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the matrix into a CSV file, saved after every row. A kernel that fails gets a row with the error.

    Rows of the same generated text and the same Triton are kept, so that the same command resumes a stopped run.
    """
    import triton

    from .offline_cases import CASES

    parser = argparse.ArgumentParser(prog="python -m triton_convbn.kernels.offline", description=main.__doc__)
    parser.add_argument("--csv", required=True, type=Path, help="file to write")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="default: all")
    options = parser.parse_args(arguments)
    wanted = [(case, arch) for case in options.case or CASES for arch in options.arch or ARCHS]

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    if options.csv.exists():
        with options.csv.open(newline="") as file:
            rows = {(row["case"], row["arch"]): row for row in csv.DictReader(file)}
    failed = 0
    for number, (case, arch) in enumerate(wanted):
        source = CASES[case]()
        old = rows.get((case, arch), {})
        if (old.get("digest"), old.get("triton"), old.get("error")) == (source.digest, triton.__version__, ""):
            continue
        rows[case, arch], note = _fresh_row(case, source, arch)
        failed += "error" in rows[case, arch]
        print(f"[{number + 1}/{len(wanted)}] {case} {arch}: {note}", file=sys.stderr)
        _save(options.csv, rows)
    return 1 if failed else 0


def _save(path: Path, rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """Replace the file with all rows, in the order of the matrix."""
    from .offline_cases import CASES

    position = {case: number for number, case in enumerate(CASES)}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["case", *(f.name for f in dataclasses.fields(KernelFacts)), "error"])
    writer.writeheader()
    for key in sorted(rows, key=lambda key: (position.get(key[0], len(position)), ARCHS.index(key[1]))):
        writer.writerow(rows[key])
    write_atomically(path, text.getvalue().encode(), mode=0o644)


def _fresh_row(case: str, source: KernelSource, arch: str) -> tuple[dict[str, Any], str]:
    """Return the CSV row of one compilation, failed or not, and a note on it."""
    row: dict[str, Any] = {"case": case, "kernel": source.name, "arch": arch, "how": "compiled offline"}
    try:
        found = dataclasses.asdict(facts(source, arch))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        return row, row["error"]
    note = f"{found['registers']} registers, {found['spills']} spills, {found['compile_seconds']:.1f} s"
    return row | {key: _cell(value) for key, value in found.items()}, note


if __name__ == "__main__":
    sys.exit(main())
