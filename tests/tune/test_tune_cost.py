"""The cost model: occupancy as the vendors' calculators have it; what makes things worse is never cheaper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_convbn.kernels.codegen import KernelSource, Work
from triton_convbn.kernels.config import DEFAULT_CONFIG
from triton_convbn.kernels.offline import ARCHS as OFFLINE_ARCHS
from triton_convbn.kernels.offline import KernelFacts

from triton_convbn.errors import UsageError
from triton_convbn.tune.archs import ARCHS, arch_of
from triton_convbn.tune.cost import LATENCY, LAUNCH, Modelled, blocks_resident, modelled, over_limit


def facts(**changed: Any) -> KernelFacts:
    base = KernelFacts(
        kernel="fold_1", digest="", arch="sm_90", how="compiled offline", programs=4000, warps=4, registers=32,
        spills=0, shared_bytes=0, load_bits=(32, 128), store_bits=(128,), loads={32: 4, 128: 8}, stores={128: 4},
        instructions=200, parameter_bytes=80, scalar_registers=None, bytes_read=16_384_000, bytes_written=16_384_000,
        compile_seconds=1.0, triton="",
    )  # fmt: skip
    return replace(base, **changed)


def source(*work: Work) -> KernelSource:
    work = work or (Work(4000, 1, 4096),)
    return KernelSource("fold_1", "", sum(w.programs for w in work), (), DEFAULT_CONFIG, work, len(work))


def cost(kernel: KernelSource | None = None, arch: str = "sm_90", **changed: Any) -> Modelled:
    return modelled(kernel or source(), facts(**changed), ARCHS[arch])


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "blocks"),
    [
        ("sm_90", 4, 32, 0, 16),  # 64 warps of 4
        ("sm_90", 4, 40, 0, 12),  # 12 warps a scheduler, at 1280 registers each
        ("sm_90", 4, 255, 0, 2),
        ("sm_90", 1, 32, 0, 32),  # no more blocks than that
        ("sm_90", 4, 32, 50 * 1024, 4),  # 228 KB
        ("sm_80", 4, 32, 50 * 1024, 3),  # 164 KB
        ("sm_75", 4, 32, 0, 8),  # 32 warps
        ("sm_86", 8, 40, 0, 6),  # 48 warps
        ("gfx942", 2, 64, 0, 16),  # 8 waves a SIMD
        ("gfx942", 2, 128, 0, 8),  # 4 of 512 registers
        ("gfx1100", 4, 96, 0, 8),  # 16 waves of 1536 registers a SIMD
        ("gfx1100", 4, 97, 0, 6),  # 120 registers, in units of 24: 12 waves
    ],
)
def test_occupancy(arch: str, warps: int, registers: int, shared: int, blocks: int) -> None:
    found = facts(warps=warps, registers=registers, shared_bytes=shared)
    assert blocks_resident(found, ARCHS[arch]) == blocks


def test_every_offline_architecture_is_known() -> None:
    assert set(ARCHS) == set(OFFLINE_ARCHS)
    with pytest.raises(UsageError, match="no architecture 'gfx000'"):
        arch_of("gfx000")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"registers": 256}, "256 registers a thread, sm_90 has 255"),
        ({"warps": 64}, "2048 threads a block, sm_90 has 1024"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory"),
        ({"warps": 32, "registers": 255}, "no program fits on a multiprocessor of sm_90"),
        ({}, None),
    ],
)
def test_limits(changed: dict[str, Any], words: str | None) -> None:
    found = over_limit(facts(**changed), ARCHS["sm_90"])
    assert found is None if words is None else words in (found or "")


def test_a_full_device_is_held_by_its_memory() -> None:
    """A gigabyte: nothing but its bytes counts, within a few percent."""
    big = cost(source(Work(131072, 1, 4096)), bytes_read=2**29, bytes_written=2**29)
    assert big.memory == pytest.approx(2**30 / 3350e3, rel=1e-3)
    assert big.us == pytest.approx(big.memory, rel=0.05)
    assert 0.95 < big.share_of_bandwidth < 1


def test_an_empty_device_is_held_by_latency() -> None:
    """One program: it starts, loads and ends, however little it moves."""
    small = cost(source(Work(1, 1, 4096)), bytes_read=4096, bytes_written=4096)
    assert small.waves < 1
    assert LAUNCH + 2 * LATENCY < small.us < LAUNCH + 3 * LATENCY
    assert small.share_of_bandwidth < 0.01


works = st.builds(Work, st.integers(1, 20000), st.integers(1, 9), st.integers(8, 8192).map(lambda n: 2 * n))
base = st.fixed_dictionaries(
    {
        "registers": st.integers(24, 120),
        "warps": st.sampled_from([1, 2, 4, 8]),
        "bytes_read": st.integers(10**4, 10**9),
        "bytes_written": st.integers(10**4, 10**9),
        "instructions": st.integers(50, 5000),
    }
)


@settings(max_examples=60, deadline=None)
@given(work=st.lists(works, min_size=1, max_size=5), values=base, arch=st.sampled_from(sorted(ARCHS)))
def test_worse_is_never_cheaper(work: list[Work], values: dict[str, int], arch: str) -> None:
    kernel = source(*work)
    least = cost(kernel, arch, **values)
    assert cost(kernel, arch, **values) == least
    worse = {
        "more bytes": cost(kernel, arch, **{**values, "bytes_read": 2 * values["bytes_read"]}),
        "more instructions": cost(kernel, arch, **{**values, "instructions": values["instructions"] + 100}),
        "lower occupancy": cost(kernel, arch, **values, shared_bytes=30 * 1024),
        "narrower loads": cost(kernel, arch, **values, loads={32: 36}),
        "half of the bytes in flight, twice the passes": cost(
            source(*(Work(w.programs, 2 * w.passes, w.bytes_at_once // 2) for w in work)), arch, **values
        ),
    }
    for what, other in worse.items():
        assert other.us >= least.us - 1e-9, what
    faster = replace(ARCHS[arch], bandwidth=2 * ARCHS[arch].bandwidth, multiprocessors=2 * ARCHS[arch].multiprocessors)
    assert modelled(kernel, facts(**values), faster).us <= least.us + 1e-9


def test_two_launches_cost_more_than_one() -> None:
    half = cost(source(Work(2000, 1, 4096)), bytes_read=8_192_000, bytes_written=8_192_000)
    assert 2 * half.us > cost().us + LAUNCH
