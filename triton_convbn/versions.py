"""The versions that a measurement belongs to: of installed packages, and of this code."""

import hashlib
import importlib
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def package_version(package: str) -> str:
    """Return the version of an installed package, under whatever name it was built; empty if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        pass
    try:
        return str(getattr(importlib.import_module(package), "__version__", ""))
    except ImportError:
        return ""


def commit() -> str:
    """Return the commit of this package's checkout; empty if it does not run from one.

    If the package's sources differ from the commit, a plus and a hash of the difference follow: "08c4223+1f0e".
    $TRITON_CONVBN_COMMIT overrides it where there is no git.
    """
    if given := os.environ.get("TRITON_CONVBN_COMMIT"):
        return given
    root = Path(__file__).resolve().parent.parent
    try:
        # A virtual environment may lie inside another repository, whose commit says nothing about this package.
        if Path(_git(root, "rev-parse", "--show-toplevel").decode().strip()).resolve() != root:
            return ""
        head = _git(root, "rev-parse", "--short", "HEAD").decode().strip()
        sources = ["triton_convbn", "kernels", "perf/*.py"]
        difference = _git(root, "diff", "HEAD", "--", *sources)
        for name in _git(root, "ls-files", "--others", "--exclude-standard", "--", *sources).decode().splitlines():
            difference += name.encode() + (root / name).read_bytes()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + (f"+{hashlib.sha256(difference).hexdigest()[:4]}" if difference else "")


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True).stdout
