"""Look up the configuration of a call, the one tuned for its key on its GPU or else the default, and its kernels.

The user's tuned file comes before the shipped one. Within a file, entries measured on this GPU come before those ranked
offline. Entries measured on another GPU are passed over.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .codegen import generate
from .config import DEFAULT_CONFIG, KernelConfig, split_launches
from .kernel_source import KernelSource
from .spec import GradSpec, PairSpec
from .tuned_files import Entry, files, generator_hash, known_entries, when_forgotten

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Choice:
    """The configuration in force for a key.

    Attributes:
        file: Where it comes from; None for the default.
        passed_over: The unfit entries of the key, each with the reason.
    """

    key: str
    config: KernelConfig
    file: Path | None
    why: str
    entry: Entry | None = None
    passed_over: tuple[str, ...] = ()


class Gpu(NamedTuple):
    """An architecture, such as sm_90 or gfx942, and the GPU's name. Empty if unknown."""

    arch: str = ""
    name: str = ""


def choose(key: str, gpu: Gpu) -> Choice:
    """Return the configuration for a key on a GPU, and why. Without an architecture it is the default."""
    if not gpu.arch:
        return Choice(key, DEFAULT_CONFIG, None, "default: no known GPU architecture")
    passed_over: list[str] = []
    for whose, path in files(gpu.arch):
        found = [entry for entry in known_entries(path) if entry.key == key]
        for entry in sorted(found, key=lambda entry: not entry.device):  # measured before ranked
            if reason := _unfit(entry, gpu, whose):
                passed_over.append(f"{path}: {reason}")
            else:
                return Choice(key, entry.config, path, f"{whose}: {entry.how}", entry, tuple(passed_over))
    return Choice(key, DEFAULT_CONFIG, None, "default: no tuned file has this key", None, tuple(passed_over))


def _unfit(entry: Entry, gpu: Gpu, whose: str) -> str:
    """Return why an entry is unfit for this GPU and version; empty if it is fit."""
    if entry.device and entry.device != gpu.name:
        return f"measured on {entry.device}" + (f", not on {gpu.name}" if gpu.name else "")
    # A shipped file belongs to the sources beside it. The user's file outlives an update.
    if whose != "shipped" and entry.sources != generator_hash():
        return f"{entry.how}, with another version of the kernels: tune again"
    return ""


@functools.lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> Gpu:
    """Return the GPU of a device; an empty one for other devices than CUDA and ROCm."""
    if device.type != "cuda":
        return Gpu()
    import torch

    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Gpu(properties.gcnArchName.split(":")[0], properties.name)
    return Gpu(f"sm_{properties.major}{properties.minor}", properties.name)


# A launch with fewer elements than the first limit does not fill an H100. Above the second only bandwidth matters.
SIZE_CLASSES = (("small", 2**20), ("medium", 2**23))


def tuned_key(specs: Sequence[PairSpec | GradSpec]) -> str:
    """Return the key of a call in the tuned files: "direction/dtypes/size".

    The direction is fold or fold_backward. The dtypes are those of weight, BatchNorm and output, or just one if they
    agree; those of different pairs are joined by "+". The size is the class of the total number of weight elements. The
    key has no shapes or layouts, so that a configuration tuned for one model serves others.
    """
    pairs = [spec.pair if isinstance(spec, GradSpec) else spec for spec in specs]
    direction = "fold_backward" if any(isinstance(spec, GradSpec) for spec in specs) else "fold"
    mixes = set()
    for pair in pairs:
        mix = (pair.weight, pair.bn_weight or pair.running_var, pair.out)
        mixes.add(mix[0] if len(set(mix)) == 1 else "-".join(mix))
    elements = sum(pair.numel for pair in pairs)
    size = next((name for name, limit in SIZE_CLASSES if elements < limit), "large")
    return f"{direction}/{'+'.join(sorted(mixes))}/{size}"


@functools.lru_cache(maxsize=1024)
def _config(specs: tuple[PairSpec | GradSpec, ...], gpu: Gpu) -> KernelConfig:
    return choose(tuned_key(specs), gpu).config


def config_for(specs: Sequence[PairSpec | GradSpec], device: torch.device) -> KernelConfig:
    """Return the configuration of a call of these specs on a device. Files are read once a process."""
    gpu = gpu_of(device)
    return _config(tuple(specs), gpu) if gpu.arch else DEFAULT_CONFIG


def kernels_for(
    specs: tuple[PairSpec, ...] | tuple[GradSpec, ...], device: torch.device
) -> list[tuple[slice, KernelSource]]:
    """Return the kernels of a call on a device, forward or backward, each with the slice of pairs that it computes."""
    return kernels_of(specs, config_for(specs, device))


def kernels_of(
    specs: tuple[PairSpec, ...] | tuple[GradSpec, ...], config: KernelConfig
) -> list[tuple[slice, KernelSource]]:
    """Return the kernels of a call with this configuration, each with the slice of pairs that it computes."""
    return [(part, generate(specs[part], config)) for part in split_launches(specs, config)]


when_forgotten.append(_config.cache_clear)
