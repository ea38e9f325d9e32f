"""Kernels run in Triton's interpreter here, on CPU tensors, each test process with a source cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

# Before any test sets TRITON_INTERPRET: Triton's own jitted functions are interpreted or compiled for good when it is
# imported, and this way other tests of the same process can still compile.
import triton  # noqa: F401


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TRITON_INTERPRET=1 for the length of one test. Returns the source cache."""
    cache = tmp_path_factory.getbasetemp() / "generated"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CONVBN_CACHE_DIR", str(cache))
    return cache
