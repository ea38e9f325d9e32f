"""The versions that a measurement belongs to: of installed packages, and of this code."""

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
    """Return the commit of the checkout, with a plus if the package's sources differ from it; empty for a wheel.

    $TRITON_CONVBN_COMMIT names it where there is no git.
    """
    if given := os.environ.get("TRITON_CONVBN_COMMIT"):
        return given
    git = ["git", "-C", str(Path(__file__).resolve().parent.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        sources = ["triton_convbn", "kernels", "perf/*.py"]
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *sources], capture_output=True).returncode
        return head.stdout.strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
