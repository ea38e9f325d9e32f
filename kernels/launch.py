"""Write, load and launch generated kernels.

Triton compiles only functions whose source is in a file, and users should be able to open the kernel that ran. So every
text is written to a content-addressed file in $TRITON_CONVBN_CACHE_DIR, or else in the user's cache directory. The
files are not trusted: Python executes the generated text, and a file that differs from it is replaced.
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

from .files import write_atomically
from .kernel_source import KernelSource

if TYPE_CHECKING:  # imported lazily: compiling kernels offline needs no torch
    import torch

CACHE_VARIABLE = "TRITON_CONVBN_CACHE_DIR"


# ---- the source cache ----------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """Return the directory of generated sources, without creating it. Raise ImportError without platformdirs."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("triton_convbn")) / "sources"


def _private(directory: Path) -> None:
    """Create `directory` for this user only. Raise OSError if another user owns it or may write to it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        status = directory.stat()
        if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"others may write there: chmod go-w, or set {CACHE_VARIABLE}")


def _write(directory: Path, name: str, text: str) -> Path:
    """Return `directory/name` after making sure that it contains `text`. Safe against concurrent writers."""
    _private(directory)
    path = directory / name
    data = text.encode()
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return path
    write_atomically(path, data)
    return path


@functools.cache
def _fallback_dir(why: str) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary directory of this process, and warn why. Cached, so that it warns once."""
    warnings.warn(f"{why}: generated kernels of this process go to a temporary directory", RuntimeWarning, stacklevel=2)
    return tempfile.TemporaryDirectory(prefix="triton_convbn-")


def write_source(source: KernelSource) -> Path:
    """Return the file of a generated kernel, writing it if needed."""
    name = f"{source.name}_{source.digest}.py"
    try:
        return _write(cache_dir(), name, source.text)
    except ImportError:
        why = f"platformdirs is not installed, and {CACHE_VARIABLE} is not set"
    except OSError as error:
        why = f"{cache_dir()} cannot be written ({error.strerror or error})"
    return _write(Path(_fallback_dir(why).name), name, source.text)


# ---- the loader ----------------------------------------------------------------------------------------------------


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), as CPU tensors require."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.lru_cache(maxsize=1024)
def _load(source: KernelSource, interpret: bool) -> Any:
    """Execute the text. `@triton.jit` chooses compiler or interpreter here, so each needs a module of its own."""
    path = write_source(source)
    module = types.ModuleType(f"triton_convbn_generated.{path.stem}")
    module.__file__ = str(path)
    exec(compile(source.text, str(path), "exec"), module.__dict__)
    return getattr(module, source.name)


def load(source: KernelSource) -> Any:
    """Return the jitted kernel of a source. Loaded once a process, and once more for the interpreter."""
    return _load(source, interpreted())


# ---- the launch ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def warp_size(device: torch.device) -> int:
    """Return the number of threads in a warp: 32, or 64 on AMD's CDNA."""
    if device.type == "cuda":
        import torch

        return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))
    return 32


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which `device` is current: Triton launches on the current device and stream."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    import torch

    return torch.get_device_module(device).device(device)


def launch(source: KernelSource, values: Sequence[Mapping[str, Any]], device: torch.device) -> None:
    """Launch a generated kernel on `device`. `values[i]` maps fields to the arguments of pair i, and may have more.

    Raises:
        RuntimeError: The tensors are on the CPU and the interpreter is off.
    """
    if source.programs:
        with on(device):
            run(source, [values[a.pair][a.field] for a in source.arguments], device)


def run(source: KernelSource, arguments: Sequence[Any], device: torch.device) -> None:
    """Launch a generated kernel with its arguments in order. `device` must be current, and `source.programs` positive.

    Raises:
        RuntimeError: The tensors are on the CPU and the interpreter is off.
    """
    interpret = interpreted()
    if device.type == "cpu" and not interpret:
        raise RuntimeError("Triton kernels on CPU tensors need the interpreter: set TRITON_INTERPRET=1")
    kernel = _load(source, interpret)
    kernel[(source.programs,)](*arguments, num_warps=max(1, source.config.threads // warp_size(device)))
