"""Fixtures of the benchmark's tests."""

import pytest
from bench_kit import Add, case, small
from torch import nn
from triton_convbn.perf import cases
from triton_convbn.perf.providers import PROVIDERS


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small case for the command line, by the name of its layers, and another."""
    monkeypatch.setitem(cases.LAYERS, "small", lambda: [small(inner=True)])
    other = case(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), name="other", inner=True)
    monkeypatch.setitem(cases.LAYERS, "other", lambda: [other])


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch) -> Add:
    """Makes a provider known by its name."""
    return lambda provider: monkeypatch.setitem(PROVIDERS, provider.name, provider)
