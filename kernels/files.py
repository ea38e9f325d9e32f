"""Write, lock and hash files that several processes share."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write `data` to `path` by renaming a temporary file beside it, which is removed on failure."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(file: IO[Any] | int) -> Iterator[None]:
    """Hold an exclusive lock on an open file or descriptor. Without effect on Windows, which has no `fcntl`."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def append_line(path: Path, line: bytes) -> None:
    """Append a line in one write under a lock, on a line of its own even if a crash has cut the last one short."""
    with path.open("ab+", buffering=0) as file, locked(file):
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
        data = b"\n" * (end > 0 and file.read() != b"\n") + line + b"\n"
        if file.write(data) != len(data):
            raise OSError("only a part was written")


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder, for files that are read, changed and replaced. Leaves no file behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with locked(descriptor):
            yield
    finally:
        os.close(descriptor)


def hash_files(paths: Iterable[Path]) -> str:
    """Return a hash of the names and contents of files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
