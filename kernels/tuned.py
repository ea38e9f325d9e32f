"""Which configuration a launch runs with: what was tuned for its key on its GPU, else the default.

The tuned files are JSON, one an architecture: the user's own in the cache directory, which `triton-convbn tune` writes,
then the one that the package ships. Of a file the entries measured on this very GPU come first, then those ranked
offline; what was measured on another GPU is passed over. A file that cannot be read costs one warning and no more: a
configuration decides how fast a fold is, never what it gives.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import DEFAULT_CONFIG, KernelConfig
from .launch import CACHE_VARIABLE, cache_dir
from .spec import GradSpec, PairSpec, tuned_key

if TYPE_CHECKING:
    import torch

SCHEMA = 1
OFFLINE = "ranked by compiled facts (offline), not measured"
SHIPPED = Path(__file__).parent / "tuned"
LARGEST_BLOCK, MOST_THREADS = 2**16, 1024
"""Beyond these nothing compiles, whatever a file says."""

_GENERATOR = ("config.py", "codegen*.py", "kernel_source.py", "spec.py", "tree.py", "templates/*.py")


class BadTunedFile(ValueError):
    """A tuned file that is not one; the message says where it is and what is wrong."""


@dataclass(frozen=True)
class Entry:
    """The winner of one key.

    how: OFFLINE, or "measured on ..". device: the GPU's name where measured, else empty. cost, default_cost: in `unit`,
    of the problem that stood for the key. tried: configurations of it that have an outcome. sources: `generator_hash`.
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
        """Back from JSON. Raises: TypeError, ValueError or KeyError for what is none."""
        config = KernelConfig.from_dict(values["config"])
        if config.block > LARGEST_BLOCK or config.threads > MOST_THREADS:
            raise ValueError(f"{config.describe()} is more than a GPU has")
        entry = cls(**{**values, "config": config})
        if not isinstance(entry.key, str) or not isinstance(entry.device, str) or not isinstance(entry.sources, str):
            raise ValueError("key, device and sources are texts")
        return entry


@dataclass(frozen=True)
class Choice:
    """What is in force for a key. file: where it is from; None: the default. passed_over: entries that are not, why."""

    key: str
    config: KernelConfig
    file: Path | None
    why: str
    entry: Entry | None = None
    passed_over: tuple[str, ...] = ()


class Gpu(NamedTuple):
    """An architecture as the files are named, such as sm_90 or gfx942, and the GPU's name; empty where unknown."""

    arch: str = ""
    name: str = ""


# ---- the files -----------------------------------------------------------------------------------------------------


def user_file(arch: str) -> Path:
    """The user's tuned file. Raises: ImportError where no one knows, as `launch.cache_dir`."""
    return user_dir() / "tuned" / f"{arch}.json"


def user_dir() -> Path:
    """What is kept for the user beside the generated sources. Raises: ImportError, as `launch.cache_dir`."""
    sources = cache_dir()
    return sources if os.environ.get(CACHE_VARIABLE) else sources.parent


def shipped_file(arch: str) -> Path:
    return SHIPPED / f"{arch}.json"


def read(path: Path) -> tuple[Entry, ...]:
    """The entries of a tuned file. Raises: OSError where there is none, BadTunedFile."""
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
    """Put entries into a tuned file, in the place of those of the same key and GPU; the others stay.

    A reader sees the old file or the new one. Raises: OSError where it cannot be written.
    """
    try:
        kept = read(path)
    except (OSError, BadTunedFile):
        kept = ()
    merged = {(entry.key, entry.device): entry for entry in (*kept, *entries)}
    ordered = [merged[at] for at in sorted(merged)]
    content = {"schema": SCHEMA, "arch": arch, "entries": [asdict(entry) for entry in ordered]}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own is for this user alone
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    forget()


@functools.lru_cache(maxsize=64)
def _entries(path: Path) -> tuple[Entry, ...]:
    """Of a file, read once a process and so complained of once; none where it is not there."""
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except (OSError, BadTunedFile) as error:
        why = str(error) if isinstance(error, BadTunedFile) else f"{path} cannot be read: {error}"
        warnings.warn(f"{why}; folds run as if it were not there", RuntimeWarning, stacklevel=2)
        return ()


@functools.cache
def generator_hash() -> str:
    """Of the sources that decide what a kernel's text is: a ranking is of these and of no others."""
    digest = hashlib.sha256()
    for pattern in _GENERATOR:
        for path in sorted(Path(__file__).parent.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# ---- the choice ----------------------------------------------------------------------------------------------------


def choose(key: str, gpu: Gpu) -> Choice:
    """The configuration for a key on a GPU, and why it is that one. Without an architecture: the default."""
    if not gpu.arch:
        return Choice(key, DEFAULT_CONFIG, None, "default: no GPU that anything was tuned for")
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
    """The tuned files of an architecture in the order of the lookup, there or not, with whose they are."""
    try:
        return [("the user's", user_file(arch)), ("shipped", shipped_file(arch))]
    except ImportError:
        return [("shipped", shipped_file(arch))]


def _unfit(entry: Entry, gpu: Gpu, whose: str) -> str:
    """Why an entry is not for this GPU and this version; empty where it is."""
    if entry.device and entry.device != gpu.name:
        return f"measured on {entry.device}" + (f", not on {gpu.name}" if gpu.name else "")
    # What is shipped was made with the sources beside it. The user's own outlives an update.
    if whose != "shipped" and entry.sources != generator_hash():
        return f"{entry.how}, with another version of the kernels: tune again"
    return ""


@functools.lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> Gpu:
    """Of tensors on that device; nothing for a CPU, and for GPUs of which no architecture is known."""
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
    """What a call of these specs on that device runs with. Files are read once a process."""
    gpu = gpu_of(device)
    return _config(tuple(specs), gpu) if gpu.arch else DEFAULT_CONFIG


when_forgotten: list[Callable[[], None]] = [_entries.cache_clear, _config.cache_clear]
"""Clears whatever remembers a choice."""


def digest() -> str:
    """Return a hash of every tuned file there is, for caches of code in which configurations are fixed."""
    found = hashlib.sha256()
    folders = [SHIPPED]
    with contextlib.suppress(ImportError):
        folders.append(user_dir() / "tuned")
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        with contextlib.suppress(OSError):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


def forget() -> None:
    """Read the tuned files anew at the next lookup."""
    for clear in when_forgotten:
        clear()
