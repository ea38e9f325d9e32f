"""Tell CPUs of one name apart: what Linux knows of them, and torch does not."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Cpu(NamedTuple):
    """The identity of an x86 CPU, as its CPUID instruction gives it."""

    vendor: str
    family: int
    model: int


@cache
def cpu() -> Cpu | None:
    """Return what the CPU is, or None if the system or the architecture does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    found = [re.search(rf"^{name}\s*: (\w+)$", text, re.M) for name in ("vendor_id", "cpu family", "model")]
    if not all(found):
        return None
    vendor, family, model = (match[1] for match in found if match is not None)
    return Cpu(vendor, int(family), int(model))
