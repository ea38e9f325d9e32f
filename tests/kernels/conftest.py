"""Run kernels in Triton's interpreter, on CPU tensors. Each test process has its own source cache."""

from __future__ import annotations

from pathlib import Path

import pytest

# Import Triton before a test sets TRITON_INTERPRET. The import decides whether Triton's own jitted functions are
# compiled, and other tests of this process need them compiled.
import triton  # noqa: F401


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Set TRITON_INTERPRET=1 during one test. Returns the source cache."""
    cache = tmp_path_factory.getbasetemp() / "generated"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CONVBN_CACHE_DIR", str(cache))
    return cache
