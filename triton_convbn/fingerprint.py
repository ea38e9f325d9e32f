"""Identify the sources that a compiled graph was made by, for Inductor's caches."""

import hashlib
import platform
from functools import cache
from pathlib import Path

import torch

import triton_convbn.kernels


@cache
def sources() -> str:
    """Return a hash of every source file of the package, of torch's version and of Python's."""
    digest = hashlib.sha256(f"{torch.__version__} {platform.python_version()}".encode())
    # Resolved, as `rglob` does not enter folders that are links: of a linked checkout it saw 24 of 131 files, and the
    # cache returned graphs that an older pass had made.
    folders = [Path(folder).resolve() for folder in (Path(__file__).resolve().parent, *triton_convbn.kernels.__path__)]
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
