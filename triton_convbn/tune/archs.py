"""What the cost model knows of each architecture: limits of a multiprocessor, and one device that has it.

Written down from what these documents say, and not read off a device or compared with them again. Limits of a
multiprocessor: "Technical specifications per compute capability" of NVIDIA's CUDA C++ Programming
Guide, and AMD's ISA guides of CDNA 2, CDNA 3 and RDNA 3 (vector registers of a SIMD, and in which units a wave gets
them); multiprocessors, boost clock and memory bandwidth, the vendors' data sheets of the device named.
"""

from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class Arch:
    """A device of one architecture. AMD's words: a multiprocessor is a compute unit, a scheduler a SIMD, a warp a wave.

    bandwidth: of its memory, GB/s. clock: boost, GHz. registers: 32-bit ones of a scheduler, all lanes; a warp gets
    them in units of `register_unit`. shared: bytes of a multiprocessor. instruction_bytes: of one, on average on AMD.
    """

    name: str
    device: str
    multiprocessors: int
    clock: float
    bandwidth: float
    warps: int  # of a multiprocessor, at most
    blocks: int
    shared: int
    shared_block: int
    warp: int = 32
    schedulers: int = 4
    registers: int = 16384
    register_unit: int = 256
    thread_registers: int = 255
    threads: int = 1024  # of a block, at most
    instruction_bytes: int = 16


KB = 1024
_CDNA = {"warp": 64, "registers": 512 * 64, "register_unit": 8 * 64, "thread_registers": 512, "instruction_bytes": 8}
_RDNA3 = {"schedulers": 2, "registers": 1536 * 32, "register_unit": 24 * 32, "thread_registers": 256}

ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_75", "T4", 40, 1.59, 320, 32, 16, 64 * KB, 64 * KB),
        Arch("sm_80", "A100 SXM 80 GB", 108, 1.41, 2039, 64, 32, 164 * KB, 163 * KB),
        Arch("sm_86", "A10", 72, 1.70, 600, 48, 16, 100 * KB, 99 * KB),
        Arch("sm_89", "L40S", 142, 2.52, 864, 48, 24, 100 * KB, 99 * KB),
        Arch("sm_90", "H100 SXM", 132, 1.98, 3350, 64, 32, 228 * KB, 227 * KB),
        Arch("sm_100", "B200", 148, 1.97, 8000, 64, 32, 228 * KB, 227 * KB),
        Arch("sm_120", "RTX 5090", 170, 2.41, 1792, 48, 24, 100 * KB, 99 * KB),
        Arch("gfx90a", "MI250X, one die", 110, 1.70, 1638, 32, 32, 64 * KB, 64 * KB, **_CDNA),
        Arch("gfx942", "MI300X", 304, 2.10, 5300, 32, 32, 64 * KB, 64 * KB, **_CDNA),
        Arch("gfx1100", "RX 7900 XTX", 96, 2.50, 960, 32, 32, 64 * KB, 64 * KB, instruction_bytes=8, **_RDNA3),
    )
}


def arch_of(name: str) -> Arch:
    """Raises: UsageError, for one that the model does not know."""
    if name not in ARCHS:
        raise UsageError(f"no architecture {name!r}; known are {', '.join(ARCHS)}")
    return ARCHS[name]
