"""The header of a store: the GPU and the versions that its records hold for."""

import hashlib
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

from ..kernels import config
from ..kernels.tuned import Gpu, generator_hash
from ..versions import package_version

SCHEMA = 2


@dataclass(frozen=True)
class Header:
    """What the records of a file hold for. device: the GPU's name; empty if they are compiled offline."""

    arch: str
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    sources: str = ""
    schema: int = SCHEMA

    def differences(self, other: "Header") -> list[str]:
        """Return the fields in which this header, of a file, differs from `other`: "arch sm_80 (here sm_90)"."""
        return [
            f"{f.name} {getattr(self, f.name) or 'none'} (here {getattr(other, f.name) or 'none'})"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]

    @property
    def name(self) -> str:
        """Return a file name unique to this header, without suffix: "sm_90-0123456789ab"."""
        words = "\n".join(map(str, asdict(self).values()))
        return f"{self.arch}-{hashlib.sha256(words.encode()).hexdigest()[:12]}"


@cache
def source_hash() -> str:
    """Return a hash of the sources that a record depends on: those that generate, compile, check and time kernels."""
    digest = hashlib.sha256(generator_hash().encode())
    here, kernels = Path(__file__).parent, Path(config.__file__).parent
    names = [*(here / f"{name}.py" for name in ("candidate", "device", "offline"))]
    names += [kernels / f"{name}.py" for name in ("disassembly", "kernel_call", "offline", "testing")]
    for path in names:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def header_of(gpu: Gpu, measured: bool) -> Header:
    """Return the header of records made here and now for a GPU."""
    name, driver = "", ""
    if measured:
        import torch

        version = getattr(torch._C, "_cuda_getDriverVersion", str)  # absent from ROCm builds
        name, driver = gpu.name, str(torch.version.hip or version())
    return Header(gpu.arch, name, driver, package_version("torch"), package_version("triton"), source_hash())
