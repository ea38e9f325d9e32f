"""Test the GPU check without a GPU: a dry run of all stages, bad input, and lost processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lost_stages
import pytest
import torch
from triton_convbn.perf import gpu_check
from triton_convbn.perf.gpu import tools
from triton_convbn.perf.gpu.device import INTERPRETED, by_kernel
from triton_convbn.perf.gpu.processes import Stage, Task
from triton_convbn.perf.results import COLUMNS, Key, Report

from triton_convbn.counters import count

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "triton_convbn.perf.gpu_check", "--dry-run"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the check with given stages and returns the exit code and the rows."""
    path = tmp_path / "check.csv"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("TRITON_CONVBN_COMMIT", "TRITON_CONVBN_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, str(tmp_path)))

    def run(stages: list[Stage], *more: str) -> tuple[int, list[dict[str, str]]]:
        monkeypatch.setattr(gpu_check, "check_stages", lambda *_: stages)
        code = gpu_check.main(["--dry-run", "--csv", str(path), *more])
        return code, rows_of(path)

    return run


def figures(rows: list[dict[str, str]]) -> dict[str, float]:
    return {row["case"]: float(row["p50"]) for row in rows if row["metric"] == "figure"}


def errors(rows: list[dict[str, str]]) -> dict[str, str]:
    return {row["case"]: row["error"] for row in rows if row["status"] == "failed"}


def test_dry_run_end_to_end(tmp_path: Path) -> None:
    """Run every stage. No row claims to be of a GPU."""
    environment = os.environ | {"OUT": str(tmp_path / "new"), "TRITON_CONVBN_COMMIT": "abc1234"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([*COMMAND, "--json"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    made = list((tmp_path / "new").iterdir())
    assert {path.suffix for path in made} == {".csv", ".json", ".log"}
    rows = rows_of(Path(found["csv"]))
    assert tuple(rows[0]) == COLUMNS
    assert [row["case"] for row in found["rows"]] == [row["case"] for row in rows]
    assert {row["device"] for row in rows} == {INTERPRETED}
    assert {row["status"] for row in rows} == {"interpreted", "skipped"}
    assert {(row["torch"], row["commit"]) for row in rows} == {(torch.__version__, "abc1234")}
    assert {row["case"] for row in rows} >= {
        *("fold_first", "fold_conv", "fold_misaligned", "fold_with_gaps", "fold_second_device"),
        *("fold_side_stream", "fold_group_cuda_graph", "fold_on_nan", "fold_huge", "tiny_fold_group_0", "tiny"),
    }
    model = {(row["provider"], row["mode"], row["metric"]): row["p50"] for row in rows if row["case"] == "tiny"}
    for provider in ("eager", "inductor", "triton_convbn_reduce_overhead"):
        assert {name for each, mode, name in model if (each, mode) == (provider, "train")} >= {
            *("latency", "latency_turn_1", "latency_turn_2", "throughput", "host", "gpu_time", "kernels"),
            *("output_error", "gradient_error", "peak_memory", "pairs_folded"),
        }
    assert model["triton_convbn_reduce_overhead", "train", "pairs_folded"] == "2"
    assert model["inductor", "train", "pairs_folded"] == "0"


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("dry", [False, True])
def test_stages_fit_into_the_budget(dry: bool, deep: bool) -> None:
    given = dry, None, Path("check.csv")
    stages = gpu_check.deep_stages(*given) if deep else gpu_check.check_stages(*given, Path("scratch"))
    assert sum(stage.seconds for stage in stages) <= gpu_check.SECONDS
    names = [task.name for stage in stages for task in stage.tasks]
    assert len(set(names)) == len(names)


def test_lost_stages_lose_themselves_only(check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Keep the rows of processes that are killed, hang, raise or exit, and run the others."""
    seconds = {"hangs": 30, "killed": 20, "raises": 20, "exits": 20, "good": 20}
    code, rows = check([lost_stages.stage(name, each) for name, each in seconds.items()], "--seconds", "540")
    assert code == 1
    assert figures(rows) == {"killed": 2, "hangs": 3, "good": 1}
    assert errors(rows) == {
        "killed": "Lost: killed by SIGKILL",
        "raises": "RuntimeError: out of luck",
        "exits": "Lost: exit code 7: last words",
        "hangs": "Lost: it did not end in time",
    }
    assert {row["device"] for row in rows} == {INTERPRETED}
    assert "failed: hangs" in capsys.readouterr().out


@pytest.fixture
def timed(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that times two tasks beside one that prepares, and returns the code, the rows and the turns."""
    path, spun = tmp_path / "turns", tmp_path / "spun"
    monkeypatch.setattr(os, "cpu_count", lambda: 8)  # start all processes at once

    def run(seconds: float, first: dict[str, Any], second: dict[str, Any]) -> Any:
        paths = {"path": str(path), "spun": str(spun)}
        tasks = [Task(each["name"], "lost_stages:timed", each | paths) for each in (first, second)]
        last = lost_stages.stage("spins", 20, path=str(spun), turns=str(path), until=f"{second['name']} 2 end")
        code, rows = check([Stage("two", seconds, tuple(tasks)), last], "--seconds", "540")
        return code, rows, [line.split() for line in path.read_text().splitlines()]

    return run


def test_timed_tasks_take_turns_alone(timed: Any) -> None:
    """Time A B A B, one at a time, with preparing tasks stopped."""
    code, _, lines = timed(480, {"name": "a"}, {"name": "b"})
    assert code == 0
    assert [line[:3] for line in lines] == [
        [name, turn, word] for turn in "12" for name in "ab" for word in ("begin", "end")
    ]
    assert len({size for *_, size in lines}) == 1


def test_task_that_hangs_in_its_turn(timed: Any) -> None:
    """Skip it. The stage's time is for a slow machine: half of it is waited for in any case."""
    code, rows, _ = timed(100, {"name": "hung", "hangs": True}, {"name": "after"})
    assert code == 1
    assert errors(rows) == {"hung": "Lost: it had its turn and did not end it in time"}
    assert {row["metric"] for row in rows if row["case"] == "after"} == {"turn_1", "turn_2"}


def test_interrupted_run_leaves_its_rows(tmp_path: Path) -> None:
    """End every process on Ctrl-C, and print a summary."""
    path = tmp_path / "check.csv"
    command = [*COMMAND, "--stages", "versions,values,folds", "--csv", str(path)]
    # A job that a shell started in the background ignores SIGINT, and so do its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=heed, **pipes) as process:
        while not path.exists() or not rows_of(path):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "Interrupted" in out
    children = subprocess.run(["pgrep", "-f", f"perf.gpu.processes.*{path}"], capture_output=True, text=True).stdout
    assert children == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "check.csv"
    assert gpu_check.main(["--csv", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "no GPU" in err
    assert not path.exists()


def test_interpreter_needs_a_dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Refuse to report interpreted kernels as a GPU's."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--seconds", "0"], ["--nothing"]])
def test_bad_arguments(given: list[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        gpu_check.main(given)
    assert exited.value.code == 2


@pytest.mark.parametrize("given", [["--model", "resnet5000"], ["--stages", "values,nothing"]])
def test_unknown_names_are_one_line(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "check.csv"
    assert gpu_check.main(["--dry-run", "--csv", str(path), *given]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert given[1].rpartition(",")[2] in err
    assert not path.exists()


def test_foreign_csv_is_left_alone(check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "check.csv"
    path.write_text("a,b\n1,2\n")
    assert check([])[0] == 2
    assert path.read_text() == "a,b\n1,2\n"


def test_a_checkout_needs_torch_and_triton_only() -> None:
    """Run from the link tree, where the package's other dependencies are missing, and import the whole check."""
    script = Path(gpu_check.__file__).resolve().with_name("from_checkout.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, str(script), "from_checkout"], check=True, env=environment, cwd=script.parent)
    code = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(("pandas", "pytest", "typer", "rich", "platformdirs", "pebble")))
from triton_convbn.perf import gpu, gpu_check
for module in pkgutil.iter_modules(gpu.__path__):
    importlib.import_module(f"{gpu.__name__}.{module.name}")
gpu_check.main(["--help"])
"""
    root = script.parent.parent
    environment |= {"PYTHONPATH": str(root / "out" / "path"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--dry-run" in done.stdout


FIGURES = """
import pytest

@pytest.mark.parametrize("error", [1.0, 3.0, float("nan")])
def test_figure(record_property, error):
    record_property("key", KEY._replace(dtype=str(error)))
    record_property("fold_error", ("ulp", error, 2.0, "weight"))
    assert error <= 2.0

def test_skipped():
    pytest.skip("there is one GPU")

def test_raises(record_property):
    record_property("key", KEY._replace(case="raises"))
    raise ValueError("out of luck")
"""


def test_rows_of_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report each figure, each skipped test and each failure of the tests that pytest runs."""
    header = "from triton_convbn.perf.results import Key\nKEY = Key('fold')\n"
    (tmp_path / "test_figures.py").write_text(header + FIGURES)
    monkeypatch.setattr(tools, "TESTS", tmp_path)
    report = Report(None, INTERPRETED, "interpreted")
    tools.values(torch.device("cpu"), report, "test_")
    found = {(row.case, row.dtype): (row.metric, row.status, row.error[:26]) for row in report.rows}
    assert found == {
        ("fold", "1.0"): ("fold_error", "interpreted", ""),
        ("fold", "3.0"): ("fold_error", "failed", "weight: 3 ulp, 2 allowed"),
        ("fold", "nan"): ("fold_error", "failed", "weight: nan ulp, 2 allowed"),
        ("test_skipped", ""): ("run", "skipped", "Skipped: there is one GPU"),
        ("raises", ""): ("run", "failed", found["raises", ""][2]),
    }
    assert "out of luck" in next(row.error for row in report.rows if row.case == "raises")
    with pytest.raises(RuntimeError, match="no test has run"):
        tools.values(torch.device("cpu"), report, "nothing")


def test_values_that_cannot_run_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(None, INTERPRETED, "interpreted")
    monkeypatch.setitem(sys.modules, "pytest", None)
    tools.values(torch.device("cpu"), report, "without pytest")
    monkeypatch.setattr(tools, "TESTS", tmp_path / "none")
    tools.values(torch.device("cpu"), report, "without tests")
    assert [(row.status, row.error) for row in report.rows] == [
        ("skipped", "the values need pytest: pip install pytest"),
        ("skipped", "the values are tests, which are not installed: run from a checkout"),
    ]


def test_plain_torch_does_not_pass_for_a_kernel() -> None:
    with pytest.raises(RuntimeError, match="decomposed:some reason"), by_kernel():
        count("decomposed:some reason")


def test_traffic_of_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report what ncu counts beside what a call must move, in launch order, after any other output."""
    out = """==PROF== Connected
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","fold_2","dram__bytes_read.sum","byte","1,024"
"0","1","fold_2","dram__bytes_write.sum","byte","512"
"1","1","fold_backward_2","dram__bytes_read.sum","byte","7"
"""
    calls = Report(None, "a GPU")
    for mode, moved in (("forward", 1000), ("backward", 8)):
        calls.measured(Key("fold", mode=mode), "bytes_moved", "bytes", moved)
    monkeypatch.setattr(tools, "run_under", lambda *_, **__: (out, calls.rows))
    report = Report(None, "a GPU")
    list(tools.traffic(torch.device("cpu"), report, None))
    assert [(row.mode, row.metric, row.p50) for row in report.rows] == [
        *(("forward", "bytes_moved", 1000), ("forward", "dram_read", 1024), ("forward", "dram_written", 512)),
        *(("backward", "bytes_moved", 8), ("backward", "dram_read", 7)),
    ]
    monkeypatch.setattr(tools, "run_under", lambda *_, **__: ("no kernel\n", calls.rows))
    with pytest.raises(RuntimeError, match="0 kernels counted, 2 expected"):
        list(tools.traffic(torch.device("cpu"), report, None))


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("========= ERROR SUMMARY: 3 errors", 3),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0),
    ],
)
def test_errors_of_the_sanitizer(text: str, errors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "0")  # which the check changes
    monkeypatch.setattr(tools, "run_under", lambda *_, **__: (text, []))
    report = Report(None, "a GPU")
    list(tools.sanitize(torch.device("cpu"), report, "memcheck"))
    row = report.row(Key("sanitizer_memcheck"), "errors")
    assert row is not None
    assert (row.p50, row.status) == (errors, "failed" if errors else "ok")
