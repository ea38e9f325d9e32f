"""Read facts off compiled kernels: registers, spills, instructions, widths of loads and stores."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any


def _ptx_parameter_bytes(ptx: str) -> int:
    """Return the bytes of the entry's parameters, each aligned to its size."""
    signature = ptx[ptx.index(".entry") :]
    end = 0
    for bits in re.findall(r"\.param \.[a-z](\d+)", signature[: signature.index(")")]):
        size = int(bits) // 8
        end += -end % size + size
    return end


def nvidia_facts(compiled: Any) -> dict[str, Any]:
    """Return the fields of KernelFacts that cuobjdump and the PTX tell."""
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
    """Return the bits that a global or buffer access moves: `dwordx4`, `b128`, `ushort`, `short_d16_hi`, `u16`, .."""
    if match := re.search(r"_dwordx(\d)", opcode):
        return 32 * int(match[1])
    if match := re.search(r"_[bui](8|16|32|64|96|128)\b", opcode):
        return int(match[1])
    return 8 if "byte" in opcode else 16 if "short" in opcode else 32


def amd_facts(compiled: Any) -> dict[str, Any]:
    """Return the fields of KernelFacts that the assembly and its metadata tell."""
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
