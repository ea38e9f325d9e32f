"""Run Nsight Compute, Compute Sanitizer and the package's own tuner.

Each task begins with a `yield`, so that all of its work is one turn, with the GPU to itself.
"""

import csv
import json
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

from ..results import Key, Report
from .bench import Bench
from .folds import fold_calls

METRICS = {"dram__bytes_read.sum": "dram_read", "dram__bytes_write.sum": "dram_written"}
SUMMARY = re.compile(r"SUMMARY: (\d+) (?:error|hazard)")


def tool(name: str) -> str | None:
    """Return the path of a CUDA tool, which may not be on PATH, or None."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def traffic(bench: Bench, report: Report, model: str | None) -> Iterator[None]:
    """Count with ncu the DRAM bytes of the fold kernels, and report the bytes that they must move.

    ncu flushes the caches before each kernel. Writes that are still in L2 when a kernel ends are not counted.
    """
    yield
    if (ncu := tool("ncu")) is None:
        report.skipped(Key("traffic"), "dram_read", "bytes", "there is no ncu")
        return
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "expected.json"
        given = [f"{__name__}", str(expected), json.dumps(bench.dry), json.dumps(model)]
        options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--print-units", "base"]
        command = [ncu, *options, "--metrics", ",".join(METRICS), sys.executable, "-m", *given]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        calls, kernels = json.loads(expected.read_text()), counted(out)
    if len(calls) != len(kernels):
        raise RuntimeError(f"{len(kernels)} kernels counted, {len(calls)} expected: {[name for name, _ in kernels]}")
    for (key, moved), (_, found) in zip(calls, kernels, strict=True):
        report.measured(Key(*key), "bytes_moved", "bytes", moved)
        for metric, value in found.items():
            report.measured(Key(*key), metric, "bytes", value)


def counted(out: str) -> list[tuple[str, dict[str, float]]]:
    """Parse ncu's output. Return the name and the counters of each kernel in launch order."""
    lines = out.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(lines[start:]):
        _, metrics = found.setdefault(row["ID"], (row["Kernel Name"], {}))
        metrics[METRICS[row["Metric Name"]]] = float(row["Metric Value"].replace(",", ""))
    return list(found.values())


def _run_folds(expected: str, dry: str, model: str) -> None:
    """Run each call once, as the process that ncu profiles, and write the bytes that each must move to a file."""
    calls = fold_calls(Bench(json.loads(dry)), Report(None, ""), json.loads(model))
    torch.cuda.profiler.start()
    with torch.no_grad():
        for _, function, _ in calls:
            function()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    Path(expected).write_text(json.dumps([[key, moved] for key, _, moved in calls]))


def sanitize(bench: Bench, report: Report, tool_name: str) -> Iterator[None]:
    """Run some of the values under compute-sanitizer. Each tensor is a CUDA allocation of its own."""
    yield
    key = Key(f"sanitizer_{tool_name}")
    if (sanitizer := tool("compute-sanitizer")) is None:
        report.skipped(key, "errors", "errors", "there is no compute-sanitizer")
        return
    with tempfile.TemporaryDirectory() as folder:
        task: dict[str, Any] = {"name": key.case, "csv": f"{folder}/rows.csv", "dry": bench.dry}
        task |= {"function": "triton_convbn.perf.gpu.values:values", "arguments": {"part": 0, "parts": 8}}
        command = [sanitizer, "--tool", tool_name, sys.executable, "-m", "triton_convbn.perf.gpu.child"]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        streams: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run([*command, json.dumps(task)], text=True, env=environment, **streams)
        report.say(done.stdout[-4000:])
        rows = list(csv.DictReader(Path(task["csv"]).read_text().splitlines()))
    found = SUMMARY.search(done.stdout)
    if found is None:
        raise RuntimeError(f"exit code {done.returncode}, and no summary of compute-sanitizer")
    report.measured(key, "values_checked", "tensors", len(rows))
    report.checked(key, "wrong_values", "tensors", sum(row["status"] == "failed" for row in rows), 0)
    report.checked(key, "errors", "errors", float(found[1]), 0)


def tune(bench: Bench, report: Report, model: str | None, csv: str, budget: int) -> Iterator[None]:
    """Tune by time on the device, or by compiled facts in a dry run. Files are written beside the CSV."""
    yield
    beside = Path(csv)
    given = ["--model", model or ("resnet18" if bench.dry else "resnet50"), "--budget", str(budget), "--json"]
    given += ["--dtype", "float32", *([] if bench.dry else ["--dtype", "autocast_bfloat16"])]
    given += ["--arch", "sm_90", "--max-configs", "2"] if bench.dry else ["--device", "cuda:0"]
    given += ["--store", str(beside.with_suffix(".tune.jsonl")), "--csv", str(beside.with_suffix(".tune.csv"))]
    given += ["--tuned", str(beside.with_suffix(".tuned.json"))]
    done = subprocess.run([sys.executable, "-m", "triton_convbn", "tune", *given], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the tuner ended with {done.returncode}: {done.stdout[-300:]}")
    for row in json.loads(done.stdout)["rows"]:
        key = Key(row["problem"])
        if row["default"]:
            report.measured(key, "default_cost", "us", row["cost"])
        if row["winner"]:
            report.measured(key, "winner_cost", "us", row["cost"])


if __name__ == "__main__":
    _run_folds(*sys.argv[1:])
