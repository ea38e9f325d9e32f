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
    folders = (Path(__file__).parent, *map(Path, triton_convbn.kernels.__path__))
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
