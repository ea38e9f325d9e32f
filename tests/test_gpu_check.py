"""The GPU check where there is none: its whole path as a dry run, its refusals, and what it keeps of a failure."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from triton_convbn.perf import gpu_check, gpu_models
from triton_convbn.perf.gpu_bench import INTERPRETED, Bench, by_kernel
from triton_convbn.perf.gpu_values import ulps
from triton_convbn.perf.providers import PROVIDERS, Compiled
from triton_convbn.perf.report import Report
from triton_convbn.perf.table import COLUMNS, Key, Log

from triton_convbn.counting import count

STEPS = {"fold_conv", "fold_depthwise", "fold_linear", "fold_transposed_groups", "fold_second_device",
         "fold_side_stream", "fold_group_cuda_graph", "copy", "tiny_folds", "tiny_fold_group_0", "tiny"}  # fmt: skip


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def dry_run(path: Path, monkeypatch: pytest.MonkeyPatch, steps: Any, *more: str) -> int:
    """The check in this process, with other steps than its own."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu_check, "plan", steps)
    return gpu_check.main(["--dry-run", "--csv", str(path), *more])


@pytest.mark.skipif(os.name != "posix", reason="Triton is for Linux")
def test_dry_run_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "check.csv"
    command = [sys.executable, "-m", "triton_convbn.perf.gpu_check", "--dry-run", "--json", "--csv", str(path)]
    environment = os.environ | {"TRITON_CONVBN_CACHE_DIR": str(tmp_path / "sources")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows, found = rows_of(path), json.loads(done.stdout)
    assert tuple(rows[0]) == COLUMNS
    assert [row["case"] for row in found["rows"]] == [row["case"] for row in rows]
    # No figure passes for one of a GPU.
    assert {row["device"] for row in rows} == {INTERPRETED} == {found["device"]}
    assert {row["status"] for row in rows} == {"interpreted"}
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert {row["case"] for row in rows} >= STEPS
    model = [row for row in rows if row["case"] == "tiny"]
    ways = {(row["provider"], row["mode"], row["dtype"]) for row in model if row["metric"] == "time"}
    assert len(ways) == 24
    assert {provider for provider, *_ in ways} == set(gpu_models.PROVIDERS)
    for mode, folding in gpu_models.FOLDING.items():
        counted = [
            row for row in model if (row["metric"], row["mode"], row["dtype"]) == ("pairs_folded", mode, "float32")
        ]
        folded = {row["provider"]: float(row["p50"]) for row in counted}
        assert folded == {name: 2 if name in folding else 0 for name in gpu_models.PROVIDERS}
    kept = {
        row["provider"]: float(row["p50"])
        for row in model
        if row["metric"] == "saved_for_backward" and row["dtype"] == "float32"
    }
    assert 0 < kept["triton_convbn"] < kept["triton_convbn_keep"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "check.csv"
    assert gpu_check.main(["--csv", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "no GPU" in err
    assert "--dry-run" in err
    assert not path.exists()


def test_interpreter_needs_a_dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Interpreted kernels on a machine with a GPU would be reported as that GPU's."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--batch", "0"], ["--nothing"]])
def test_bad_input(given: list[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        gpu_check.main(given)
    assert exited.value.code == 2


def test_unknown_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main(["--dry-run", "--model", "resnet5000", "--csv", str(tmp_path / "check.csv")]) == 2
    assert "resnet5000" in capsys.readouterr().err.splitlines()[-1]


def test_failing_step_is_a_kept_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is in the file, and the steps after it run. A second run adds to the file."""
    ran = []

    def fail() -> None:
        raise RuntimeError("out of\nluck")

    path = tmp_path / "check.csv"
    for times in (1, 2):
        assert dry_run(path, monkeypatch, lambda *_: {"first": fail, "second": lambda: ran.append(1)}) == 1
        rows = rows_of(path)
        assert len(rows) == len(ran) == times
    assert tuple(rows[0]) == COLUMNS
    assert (rows[0]["case"], rows[0]["status"], rows[0]["p50"]) == ("first", "failed", "")
    assert rows[0]["error"] == "RuntimeError: out of luck"
    assert rows[0]["device"] == INTERPRETED


def test_failing_provider_is_a_kept_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are measured without it."""

    class Broken(Compiled):
        name = "broken"
        keywords: ClassVar = {"backend": "no such backend"}

    monkeypatch.setattr(gpu_models, "providers", lambda _names: [PROVIDERS["eager"], Broken()])

    def steps(bench: Bench, report: Report, _options: Any) -> dict[str, Any]:
        case = gpu_models.case(bench, None, report.say)
        return {"models": lambda: gpu_models.models(bench, report, case, 2, 1)}

    path = tmp_path / "check.csv"
    assert dry_run(path, monkeypatch, steps) == 1
    rows = rows_of(path)
    failed = [row for row in rows if row["status"] == "failed"]
    assert {(row["provider"], row["metric"]) for row in failed} == {("broken", "run")}
    assert all("no such backend" in row["error"] for row in failed)
    assert sum(row["provider"] == "eager" and row["metric"] == "time" for row in rows) == 4


def test_interrupted_run_leaves_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "check.csv"
    seen = []

    def steps(_bench: Bench, report: Report, _options: Any) -> dict[str, Any]:
        def measure() -> None:
            report.measured(Key("one"), "time", "ms", 1.0)
            seen.extend(rows_of(path))  # on the disk before the run has ended
            raise KeyboardInterrupt

        return {"measure": measure}

    assert dry_run(path, monkeypatch, steps) == 130
    assert seen == rows_of(path)
    assert len(seen) == 1


def test_foreign_csv_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    assert dry_run(path, monkeypatch, lambda *_: {}) == 2
    assert path.read_text() == "a,b\n1,2\n"


def test_wrong_values_fail(tmp_path: Path) -> None:
    """Too large, and NaN."""
    report = Report(Log(tmp_path / "check.csv"), INTERPRETED, "interpreted")
    for value in (1.0, 3.0, float("nan")):
        report.checked(Key(f"values of {value}"), "fold_error", "ulp", value, 2.0, "weight")
    assert [row.status for row in report.rows] == ["interpreted", "failed", "failed"]
    assert report.rows[1].error == "weight: 3 ulp, 2 allowed"
    assert report.failures == 2


def test_ulps() -> None:
    exact = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert ulps(exact.float(), exact) == 0
    assert ulps(torch.tensor([1.0, -2.0 - 4 * eps, 0.0]), exact) == pytest.approx(2)
    assert ulps(torch.tensor([1.0, -2.0 - 4 * eps, 0.0]), exact, 4 * eps) == 0
    assert ulps(torch.tensor([1.0, float("nan"), 0.0]), exact) != 0


def test_plain_torch_does_not_pass_for_a_kernel() -> None:
    with pytest.raises(RuntimeError, match="decomposed:some reason"), by_kernel():
        count("decomposed:some reason")


def test_own_resnet_has_resnet50s_shapes() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        own, theirs = gpu_models.resnet((3, 4, 6, 3), 64, 1000), torchvision.models.resnet50()
    assert sorted(tuple(p.shape) for p in own.parameters()) == sorted(tuple(p.shape) for p in theirs.parameters())
    assert gpu_models.resnet((1, 1), 4, 10)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
