"""Turns a generated text into a kernel that can be launched: the source cache, the loader, the launch.

The text of every kernel is written to a content-addressed file, because Triton compiles only functions whose source it
finds in a file, and because a person should be able to open the kernel that ran. The directory is
$TRITON_CONVBN_CACHE_DIR, else the user's cache directory. Its files are never the authority: a file whose bytes differ
from the generated text is replaced, and what Python executes is the text, not the file.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import tempfile
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .codegen import KernelSource
from .files import write_atomically

if TYPE_CHECKING:  # imported where it is used: what compiles a kernel for another machine's GPU needs no torch
    import torch

CACHE_VARIABLE = "TRITON_CONVBN_CACHE_DIR"


# ---- the source cache ----------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Where generated sources go. Not created by asking. Raises: ImportError where no one knows, see `write_source`."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("triton_convbn")) / "sources"


def _private(directory: Path) -> None:
    """Create `directory` for this user alone; an OSError if it is someone else's or others may write to it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        status = directory.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{directory} is not private to this user")


def _write(directory: Path, name: str, text: str) -> Path:
    """`directory/name` with exactly `text`, whoever else writes it at the same time."""
    _private(directory)
    path = directory / name
    data = text.encode()
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return path
    write_atomically(path, data)
    return path


@functools.cache
def _fallback_dir() -> tempfile.TemporaryDirectory[str]:
    """A private directory for this process, gone when it ends; made at most once, so it is announced once."""
    try:
        why = f"{cache_dir()} cannot be written"
    except ImportError:
        why = f"platformdirs is not installed, and {CACHE_VARIABLE} is not set"
    warnings.warn(f"{why}: generated kernels of this process go to a temporary directory", RuntimeWarning, stacklevel=2)
    return tempfile.TemporaryDirectory(prefix="triton_convbn-")


def write_source(source: KernelSource) -> Path:
    """The file of a generated kernel, written if it is not there yet."""
    name = f"{source.name}_{source.digest}.py"
    try:
        return _write(cache_dir(), name, source.text)
    except (OSError, ImportError):  # a torch that came without this package's dependencies has no platformdirs
        return _write(Path(_fallback_dir().name), name, source.text)


# ---- the loader ----------------------------------------------------------------------------------------------------


def interpreted() -> bool:
    """Whether kernels loaded now run in Triton's interpreter (TRITON_INTERPRET=1), which is what CPU tensors need."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.lru_cache(maxsize=1024)
def _load(source: KernelSource, interpret: bool) -> Any:
    """`@triton.jit` decides between compiler and interpreter when it runs, so the two are different modules."""
    path = write_source(source)
    module = types.ModuleType(f"triton_convbn_generated.{path.stem}")
    module.__file__ = str(path)
    exec(compile(source.text, str(path), "exec"), module.__dict__)
    return getattr(module, source.name)


def load(source: KernelSource) -> Any:
    """The jitted kernel of a generated text, loaded once a process (and once more for the interpreter)."""
    return _load(source, interpreted())


# ---- the launch ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def warp_size(device: torch.device) -> int:
    """Threads of a warp: 32, or 64 on AMD's CDNA."""
    if device.type == "cuda":
        import torch

        return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))
    return 32


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` current, as Triton launches on the current device and its current stream."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    import torch

    return torch.get_device_module(device).device(device)


def launch(source: KernelSource, values: Sequence[Mapping[str, Any]], device: torch.device) -> None:
    """Launch a generated kernel on `device`. `values[i]` holds pair i's arguments by field, and may hold more.

    Raises: as `run`.
    """
    if source.programs:
        with on(device):
            run(source, [values[a.pair][a.field] for a in source.arguments], device)


def run(source: KernelSource, arguments: Sequence[Any], device: torch.device) -> None:
    """Launch a generated kernel that has programs, with its arguments in order. `device` must be the current one.

    Raises: RuntimeError for CPU tensors without the interpreter.
    """
    interpret = interpreted()
    if device.type == "cpu" and not interpret:
        raise RuntimeError("Triton kernels on CPU tensors need the interpreter: set TRITON_INTERPRET=1")
    kernel = _load(source, interpret)
    kernel[(source.programs,)](*arguments, num_warps=max(1, source.config.threads // warp_size(device)))
