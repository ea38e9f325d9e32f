"""Fixtures of the benchmark's tests."""

import pytest
from bench_kit import Add, case, small
from torch import nn
from triton_convbn.perf import workloads
from triton_convbn.perf.providers import PROVIDERS


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add two small cases to the names of --layers."""
    monkeypatch.setitem(workloads.LAYERS, "small", lambda: [small(inner=True)])
    other = case(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), name="other", inner=True)
    monkeypatch.setitem(workloads.LAYERS, "other", lambda: [other])


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Add:
    """Return a function that adds a provider."""
    return lambda provider: monkeypatch.setitem(PROVIDERS, provider.name, provider)
