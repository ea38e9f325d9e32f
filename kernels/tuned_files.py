"""Read and write tuned files: JSON, one for each architecture.

The user's file is in the cache directory, where `triton-convbn tune` writes it. The package may ship another. A file
that cannot be read costs one warning: a configuration decides how fast a fold is, never what it computes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .config import KernelConfig
from .files import hash_files, locked_folder, write_atomically
from .launch import CACHE_VARIABLE, cache_dir

SCHEMA = 1
OFFLINE = "ranked by compiled facts (offline), not measured"
SHIPPED = Path(__file__).parent / "tuned"
LARGEST_BLOCK, MOST_THREADS = 2**16, 1024
"""Limits of an entry of a tuned file. No larger configuration compiles."""

_GENERATOR = ("config.py", "codegen*.py", "kernel_source.py", "*spec.py", "tree.py", "templates/*.py")


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


def files(arch: str) -> list[tuple[str, Path]]:
    """Return the owner and path of each tuned file of an architecture, in lookup order. They need not exist."""
    try:
        return [("the user's", user_file(arch)), ("shipped", shipped_file(arch))]
    except ImportError:
        return [("shipped", shipped_file(arch))]


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
    """Add entries to a tuned file, replacing those of the same key and GPU. A malformed file is replaced.

    Raise OSError if it cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked_folder(path.parent):  # the file itself is replaced
        try:
            kept = read(path)
        except (FileNotFoundError, BadTunedFile):
            kept = ()
        merged = {(entry.key, entry.device): entry for entry in (*kept, *entries)}
        ordered = [merged[at] for at in sorted(merged)]
        content = {"schema": SCHEMA, "arch": arch, "entries": [asdict(entry) for entry in ordered]}
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode(), mode=0o644)
    forget()


@functools.lru_cache(maxsize=64)
def known_entries(path: Path) -> tuple[Entry, ...]:
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


when_forgotten: list[Callable[[], None]] = [known_entries.cache_clear]
"""Functions that clear caches of what tuned files say."""


def forget() -> None:
    """Clear all caches, so that the next lookup reads the tuned files again."""
    for clear in when_forgotten:
        clear()
