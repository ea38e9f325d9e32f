"""Run these tests on the GPU, or on the CPU in Triton's interpreter where there is none."""

import os

import pytest
import torch

# Import Triton before a test sets TRITON_INTERPRET. The import decides whether Triton's own jitted functions are
# compiled, and other tests of this process need them compiled.
import triton  # noqa: F401
from triton_convbn.perf.gpu.device import device_of


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> torch.device:
    """Return the current GPU, or the CPU with the interpreter switched on."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
    if interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setenv("TRITON_CONVBN_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "generated"))
    return device_of(interpreted)
