"""Which configuration a launch runs with, and that nothing a tuned file holds or lacks changes what a fold gives."""

from __future__ import annotations

import errno
import itertools
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import launches
import pytest
import torch
from launches import launch_fold, launch_fold_backward
from pair_cases import assert_folded, pair
from triton_convbn.kernels import launch as launch_module
from triton_convbn.kernels import tuned, tuned_files
from triton_convbn.kernels.config import DEFAULT_CONFIG, KernelConfig
from triton_convbn.kernels.inputs import spec_of
from triton_convbn.kernels.tuned import Gpu, choose, config_for
from triton_convbn.kernels.tuned_files import OFFLINE, BadTunedFile, Entry, generator_hash
from triton_convbn.kernels.tuned_files import read as read_tuned
from triton_convbn.kernels.tuned_files import write as write_tuned

from triton_convbn.post_grad.manager import PostGradPass

H100, A100 = Gpu("sm_90", "NVIDIA H100"), Gpu("sm_80", "NVIDIA A100")
KEY = "fold/fp32/small"
SMALL, LARGE = KernelConfig(block=256, threads=64), KernelConfig(block=2048)


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache and shipped files of the test's own, and a CPU that passes for an H100."""
    monkeypatch.setenv("TRITON_CONVBN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned_files, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuned, "gpu_of", lambda device: H100)
    tuned_files.forget()
    launch_module._load.cache_clear()
    launch_module._fallback_dir.cache_clear()
    yield
    tuned_files.forget()
    launch_module._fallback_dir.cache_clear()


def entry(config: KernelConfig, **more: Any) -> Entry:
    return Entry(**{"key": KEY, "config": config, "sources": generator_hash()} | more)


def measured(config: KernelConfig, name: str = H100.name) -> Entry:
    return entry(config, device=name, how=f"measured on {name}")


def user(*entries: Entry) -> Path:
    write_tuned(tuned_files.user_file("sm_90"), "sm_90", entries)
    return tuned_files.user_file("sm_90")


def shipped(*entries: Entry) -> Path:
    write_tuned(tuned_files.shipped_file("sm_90"), "sm_90", entries)
    return tuned_files.shipped_file("sm_90")


# ---- the order ------------------------------------------------------------------------------------------------------


def test_the_default_where_nothing_was_tuned() -> None:
    choice = choose(KEY, H100)
    assert (choice.config, choice.file, choice.passed_over) == (DEFAULT_CONFIG, None, ())
    assert choice.why == "default: no tuned file has this key"
    assert choose(KEY, Gpu()).why == "default: no known GPU architecture"


def test_the_users_file_comes_before_the_shipped_one() -> None:
    path = shipped(entry(SMALL))
    choice = choose(KEY, H100)
    assert (choice.config, choice.file, choice.why) == (SMALL, path, f"shipped: {OFFLINE}")
    path = user(entry(LARGE))
    choice = choose(KEY, H100)
    assert (choice.config, choice.file, choice.why) == (LARGE, path, f"the user's: {OFFLINE}")
    assert choose("fold/fp16/small", H100).config == DEFAULT_CONFIG
    assert choose(KEY, A100).config == DEFAULT_CONFIG  # each architecture has its file


def test_of_a_file_what_was_measured_here_comes_first() -> None:
    user(entry(SMALL), measured(LARGE))
    assert choose(KEY, H100).config == LARGE
    other = choose(KEY, Gpu("sm_90", "NVIDIA H200"))
    assert other.config == SMALL
    assert other.passed_over == (
        f"{tuned_files.user_file('sm_90')}: measured on NVIDIA H100, not on NVIDIA H200",
    )  # results of another GPU are not taken silently
    assert choose(KEY, Gpu("sm_90")).config == SMALL


def test_the_users_file_of_another_version_is_passed_over() -> None:
    shipped(entry(SMALL, sources="whatever it was made with"))
    user(entry(LARGE, sources="of another version"))
    choice = choose(KEY, H100)
    assert choice.config == SMALL
    assert "with another version of the kernels: tune again" in choice.passed_over[0]


def test_write_keeps_the_other_entries() -> None:
    path = user(entry(SMALL), measured(LARGE))
    user(entry(LARGE), entry(SMALL, key="fold/fp16/small"))
    found = {(each.key, each.device): each.config for each in read_tuned(path)}
    assert found == {(KEY, ""): LARGE, (KEY, H100.name): LARGE, ("fold/fp16/small", ""): SMALL}
    assert [path.name for path in path.parent.iterdir()] == ["sm_90.json"]  # no temporary file


def test_two_writers_keep_each_others_entries(tmp_path: Path) -> None:
    """Without a lock 67 of 120 entries were left."""
    path = tmp_path / "sm_90.json"
    code = (
        "import sys; from pathlib import Path; from triton_convbn.kernels.tuned_files import *\n"
        "for i in range(40): write(Path(sys.argv[1]), 'sm_90', [Entry(f'fold/{sys.argv[2]}/{i}', KernelConfig())])"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b", "c")]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(read_tuned(path)) == 120


def test_inductors_cache_sees_the_tuned_files() -> None:
    """Code that Inductor keeps has its configurations fixed: other files are another key."""
    found = {PostGradPass().uuid()}
    user(entry(SMALL))
    found.add(PostGradPass().uuid())
    user(entry(LARGE))
    found |= {PostGradPass().uuid(), PostGradPass().uuid()}
    shipped(entry(SMALL))
    found.add(PostGradPass().uuid())
    assert len(found) == 4


def test_the_users_file_is_beside_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tuned_files.user_file("sm_90") == tmp_path / "cache" / "tuned" / "sm_90.json"
    monkeypatch.delenv("TRITON_CONVBN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tuned_files.user_file("sm_90") == Path("/somewhere/triton_convbn/tuned/sm_90.json")
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert [whose for whose, _ in tuned_files.files("sm_90")] == ["shipped"]


def test_no_gpu_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(tuned_files, "read", lambda path: pytest.fail("a file was read"))
    assert tuned.gpu_of(torch.device("cpu")) == Gpu()
    assert config_for([spec_of(pair(4, 3))], torch.device("cpu")) == DEFAULT_CONFIG


def test_the_gpu_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.undo()
    real = tuned.gpu_of.__wrapped__
    nvidia = SimpleNamespace(major=9, minor=0, name="NVIDIA H100")
    amd = SimpleNamespace(major=9, minor=4, name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-")
    for properties, hip, expected in ((nvidia, None, H100), (amd, "6.4", Gpu("gfx942", "AMD Instinct MI300X"))):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert real(torch.device("cuda", 0)) == expected
    assert real(torch.device("xpu", 0)) == Gpu()


# ---- launches -------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[KernelConfig]:
    """The configuration of every launch."""
    seen: list[KernelConfig] = []
    real = launch_module.launch

    def launch(source: Any, values: Any, device: Any) -> None:
        seen.append(source.config)
        real(source, values, device)

    monkeypatch.setattr(launches, "launch", launch)
    return seen


def test_a_fold_runs_with_what_is_in_force(launched: list[KernelConfig]) -> None:
    shipped(entry(SMALL), entry(LARGE, key="fold_backward/fp32/small"))
    inputs = pair(4, 3)
    ((weight, bias),) = launch_fold([inputs])
    launch_fold_backward([inputs], [(torch.ones_like(weight), torch.ones_like(bias))])
    assert launched == [SMALL, LARGE]
    launched.clear()
    launch_fold([inputs], KernelConfig(threads=256))  # who names one gets that one
    assert launched == [KernelConfig(threads=256)]


def assert_same(one: Sequence[Sequence[Any]], other: Sequence[Sequence[Any]]) -> None:
    """To the bit."""
    for tensors in zip(itertools.chain(*one), itertools.chain(*other), strict=True):
        assert tensors == (None, None) or torch.equal(*tensors)


def test_a_call_is_split_as_the_winner_says(launched: list[KernelConfig]) -> None:
    pairs = [pair(4 + i, 3) for i in range(5)]
    whole = launch_fold(pairs)
    shipped(
        entry(KernelConfig(pairs_per_launch=2)), entry(KernelConfig(pairs_per_launch=4), key="fold_backward/fp32/small")
    )
    launched.clear()
    split = launch_fold(pairs)
    assert len(launched) == 3
    assert_same(whole, split)
    for inputs, folded in zip(pairs, split, strict=True):
        assert_folded(inputs, *folded)
    grads = [(torch.randn_like(weight), torch.randn_like(bias)) for weight, bias in split]
    launched.clear()
    found = launch_fold_backward(pairs, grads)
    assert len(launched) == 2
    expected = launch_fold_backward(pairs, grads, config=DEFAULT_CONFIG)
    assert_same(expected, found)


# ---- files that are none --------------------------------------------------------------------------------------------

GOOD = {"key": KEY, "config": {"block": 512}, "sources": ""}
CORRUPT: dict[str, object] = {
    "empty": "",
    "cut short": json.dumps({"schema": 1, "entries": [GOOD]})[:-9],
    "bytes": "\0\1\2",
    "a list": [],
    "no entries": {"schema": 1},
    "another schema": {"schema": 2, "entries": []},
    "an entry that is none": {"schema": 1, "entries": [7]},
    "a field that there is not": {"schema": 1, "entries": [GOOD | {"colour": "red"}]},
    "a configuration that there is not": {"schema": 1, "entries": [GOOD | {"config": {"block": 1000}}]},
    "a block that nothing compiles": {"schema": 1, "entries": [GOOD | {"config": {"block": 2**40}}]},
    "more threads than a GPU has": {"schema": 1, "entries": [GOOD | {"config": {"threads": 2048}}]},
    "a key that is none": {"schema": 1, "entries": [GOOD | {"key": []}]},
    "nested": "[" * 100_000,
}


def assert_folds_on_the_default(launched: list[KernelConfig], warned: str) -> None:
    """Three folds, right, on the default, with one warning in all."""
    launched.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (4, 5, 6):
            inputs = pair(rows, 3)
            assert_folded(inputs, *launch_fold([inputs])[0])
    assert launched == [DEFAULT_CONFIG] * 3
    messages = [str(each.message) for each in caught]
    assert len(messages) == 1, messages
    assert warned in messages[0]
    assert "\n" not in messages[0]


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_file_costs_one_warning(content: object, launched: list[KernelConfig]) -> None:
    path = user(entry(SMALL))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    tuned_files.forget()
    with pytest.raises(BadTunedFile):
        read_tuned(path)
    assert_folds_on_the_default(launched, f"{path} ")


def test_after_a_corrupt_file_comes_the_shipped_one() -> None:
    shipped(entry(SMALL))
    user(entry(LARGE)).write_text("{")
    tuned_files.forget()
    with pytest.warns(RuntimeWarning, match="is no tuned file"):
        assert choose(KEY, H100).config == SMALL
    user(entry(LARGE))  # and tuning again puts the file right
    assert choose(KEY, H100).config == LARGE


def test_a_file_that_may_not_be_read(launched: list[KernelConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    path = user(entry(SMALL))
    real = Path.read_bytes

    def denied(self: Path) -> bytes:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", denied)
    tuned_files.forget()
    assert_folds_on_the_default(launched, f"{path} cannot be read")


@pytest.mark.parametrize("reason", ["no directory", "full disk"])
def test_no_write_access_to_the_cache(
    reason: str, launched: list[KernelConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither tuned files nor generated sources can be written: tuning says so, folds run on the default."""
    cache = tmp_path / "cache"
    if reason == "no directory":
        cache.write_text("")
    else:
        real = launch_module.os.replace

        def full(source: str, target: Path) -> None:
            if str(target).startswith(str(cache)):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(source, target)

        monkeypatch.setattr(launch_module.os, "replace", full)
    with pytest.raises(OSError, match=r"space|exists|directory"):
        user(entry(SMALL))
    assert not cache.is_dir() or not list(cache.glob("tuned/*"))  # nor is a temporary file left
    assert_folds_on_the_default(launched, f"{cache} cannot be written")


def test_looking_up_needs_no_torch() -> None:
    code = (
        "import sys; from triton_convbn.kernels.tuned import *\n"
        "choose('fold/fp32/large', Gpu('sm_90'))\n"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
