"""Test the host time of planned code: every planned launch runs, and the Python of an operator counts."""

import csv
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_model import classifier
from triton_convbn.perf.environment import processor
from triton_convbn.perf.plan import host
from triton_convbn.perf.plan.code import Generated, Launch
from triton_convbn.perf.plan.planner import Plan, plan

from triton_convbn.cli import main
from triton_convbn.errors import UsageError

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
if torch.version.cuda is None:
    pytest.skip("a torch for the CPU has no CUDA tensors", allow_module_level=True)


def of_text(text: str, name: str = "one", results: dict[str, Any] | None = None, *launches: Launch) -> Plan:
    """Return the plan of a wrapper that takes one tensor, x."""
    inputs = "\n\ndef get_args():\n    return [torch.empty(4, device='cuda')]\n"
    return Plan(name, generated=[Generated(None, f"import torch\n{text}{inputs}", list(launches), results or {})])


def launches(planned: Plan) -> int:
    figures = planned.figures()
    return figures["launches_forward"] + figures["launches_backward"]


def test_every_planned_launch_is_run() -> None:
    """Counted by the driver. Ours launches fewer, and no provider's step is without any."""
    x = torch.randn(2, 3, 16, 16)
    providers = "inductor", "inductor_efficient_conv_bn_combo", "triton_convbn"
    plans = {name: plan(classifier(), x, name, train=True) for name in providers}
    found = host.host_times(list(plans.values()), rounds=3)
    assert {name: each.launches for name, each in found.items()} == {n: launches(p) for n, p in plans.items()}
    assert all(len(each.microseconds) == 3 and min(each.microseconds) > 0 for each in found.values())
    assert plans["triton_convbn"].figures()["folds_backward"] > 0
    assert "LD_PRELOAD" not in os.environ


def test_a_launch_that_is_planned_and_not_run_is_an_error() -> None:
    planned = of_text("def call(args):\n    pass\n", "one", None, Launch("forward", "triton_poi", "triton", 2, 8))
    with pytest.raises(RuntimeError, match="2 launches are planned, the driver counts 0"):
        host.host_times([planned], rounds=1)


CALLS, BUSY = 3, 2e-3
OPERATOR = f"""
import time


@torch.library.custom_op("triton_convbn::NAME", mutates_args=())
def operator(x: torch.Tensor) -> torch.Tensor:
    until = time.thread_time() + SECONDS
    while time.thread_time() < until:
        pass
    assert x.is_cuda
    return torch.empty_like(x)


def call(args):
    for _ in range({CALLS}):
        torch.ops.triton_convbn.NAME.default(args[0])
"""
LIBRARY = """
from torch._inductor.select_algorithm import extern_kernels


def call(args):
    (x,) = args
    buf0 = torch.ops.aten.convolution_backward.default(x, "no", "tensors")
    assert buf0[1].stride() == (1, 2), buf0
    buf1 = extern_kernels.convolution(x)
    assert buf1.shape == (3,) and buf1.dtype is torch.float16
    extern_kernels.mm(x, x, out=None)
"""
RESULTS = {
    "buf0": {1: torch.empty(2, 2, device="meta").t()},
    "buf1": torch.empty(3, dtype=torch.float16, device="meta"),
}


@pytest.fixture(scope="module")
def times() -> dict[str, host.HostTime]:
    """Return the times of a busy operator, an idle one, and of library calls that check what they return."""
    seconds = {"busy": BUSY, "idle": 0.0}
    plans = [of_text(OPERATOR.replace("NAME", n).replace("SECONDS", str(s)), n) for n, s in seconds.items()]
    return host.host_times([*plans, of_text(LIBRARY, "library", RESULTS)], rounds=5)


def test_the_python_of_an_operator_counts(times: dict[str, host.HostTime]) -> None:
    """An operator that is busy for a known time costs that time at each call. An idle one does not."""
    busy, idle = (statistics.median(times[name].microseconds) for name in ("busy", "idle"))
    assert busy >= 1e6 * CALLS * BUSY
    assert busy - idle >= 0.9e6 * CALLS * BUSY


def test_library_calls_return_at_once(times: dict[str, host.HostTime]) -> None:
    """A convolution and a matmul return a tensor made beforehand, with the layout that the plan knows."""
    assert times["library"].launches == 0


def test_code_that_fails_is_one_line() -> None:
    with pytest.raises(UsageError, match="does not run without a GPU: ValueError: boom"):
        host.host_times([of_text("def call(args):\n    raise ValueError('boom')\n")], rounds=1)


@pytest.mark.parametrize(("owner", "name", "value"), [(sys, "platform", "darwin"), (torch.version, "cuda", None)])
def test_where_there_is_no_cuda_it_says_so(owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(UsageError, match="needs Linux and a torch that is built for CUDA"):
        host.host_times([])


def test_rows_say_stubbed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "plan.csv"
    model = ["--model", "planned_model:pairs", "--batch", "2", "--size", "16"]
    common = ["plan", *model, "--provider", "inductor", "--provider", "triton_convbn", "--train", "--host"]
    with pytest.raises(SystemExit, match="0"):
        main([*common, "--csv", str(path)])
    out = capsys.readouterr().out
    assert "host time" in out
    assert "Left out for every provider" in out
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "stubbed"]
    assert {row["device"] for row in rows} == {f"{processor()} (stubbed)"}
    found = {(row["provider"], row["metric"]): row for row in rows}
    for provider in ("inductor", "triton_convbn"):
        row = found.pop((provider, "host_time"))
        assert row["unit"] == "us"
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
    names = ["time_over_inductor", "time_over_inductor_low", "time_over_inductor_high"]
    assert list(found) == [("triton_convbn", name) for name in names]
    with pytest.raises(SystemExit, match="0"):
        main(["plot", str(path), "--markdown"])
    table = capsys.readouterr().out
    assert "under a CUDA driver that does nothing" in table
    assert "host time (us) |" in table
