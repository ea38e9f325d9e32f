"""Test the command that compiles kernels offline: what it prints, keeps and compiles again, and the committed rows."""

import csv
import json
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import triton
from triton_convbn.kernels.kernel_source import KernelSource
from triton_convbn.kernels.offline import ARCHS, KernelFacts
from triton_convbn.kernels.offline_cases import CASES
from triton_convbn.perf import offline

from triton_convbn.cli import main

RESULTS = Path(__file__).parents[2] / "perf" / "results"
ONE, EMPTY, DEPTHWISE = "fold_one_channel", "fold_no_elements", "fold_depthwise_fp16"


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(["dev", "offline", "--arch", "sm_90", *arguments])
    return exited.value.code


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the digests of the sources that are compiled. None is; their facts are zeros."""
    found: list[str] = []

    def fake(source: KernelSource, arch: str) -> KernelFacts:
        found.append(source.digest)
        values: dict[str, Any] = {field.name: 0 for field in fields(KernelFacts)}
        values |= {"arch": arch, "kernel": source.name, "digest": source.digest, "triton": triton.__version__}
        return KernelFacts(**values | {"load_bits": (32, 128), "loads": {32: 4}})

    monkeypatch.setattr(offline, "facts", fake)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return found


@pytest.fixture
def failing(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: object, arch: str) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(offline, "facts", fail)


def test_the_command_without_a_file(compiled: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert called("--case", ONE) == 0
    assert "fold_one_channel │ sm_90" in capsys.readouterr().out
    assert called("--case", ONE, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["case"], row["spills"], row["load_bits"], row["error"]) == (ONE, 0, "32 128", None)


@pytest.mark.usefixtures("failing")
def test_a_kernel_that_fails_keeps_its_row(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "facts.csv"
    assert called("--csv", str(path), "--case", ONE) == 1
    with path.open() as file:
        (row,) = csv.DictReader(file)
    assert row["error"] == "RuntimeError: no such instruction"
    assert (row["case"], row["arch"], row["registers"]) == (ONE, "sm_90", "")


def test_a_stopped_run_resumes(
    tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of the same text are kept; rows of another text or with an error are compiled again."""
    path = tmp_path / "facts.csv"
    every = [word for case in (ONE, EMPTY, DEPTHWISE) for word in ("--case", case)]
    assert called("--csv", str(path), "--case", EMPTY) == 0
    assert called("--csv", str(path), *every) == 0
    assert compiled == [CASES[case]().digest for case in (EMPTY, ONE, DEPTHWISE)]
    capsys.readouterr()
    assert called("--csv", str(path), *every, "--json") == 0
    assert len(compiled) == 3
    assert [row["registers"] for row in json.loads(capsys.readouterr().out)["rows"]] == [0, 0, 0]
    path.write_text(path.read_text().replace(CASES[DEPTHWISE]().digest, "another"))
    monkeypatch.setattr(offline, "facts", lambda source, arch: 1 / 0)
    assert called("--csv", str(path), "--case", ONE, "--case", DEPTHWISE) == 1
    errors = {case: row["error"] for (case, _), row in offline.read(path).items()}
    assert errors == {ONE: None, EMPTY: None, DEPTHWISE: "ZeroDivisionError: division by zero"}


def test_ctrl_c_loses_nothing(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = offline.facts

    def interrupted(source: KernelSource, arch: str) -> KernelFacts:
        if compiled:
            raise KeyboardInterrupt
        return fake(source, arch)

    monkeypatch.setattr(offline, "facts", interrupted)
    assert called("--case", ONE, "--case", EMPTY) == 130
    assert ONE in capsys.readouterr().out


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "nothing"], "no such case: nothing; choose from fold_"),
        (["--arch", "voodoo2"], "no such architecture: voodoo2; choose from sm_75"),
        (["--csv", "other.csv"], "other.csv has other columns than case, kernel"),
        (["--csv", "."], "."),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.csv").write_text("a,b\n1,2\n")
    assert called(*arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert words in streams.err
    assert len(streams.err.strip().splitlines()) == 1


def test_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert called("--case", ONE) == 2
    assert "unset it" in capsys.readouterr().err


def test_committed_rows() -> None:
    """Check that every kernel was compiled for every architecture, and what docs/performance.md says of them."""
    rows = offline.read(RESULTS / "kernels_offline.csv")
    assert list(rows) == list(product(CASES, ARCHS))
    assert not any(row["error"] for row in rows.values())
    assert max(row["registers"] for row in rows.values()) == 72
    assert [key for key, row in rows.items() if row["spills"]] == [("merge_backward_repvgg8_fp32", "sm_100")]
    folds = [rows[f"{name}_resnet50_last16_fp32", "sm_90"] for name in ("fold", "fold_backward")]
    assert [(row["registers"], row["instructions"]) for row in folds] == [(40, 1513), (40, 1787)]
    oldest = offline.read(RESULTS / "kernels_offline_oldest.csv")
    assert {arch for _, arch in oldest} == {"sm_90", "sm_100", "gfx942"}
    assert not any(row["error"] or row["spills"] for row in oldest.values())
