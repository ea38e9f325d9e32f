"""Run pytest, Nsight Compute, Compute Sanitizer and the package's own tuner as tasks of the GPU check.

`traffic`, `sanitize` and `tune` begin with a `yield`, so that all of their work is one turn, with the GPU to itself.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..environment import note
from ..results import Key, Report, Row, start
from .folds import fold_calls
from .processes import command_of, task

METRICS = {"dram__bytes_read.sum": "dram_read", "dram__bytes_write.sum": "dram_written"}
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:error|hazard)")
TESTS = Path(__file__).resolve().parents[2] / "tests" / "gpu"


class Rows:
    """A plugin of pytest that reports each figure a test records, and each test that fails or is skipped without one.

    A figure is a property ``metric: (unit, value, limit, what)``. The property ``key`` names the case.
    """

    def __init__(self, report: Report) -> None:
        self.report, self.tests = report, 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.passed and report.when != "call":
            return
        self.tests += 1
        failures = self.report.failures
        figures = dict(report.user_properties)
        key = Key(*figures.pop("key", [report.nodeid.rpartition("::")[2]]))
        for metric, (unit, value, limit, what) in figures.items():
            self.report.checked(key, metric, unit, value, limit, what)
        if report.skipped:
            self.report.skipped(key, "run", "", report.longrepr[2])
        elif report.failed and self.report.failures == failures:
            self.report.failed(key, "run", "", report.longreprtext)


def values(_device: torch.device, report: Report, select: str) -> None:
    """Run the tests that an expression of pytest's ``-k`` selects.

    Raises:
        RuntimeError: If no test has run.
    """
    if not TESTS.exists():
        report.skipped(Key(select), "run", "", "the values are tests, which are not installed: run from a checkout")
        return
    try:
        import pytest
    except ImportError:
        report.skipped(Key(select), "run", "", "the values need pytest: pip install pytest")
        return
    rows = Rows(report)
    code = pytest.main([str(TESTS), "-k", select, "-p", "no:cacheprovider"], plugins=[rows])
    if not rows.tests:
        raise RuntimeError(f"no test has run: pytest returned {code}")


def versions(device: torch.device, report: Report, csv: str) -> None:
    """Record the machine beside the CSV, and fold once each way."""
    note(Path(csv))
    values(device, report, "test_first")


def run_under(
    device: torch.device, report: Report, key: Key, tool: str, options: list[str], function: str, **arguments: Any
) -> tuple[str, list[Row]] | None:
    """Run a task under a CUDA tool. Return the tool's output and the rows of the task, or None without the tool."""
    path = shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")  # which may not be on PATH
    if path is None:
        report.skipped(key, "run", "", f"there is no {tool}")
        return None
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.csv"
        common = {"dry": device.type == "cpu", "csv": str(rows)}
        command = [path, *options, *command_of(task(tool, function, **arguments), common)]
        out = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout
        report.say(out[-4000:])
        return out, start(rows)


def traffic(device: torch.device, report: Report, model: str | None) -> Iterator[None]:
    """Count with ncu the DRAM bytes of the fold kernels, and report the bytes that they must move.

    ncu flushes the caches before each kernel. Writes that are still in L2 when a kernel ends are not counted.
    """
    yield
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--print-units", "base"]
    options += ["--metrics", ",".join(METRICS)]
    done = run_under(device, report, Key("traffic"), "ncu", options, "tools:run_folds", model=model)
    if done is None:
        return
    calls, kernels = [row for row in done[1] if row.metric == "bytes_moved"], counted(done[0])
    if len(calls) != len(kernels):
        raise RuntimeError(f"{len(kernels)} kernels counted, {len(calls)} expected: {[name for name, _ in kernels]}")
    for row, (_, found) in zip(calls, kernels, strict=True):
        for metric, value in {row.metric: row.p50, **found}.items():
            report.measured(row.key, metric, "bytes", value)


def counted(out: str) -> list[tuple[str, dict[str, float]]]:
    """Parse ncu's output. Return the name and the counters of each kernel in launch order."""
    _, start, table = out.partition('"ID"')
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader((start + table).splitlines()):
        _, metrics = found.setdefault(row["ID"], (row["Kernel Name"], {}))
        metrics[METRICS[row["Metric Name"]]] = float(row["Metric Value"].replace(",", ""))
    return list(found.values())


def run_folds(device: torch.device, report: Report, model: str | None) -> None:
    """Run each call once, as the process that ncu profiles."""
    calls = fold_calls(device, report, model)
    torch.cuda.profiler.start()
    with torch.no_grad():
        for _, function, _ in calls:
            function()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    for key, _, moved in calls:
        report.measured(key, "bytes_moved", "bytes", moved)


def sanitize(device: torch.device, report: Report, tool: str) -> Iterator[None]:
    """Run some of the values under a tool of compute-sanitizer."""
    yield
    key = Key(f"sanitizer_{tool}")
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor is a CUDA allocation of its own
    select = "test_dtypes and -conv-contiguous-"
    done = run_under(device, report, key, "compute-sanitizer", ["--tool", tool], "tools:values", select=select)
    if done is None:
        return
    out, rows = done
    if (found := SUMMARY.search(out)) is None:
        raise RuntimeError("no summary of compute-sanitizer")
    report.measured(key, "values_checked", "tensors", len(rows))
    report.checked(key, "wrong_values", "tensors", sum(row.status == "failed" for row in rows), 0)
    report.checked(key, "errors", "errors", float(found[1]), 0)


def tune(device: torch.device, report: Report, model: str | None, csv: str, budget: int) -> Iterator[None]:
    """Tune by time on the device, or by compiled facts in a dry run. Files are written beside the CSV."""
    yield
    command = [sys.executable, "-m", "triton_convbn", "tune", "--budget", str(budget), "--dtype", "float32"]
    if device.type == "cpu":
        command += ["--model", model or "resnet18", "--arch", "sm_90", "--max-configs", "2"]
    else:
        command += ["--model", model or "resnet50", "--dtype", "autocast_bfloat16", "--device", "cuda:0"]
    for option, suffix in (("--store", ".tune.jsonl"), ("--csv", ".tune.csv"), ("--tuned", ".tuned.json")):
        command += [option, str(Path(csv).with_suffix(suffix))]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
