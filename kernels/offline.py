"""Compiles a generated kernel for a GPU that is not there, and reads the facts off what the compiler made.

Nothing here ran on a GPU: the facts are those of Triton's own ptxas and LLVM, labelled "compiled offline". The pointers
are specialised by Triton's own function, on the alignment that PyTorch's allocators give (512 bytes). torch itself is
not imported, so that a process that compiles starts in half a second.

    python -m triton_convbn.kernels.offline --csv FILE [--arch sm_90 ...] [--case NAME ...]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .codegen import Argument, KernelSource
from .launch import load

CUDA_ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
HIP_WARP = {"gfx90a": 64, "gfx942": 64, "gfx1100": 32}
ARCHS = CUDA_ARCHS + tuple(HIP_WARP)
TORCH_NAMES = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16", "fp64": "torch.float64"}


@dataclass(frozen=True)
class KernelFacts:
    """What one architecture's compiler made of one kernel. None where that target cannot say."""

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
    """Stands for a tensor in front of Triton's specialisation: dtype by torch's name, aligned address, extent."""

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
    """(type, attributes) of an argument, as a launch on real tensors would have them."""
    from triton._C.libtriton import native_specialize_impl

    pointer = _Pointer(TORCH_NAMES[argument.dtype], argument.bytes)
    kind, attributes = native_specialize_impl(type(backend), pointer, False, True, True)
    return kind, backend.parse_attr(attributes)


@contextlib.contextmanager
def _active(target: Any) -> Iterator[None]:
    """Makes `target` what a kernel learns of its target from `tl.target_info`, which asks the active driver."""
    from triton.runtime import driver

    before = driver._active  # not `driver.active`, which would look for a GPU
    driver.set_active(types.SimpleNamespace(get_current_target=lambda: target))
    try:
        yield
    finally:
        driver.set_active(before)


def _compile(source: KernelSource, arch: str) -> tuple[Any, int, float]:
    """(Triton's compiled kernel, warps, CPU seconds). Always compiles; leaves nothing in the user's Triton cache."""
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


def _ptx_parameter_bytes(ptx: str) -> int:
    """Bytes of the entry's parameters, each aligned to its size."""
    signature = ptx[ptx.index(".entry") :]
    end = 0
    for bits in re.findall(r"\.param \.[a-z](\d+)", signature[: signature.index(")")]):
        size = int(bits) // 8
        end += -end % size + size
    return end


def _nvidia_facts(compiled: Any) -> dict[str, Any]:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(*options: str) -> str:
            command = [str(cuobjdump), *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("-res-usage"), dump("-sass")
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.MULTILINE)
    if not opcodes or "REG" not in resources:
        raise RuntimeError("cuobjdump printed no instructions or no resource usage")

    def widths(name: str) -> dict[int, int]:
        found: Counter[int] = Counter()
        for opcode in opcodes:
            if opcode.split(".")[0] == name:
                bits = re.search(r"\.(?:[US])?(8|16|64|128|256)\b", opcode)
                found[int(bits[1]) if bits else 32] += 1
        return dict(sorted(found.items()))

    return {
        "registers": resources["REG"],
        "spills": sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes),
        "shared_bytes": resources["SHARED"],
        "loads": widths("LDG"),
        "stores": widths("STG"),
        "instructions": sum(opcode != "NOP" for opcode in opcodes),
        "parameter_bytes": _ptx_parameter_bytes(compiled.asm["ptx"]),
        "scalar_registers": None,
    }


def _amd_width(opcode: str) -> int:
    """Bits that a global or buffer access moves: `dwordx4`, `b128`, `ushort`, `short_d16_hi`, `u16`, `d16_b16` .."""
    if match := re.search(r"_dwordx(\d)", opcode):
        return 32 * int(match[1])
    if match := re.search(r"_[bui](8|16|32|64|96|128)\b", opcode):
        return int(match[1])
    return 8 if "byte" in opcode else 16 if "short" in opcode else 32


def _amd_facts(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    metadata = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    opcodes = re.findall(r"^\t((?:[sv]|global|buffer|flat|ds|scratch)_\w+)", text, re.MULTILINE)

    def widths(kind: str) -> dict[int, int]:
        found = Counter(_amd_width(o) for o in opcodes if re.match(rf"(?:global|buffer|flat)_{kind}_", o))
        return dict(sorted(found.items()))

    return {
        "registers": metadata["vgpr_count"],
        "spills": metadata["vgpr_spill_count"] + metadata["sgpr_spill_count"],
        "shared_bytes": metadata["group_segment_fixed_size"],
        "loads": widths("load"),
        "stores": widths("store"),
        "instructions": len(opcodes),
        "parameter_bytes": metadata["kernarg_segment_size"],
        "scalar_registers": metadata["sgpr_count"],
    }


def facts(source: KernelSource, arch: str) -> KernelFacts:
    """Compile `source` for `arch` (one of ARCHS, or any sm_NN that Triton knows) and read off its facts.

    Needs no GPU and no driver. Raises ValueError for an unknown architecture, and what Triton raises if it fails.
    """
    import triton

    compiled, warps, seconds = _compile(source, arch)
    found = _amd_facts(compiled) if arch in HIP_WARP else _nvidia_facts(compiled)
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
    """One CSV cell: `32:24 128:14` for counts by width, `32 128` for widths."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{count}" for key, count in value.items())
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the matrix into a CSV file, saved after every row; a kernel that fails keeps its row, with the error.

    Rows that are there already, of the same generated text and the same Triton, are kept, so a stopped run goes on.
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
    """Replace the file by all rows, in the order of the matrix; a reader sees the old file or the new one."""
    from .offline_cases import CASES

    position = {case: number for number, case in enumerate(CASES)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["case", *(f.name for f in dataclasses.fields(KernelFacts)), "error"])
        writer.writeheader()
        for key in sorted(rows, key=lambda key: (position.get(key[0], len(position)), ARCHS.index(key[1]))):
            writer.writerow(rows[key])
    temporary.replace(path)


def _fresh_row(case: str, source: KernelSource, arch: str) -> tuple[dict[str, Any], str]:
    """(a CSV row, a few words on it) of one compilation, failed or not."""
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
