"""Host time of planned code: the very launches that are planned run, and an operator's Python shows in the figure."""

import csv
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from triton_convbn.perf import host_time
from triton_convbn.perf.plan import Plan, plan
from triton_convbn.perf.planned_wrapper import Spec, Wrapper
from triton_convbn.perf.table import processor

from triton_convbn.cli import main
from triton_convbn.errors import UsageError

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
if torch.version.cuda is None:
    pytest.skip("a torch for the CPU has no CUDA tensors", allow_module_level=True)

MODEL = """
from torch import nn


def pairs():
    layers = []
    for inputs, outputs in ((3, 32), (32, 48)):
        layers += [nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5)).eval()
"""


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], nn.Module]:
    """Two pairs and a head, also importable as timed_model:pairs."""
    (tmp_path / "timed_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timed_model", raising=False)
    namespace: dict[str, Any] = {}
    exec(MODEL, namespace)
    return namespace["pairs"]


def launches(planned: Plan) -> int:
    figures = planned.figures()
    return figures["launches_forward"] + figures["launches_backward"]


def test_every_planned_launch_is_run(pairs: Callable[[], nn.Module]) -> None:
    """Counted by the driver. Ours launches fewer, and no provider's step is without any."""
    x = torch.randn(2, 3, 16, 16)
    providers = "inductor", "inductor_efficient_conv_bn_combo", "triton_convbn"
    plans = {name: plan(pairs(), x, name, train=True) for name in providers}
    found = host_time.host_times(list(plans.values()), rounds=3)
    assert {name: each.launches for name, each in found.items()} == {n: launches(p) for n, p in plans.items()}
    assert all(len(each.microseconds) == 3 and min(each.microseconds) > 0 for each in found.values())
    assert plans["triton_convbn"].figures()["folds_backward"] > 0
    assert "LD_PRELOAD" not in os.environ


def test_a_launch_that_is_planned_and_not_run_is_an_error(pairs: Callable[[], nn.Module]) -> None:
    planned = plan(pairs(), torch.randn(2, 3, 16, 16), "inductor")
    planned.wrappers[0].text = "def call(args):\n    args.clear()\n"
    with pytest.raises(RuntimeError, match=f"{launches(planned)} launches are planned, the driver counts 0"):
        host_time.host_times([planned], rounds=1)


CALLS, BUSY = 3, 2e-3
CALLER = f"""
import torch


def call(args):
    (x,) = args
    args.clear()
    for _ in range({CALLS}):
        torch.ops.triton_convbn.busy.default(x)
"""
OPERATOR = """
import time

import torch

from triton_convbn.perf.host_run import main


@torch.library.custom_op("triton_convbn::busy", mutates_args=())
def busy(x: torch.Tensor) -> torch.Tensor:
    until = time.thread_time() + {busy}
    while time.thread_time() < until:
        pass
    assert x.is_cuda
    return torch.empty_like(x)


main()
"""


def test_the_python_of_an_operator_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is kept busy for a known time costs that time at each call; an idle one does not."""
    wrapper = Wrapper(CALLER, [Spec((4, 4), (4, 1), "float32", "cuda")])
    medians = []
    for busy in (BUSY, 0.0):
        script = tmp_path / f"operator_{busy}.py"
        script.write_text(OPERATOR.format(busy=busy))
        monkeypatch.setattr(host_time, "COMMAND", (sys.executable, str(script)))
        (found,) = host_time.host_times([Plan("one", wrappers=[wrapper])], rounds=5).values()
        medians.append(statistics.median(found.microseconds))
    assert medians[0] >= 1e6 * CALLS * BUSY
    assert medians[0] - medians[1] >= 0.9e6 * CALLS * BUSY


def test_library_calls_are_left_out() -> None:
    """A convolution and a matmul return at once what was made before, with the layout that the plan knows."""
    text = """
import torch
from torch._inductor.select_algorithm import extern_kernels


def call(args):
    (x,) = args
    args.clear()
    buf0 = torch.ops.aten.convolution_backward.default(x, "no", "tensors")
    assert buf0[0] is None and buf0[1].stride() == (1, 2), buf0
    buf1 = extern_kernels.convolution(x)
    assert buf1.shape == (3,) and buf1.dtype is torch.float16
    extern_kernels.mm(x, x, out=None)
"""
    results = {
        "buf0": [None, Spec((2, 2), (1, 2), "float32", "cuda")],
        "buf1": Spec((3,), (1,), "float16", "cuda"),
    }
    wrapper = Wrapper(text, [Spec((4,), (1,), "float32", "cuda")], results=results)
    (found,) = host_time.host_times([Plan("one", wrappers=[wrapper])], rounds=2).values()
    assert found.launches == 0


def test_code_that_fails_is_one_line() -> None:
    wrapper = Wrapper("def call(args):\n    raise ValueError('boom')\n", [])
    with pytest.raises(UsageError, match="does not run without a GPU: ValueError: boom"):
        host_time.host_times([Plan("one", wrappers=[wrapper])], rounds=1)


@pytest.mark.parametrize(("owner", "name", "value"), [(sys, "platform", "darwin"), (torch.version, "cuda", None)])
def test_where_there_is_no_cuda_it_says_so(owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(UsageError, match="needs Linux and a torch that is built for CUDA"):
        host_time.host_times([])


def test_rows_say_stubbed(
    pairs: Callable[[], nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_time, "ROUNDS", 5)
    path = tmp_path / "plan.csv"
    model = ["--model", "timed_model:pairs", "--batch", "2", "--size", "16"]
    common = ["plan", *model, "--provider", "inductor", "--host"]
    with pytest.raises(SystemExit, match="0"):
        main([*common, "--csv", str(path), "--json"])
    rows = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["status"] == "stubbed"]
    (row,) = rows
    assert (row["metric"], row["unit"], row["device"]) == ("host_time", "us", f"{processor()} (stubbed)")
    assert 0 < row["p20"] <= row["p50"] <= row["p80"]
    with path.open(newline="") as file:
        assert [each["status"] for each in csv.DictReader(file)].count("stubbed") == 1
    with pytest.raises(SystemExit, match="0"):
        main(["plot", str(path), "--markdown"])
    table = capsys.readouterr().out
    assert "under a CUDA driver that does nothing" in table
    assert "host time (us) |" in table
    with pytest.raises(SystemExit, match="0"):
        main(common)
    out = capsys.readouterr().out
    assert "host us" in out
    assert "Left out for all alike" in out
    with pytest.raises(SystemExit, match="2"):
        main([*common, "--count", "traced"])
    assert "--host measures what a GPU would be given" in capsys.readouterr().err
