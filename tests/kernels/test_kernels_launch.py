"""The source cache, the loader and the launch. No test here needs a GPU."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launches import launch_fold
from pair_cases import pair
from triton_convbn.kernels import launch as launch_module
from triton_convbn.kernels.codegen import generate_fold
from triton_convbn.kernels.inputs import spec_of
from triton_convbn.kernels.kernel_source import KernelSource
from triton_convbn.kernels.launch import cache_dir, launch, load, write_source


def source(rows: int = 4) -> KernelSource:
    return generate_fold((spec_of(pair(rows, 3)),))


@pytest.fixture(autouse=True)
def no_fallback_yet() -> Iterator[None]:
    launch_module._fallback_dir.cache_clear()
    yield
    launch_module._fallback_dir.cache_clear()


def test_source_is_private_readable_and_named_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CONVBN_CACHE_DIR", str(tmp_path / "a" / "b"))
    path = write_source(source())
    assert path == tmp_path / "a" / "b" / f"fold_1_{source().digest}.py"
    assert path.read_text() == source().text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_default_directory_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_CONVBN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    if sys.platform == "linux":
        assert cache_dir() == Path("/somewhere/triton_convbn/sources")
    assert not cache_dir().exists()


def test_modified_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CONVBN_CACHE_DIR", str(tmp_path / "cache"))
    path = write_source(source())
    path.write_text("raise SystemExit('not what was generated')")
    before = write_source(source()).stat()
    assert path.read_text() == source().text
    assert write_source(source()).stat() == before  # an unmodified file is not written again


def test_many_processes_write_the_same_sources(tmp_path: Path) -> None:
    program = (
        "from triton_convbn.kernels.codegen import *; from triton_convbn.kernels.launch import write_source;"
        "from triton_convbn.kernels.spec import PairSpec\n"
        "for rows in range(1, 100):\n"
        "    s = generate_fold((PairSpec(rows, 3, 1, *['fp32'] * 4),))\n"
        "    assert write_source(s).read_text() == s.text\n"
    )
    env = {**os.environ, "TRITON_CONVBN_CACHE_DIR": str(tmp_path / "cache")}
    running = [subprocess.Popen([sys.executable, "-c", program], env=env) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 99


def blocked(reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the cache directory unusable. Mode bits are not enough, because root may write anywhere."""
    directory = tmp_path / "cache"
    if reason == "not a directory":
        directory.write_text("")
    elif reason == "others may write":
        directory.mkdir()
        directory.chmod(0o777)
    else:
        real = os.replace

        def full(src: str, dst: Path) -> None:
            if str(dst).startswith(str(directory)):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(src, dst)

        monkeypatch.setattr(launch_module.os, "replace", full)
    monkeypatch.setenv("TRITON_CONVBN_CACHE_DIR", str(directory))


@pytest.mark.parametrize("reason", ["not a directory", "others may write", "disk full"])
def test_unwritable_cache_costs_one_warning(reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked(reason, tmp_path, monkeypatch)
    launch_module._load.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ((weight, _),) = launch_fold([pair(4, 3)])
        launch_fold([pair(5, 3)])
    (message,) = (str(w.message) for w in caught)
    assert message.startswith(f"{tmp_path / 'cache'} cannot be written (")
    assert message.endswith("): generated kernels of this process go to a temporary directory")
    assert ("chmod go-w" in message) is (reason == "others may write")
    assert weight.isfinite().all()
    assert not list(tmp_path.glob("cache/*")), "a temporary file was left behind"
    path = write_source(source())
    assert path.read_text() == source().text
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_without_platformdirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package may run from a checkout, without its dependencies."""
    monkeypatch.delenv("TRITON_CONVBN_CACHE_DIR")
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    launch_module._load.cache_clear()
    with pytest.warns(RuntimeWarning, match="platformdirs is not installed, and TRITON_CONVBN_CACHE_DIR is not set"):
        ((weight, _),) = launch_fold([pair(4, 3)])
    assert weight.isfinite().all()
    assert write_source(source()).read_text() == source().text


def test_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted = load(source())
    assert load(source()) is interpreted
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    compiled = load(source())
    assert type(interpreted).__name__ == "InterpretedFunction"
    assert type(compiled).__name__ == "JITFunction"
    assert load(source()) is compiled


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        launch_fold([pair(4, 3)])


def test_kernel_starts_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors' device is current during the launch. torch.cuda is a fake, so this tests the order of calls."""
    current = [torch.device("cuda:0")]
    seen: list[tuple[object, ...]] = []

    class Module:
        @staticmethod
        @contextlib.contextmanager
        def device(wanted: torch.device) -> Iterator[None]:
            current.append(wanted)
            yield
            current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *arguments, num_warps: seen.append((current[-1], grid, len(arguments), num_warps))

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    monkeypatch.setattr(launch_module, "_load", lambda source, interpret: Kernel())
    monkeypatch.setattr(launch_module, "warp_size", lambda device: 64)
    kernel = source(5000)
    values = [{argument.field: 0.0 for argument in kernel.arguments}]
    launch(kernel, values, torch.device("cuda:1"))
    assert seen == [(torch.device("cuda:1"), (kernel.programs,), len(kernel.arguments), 2)]
    assert current == [torch.device("cuda:0")]
    launch(replace(kernel, programs=0), values, torch.device("cuda:1"))
    assert len(seen) == 1  # no programs, no launch


def test_import_needs_no_triton_and_touches_no_device() -> None:
    modules = ["spec", "inputs", "codegen", "launch", "tuned", "offline", "offline_cases"]
    program = (
        "import sys; sys.modules['triton'] = None\n"
        + "".join(f"import triton_convbn.kernels.{m}\n" for m in modules)
        + "import torch; assert not torch.cuda.is_initialized()\n"
        "from triton_convbn.kernels.offline_cases import CASES\n"
        "print(sum(len(make().text) > 0 for make in CASES.values()) == len(CASES))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
