"""Look up the configuration of a launch: the one tuned for its key on its GPU, else the default.

Tuned files are JSON, one for each architecture: first the user's, which `triton-convbn tune` writes to the cache
directory, then one shipped with the package, if there is any. Within a file, entries measured on this GPU come before
those ranked offline; entries measured on another GPU are passed over. A file that cannot be read costs one warning: a
configuration decides how fast a fold is, never what it computes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import DEFAULT_CONFIG, KernelConfig
from .files import hash_files, locked_folder, write_atomically
from .launch import CACHE_VARIABLE, cache_dir
from .spec import GradSpec, PairSpec, tuned_key

if TYPE_CHECKING:
    import torch

SCHEMA = 1
OFFLINE = "ranked by compiled facts (offline), not measured"
SHIPPED = Path(__file__).parent / "tuned"
LARGEST_BLOCK, MOST_THREADS = 2**16, 1024
"""No larger configuration compiles. A tuned file may name one."""

_GENERATOR = ("config.py", "codegen*.py", "kernel_source.py", "spec.py", "tree.py", "templates/*.py")


class BadTunedFile(ValueError):
    """A malformed tuned file. The message says where it is and what is wrong."""


@dataclass(frozen=True)
class Entry:
    """The winner of one key.

    Attributes:
        how: OFFLINE, or "measured on ..".
        device: The GPU's name if measured, else empty.
        cost, default_cost: In `unit`, of the problem that was searched for the key.
        tried: The number of its configurations with an outcome.
        sources: The `generator_hash` of the version that tuned.
    """

    key: str
    config: KernelConfig
    how: str = OFFLINE
    device: str = ""
    cost: float | None = None
    default_cost: float | None = None
    unit: str = ""
    problem: str = ""
    tried: int = 0
    torch: str = ""
    triton: str = ""
    sources: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Entry:
        """Return an entry from JSON. Raise TypeError, ValueError or KeyError for malformed values."""
        config = KernelConfig.from_dict(values["config"])
        if config.block > LARGEST_BLOCK or config.threads > MOST_THREADS:
            raise ValueError(f"{config.describe()} is more than a GPU has")
        entry = cls(**{**values, "config": config})
        if not isinstance(entry.key, str) or not isinstance(entry.device, str) or not isinstance(entry.sources, str):
            raise ValueError("key, device and sources are not all strings")
        return entry


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


# ---- the files -----------------------------------------------------------------------------------------------------


def user_file(arch: str) -> Path:
    """Return the user's tuned file. Raise ImportError without platformdirs, as `launch.cache_dir` does."""
    return user_dir() / "tuned" / f"{arch}.json"


def user_dir() -> Path:
    """Return the folder of the user's files, beside the generated sources. Raise as `launch.cache_dir`."""
    sources = cache_dir()
    return sources if os.environ.get(CACHE_VARIABLE) else sources.parent


def shipped_file(arch: str) -> Path:
    """Return the path of a file shipped with the package, which need not exist."""
    return SHIPPED / f"{arch}.json"


def read(path: Path) -> tuple[Entry, ...]:
    """Return the entries of a tuned file. Raise OSError if there is none, BadTunedFile if it is malformed."""
    try:
        content = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise BadTunedFile(f"{path} has schema {content['schema']!r}, this version reads {SCHEMA}")
        return tuple(map(Entry.from_dict, content["entries"]))
    except BadTunedFile:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise BadTunedFile(f"{path} is no tuned file: {type(error).__name__}: {error}") from error


def write(path: Path, arch: str, entries: Iterable[Entry]) -> None:
    """Add entries to a tuned file, replacing those of the same key and GPU. Raise OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked_folder(path.parent):  # the file itself is replaced
        try:
            kept = read(path)
        except (OSError, BadTunedFile):
            kept = ()
        merged = {(entry.key, entry.device): entry for entry in (*kept, *entries)}
        ordered = [merged[at] for at in sorted(merged)]
        content = {"schema": SCHEMA, "arch": arch, "entries": [asdict(entry) for entry in ordered]}
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode(), mode=0o644)
    forget()


@functools.lru_cache(maxsize=64)
def _entries(path: Path) -> tuple[Entry, ...]:
    """Return the entries of a file, none if it is absent or malformed. Cached, so that a process warns once."""
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except (OSError, BadTunedFile) as error:
        why = str(error) if isinstance(error, BadTunedFile) else f"{path} cannot be read: {error}"
        warnings.warn(f"{why}; folds run as if it were not there", RuntimeWarning, stacklevel=2)
        return ()


def generator_files() -> list[Path]:
    """Return the sources that determine a kernel's text."""
    return [path for pattern in _GENERATOR for path in sorted(Path(__file__).parent.glob(pattern))]


@functools.cache
def generator_hash() -> str:
    """Return a hash of the sources that determine a kernel's text. A ranking holds for one hash."""
    return hash_files(generator_files())


# ---- the choice ----------------------------------------------------------------------------------------------------


def choose(key: str, gpu: Gpu) -> Choice:
    """Return the configuration for a key on a GPU, and why. Without an architecture it is the default."""
    if not gpu.arch:
        return Choice(key, DEFAULT_CONFIG, None, "default: no known GPU architecture")
    passed_over: list[str] = []
    for whose, path in files(gpu.arch):
        found = [entry for entry in _entries(path) if entry.key == key]
        for entry in sorted(found, key=lambda entry: not entry.device):  # measured before ranked
            if reason := _unfit(entry, gpu, whose):
                passed_over.append(f"{path}: {reason}")
            else:
                return Choice(key, entry.config, path, f"{whose}: {entry.how}", entry, tuple(passed_over))
    return Choice(key, DEFAULT_CONFIG, None, "default: no tuned file has this key", None, tuple(passed_over))


def files(arch: str) -> list[tuple[str, Path]]:
    """Return the owner and path of each tuned file of an architecture, in lookup order. They need not exist."""
    try:
        return [("the user's", user_file(arch)), ("shipped", shipped_file(arch))]
    except ImportError:
        return [("shipped", shipped_file(arch))]


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


@functools.lru_cache(maxsize=1024)
def _config(specs: tuple[PairSpec | GradSpec, ...], gpu: Gpu) -> KernelConfig:
    return choose(tuned_key(specs), gpu).config


def config_for(specs: Sequence[PairSpec | GradSpec], device: torch.device) -> KernelConfig:
    """Return the configuration of a call of these specs on a device. Files are read once a process."""
    gpu = gpu_of(device)
    return _config(tuple(specs), gpu) if gpu.arch else DEFAULT_CONFIG


when_forgotten: list[Callable[[], None]] = [_entries.cache_clear, _config.cache_clear]
"""Functions that clear caches of choices."""


def digest() -> str:
    """Return a hash of all tuned files, for caches of code with fixed configurations."""
    found = hashlib.sha256()
    folders = [SHIPPED]
    with contextlib.suppress(ImportError):
        folders.append(user_dir() / "tuned")
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        with contextlib.suppress(OSError):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def forget() -> None:
    """Clear all caches, so that the next lookup reads the tuned files again."""
    for clear in when_forgotten:
        clear()
