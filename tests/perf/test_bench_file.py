"""Test the file that a run appends to: a run resumes, and loses nothing."""

import json
import math
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from bench_kit import RUN, Add, OnCall, Scaled, bench, interrupt, nothing, out_of_luck, rows_of
from benchmark_rows import failed, row, write
from triton_convbn.perf.frame import read
from triton_convbn.perf.results import COLUMNS, Key, Report, append, locked, read_rows, start


def keys_of(path: Path) -> list[tuple[str, ...]]:
    return [tuple(each[name] for name in (*Key._fields, "metric")) for each in rows_of(path)]


@pytest.mark.usefixtures("layers")
def test_second_run_measures_nothing(tmp_path: Path, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    path, counted = tmp_path / "new" / "rows.csv", OnCall(nothing, 10**9)
    add(counted)
    arguments = [*RUN, "--mode", "train", "--mode", "infer", "--csv", str(path)]
    assert bench(*arguments, "--json") == 0
    first, content = json.loads(capsys.readouterr().out), path.read_bytes()
    assert counted.prepared == 2
    assert len(set(keys_of(path))) == len(keys_of(path)) == len(first["rows"])
    assert bench(*arguments, "--json") == 0
    assert counted.prepared == 2
    assert path.read_bytes() == content
    assert json.loads(capsys.readouterr().out) == first
    # Only what is new is measured: another mode, then another provider.
    assert bench(*arguments, "--mode", "input-grad") == 0
    assert counted.prepared == 3
    assert path.read_bytes().startswith(content)
    assert {each["mode"] for each in rows_of(path)[len(first["rows"]) :]} == {"input-grad"}
    content = path.read_bytes()
    add(Scaled())
    assert bench(*RUN, "--provider", "scaled", "--csv", str(path)) == 0
    assert path.read_bytes().startswith(content)
    new = path.read_bytes()[len(content) :].decode()
    assert {line.split(",")[1] for line in new.splitlines()} == {"scaled"}
    assert len(set(keys_of(path))) == len(keys_of(path))


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("at", [2, OnCall.BEFORE, OnCall.BEFORE + 2])
def test_interrupted_run_is_completed(at: int, tmp_path: Path, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    """Interrupt it while a provider is prepared, while memory is measured, and inside the rounds."""
    path = tmp_path / "rows.csv"
    add(OnCall(interrupt, at))
    assert bench(*RUN, "--csv", str(path)) == 130
    out, err = capsys.readouterr()
    said = err.strip().splitlines()[-1]
    kept = rows_of(path)
    assert said == f"interrupted; {len(kept)} rows are in {path}: run it again to resume"
    assert "small, train, float32, contiguous, batch 2" in out, "the rows so far are shown"
    assert {"pairs_folded", "output_error", "gradient_error"} <= {
        each["metric"] for each in kept if each["provider"] == ("eager" if at == 2 else "on_call")
    }
    assert not any(each["metric"].startswith("time") for each in kept)
    assert {each["status"] for each in kept} == {"ok"}
    content = path.read_bytes()

    add(OnCall(nothing, at))
    assert bench(*RUN, "--csv", str(path)) == 0
    assert path.read_bytes().startswith(content)
    keys = keys_of(path)
    assert len(set(keys)) == len(keys)
    found = {(each["provider"], each["metric"]) for each in rows_of(path)}
    assert {(name, metric) for name in ("eager", "on_call") for metric in ("time", "time_min", "time_rounds")} <= found
    assert ("on_call", "time_over_eager") in found


@pytest.mark.usefixtures("layers")
def test_interrupted_without_a_file(add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    add(OnCall(interrupt, 3))
    assert bench(*RUN, "--json") == 130
    out, err = capsys.readouterr()
    assert out == "", "no partial object"
    assert re.fullmatch(r"interrupted; \d+ rows", err.strip().splitlines()[-1])


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("changed", range(4))
def test_other_commit_or_device_is_measured_again(
    changed: int, tmp_path: Path, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same holds for torch and triton. The rows of both are kept."""
    path, counted = tmp_path / "rows.csv", OnCall(nothing, 10**9)
    add(counted)
    where = ["a CPU", "2.14.1", "3.8.0", "c0ffee0"]
    monkeypatch.setattr("triton_convbn.perf.results.environment", lambda _device: tuple(where))
    assert bench(*RUN, "--csv", str(path)) == 0
    before = rows_of(path)
    where[changed] += "+"
    for _ in range(2):
        assert bench(*RUN, "--csv", str(path)) == 0
        assert counted.prepared == 2
    rows = rows_of(path)
    assert rows[: len(before)] == before
    assert Counter(keys_of(path)) == dict.fromkeys(keys_of(path), 2)
    column = ("device", "torch", "triton", "commit")[changed]
    assert [each[column] for each in rows] == [where[changed][:-1]] * len(before) + [where[changed]] * len(before)


@pytest.mark.usefixtures("layers")
@pytest.mark.parametrize("at", [1, OnCall.BEFORE + 1])
def test_failed_rows_are_kept_and_not_tried_again(
    at: int, tmp_path: Path, add: Add, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither if everything else is there, nor if something is still missing."""
    path, broken = tmp_path / "rows.csv", OnCall(out_of_luck, at)
    add(broken)
    assert bench(*RUN, "--csv", str(path)) == 1
    content = path.read_bytes()
    assert bench(*RUN, "--csv", str(path), "--json") == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(each["provider"], each["error"]) for each in rows if each["status"] == "failed"] == [
        ("on_call", "RuntimeError: out of luck")
    ]
    assert path.read_bytes() == content
    add(Scaled())
    assert bench(*RUN, "--provider", "scaled", "--csv", str(path)) == 1
    assert broken.prepared == 1
    assert path.read_bytes().startswith(content)
    assert len(set(keys_of(path))) == len(keys_of(path))
    assert any(each["provider"] == "scaled" and each["metric"] == "time" for each in rows_of(path))


@pytest.mark.usefixtures("layers")
def test_failed_check_is_written_once(tmp_path: Path, add: Add) -> None:
    """A run that completes an interrupted one finds the failure again."""
    path = tmp_path / "rows.csv"
    add(Scaled(lambda y: 1.01 * y))
    add(OnCall(interrupt, 1))
    arguments = [*RUN, "--csv", str(path)]
    arguments[2:2] = ["--provider", "scaled"]
    assert bench(*arguments) == 130
    add(OnCall(nothing, 1))
    assert bench(*arguments) == 1
    assert len(set(keys_of(path))) == len(keys_of(path))
    assert [each["metric"] for each in rows_of(path) if each["status"] == "failed"] == ["output_error"]


@pytest.mark.usefixtures("layers")
def test_failures_of_other_cases_do_not_count(tmp_path: Path, add: Add) -> None:
    path = str(tmp_path / "rows.csv")
    add(OnCall(out_of_luck, 1))
    assert bench(*RUN, "--csv", path) == 1
    assert bench("--layers", "other", "--provider", "eager", "--rounds", "1", "--csv", path) == 0


def test_failure_after_a_figure_is_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    report = Report(path, "a CPU")
    report.measured(Key("a"), "output_error", "1", 0.0)
    for _ in range(2):
        report.checked(Key("a"), "output_error", "1", math.nan, 1.0)
    report.measured(Key("a"), "output_error", "1", 0.0)
    assert [each["status"] for each in rows_of(path)] == ["ok", "failed"]
    assert [each.status for each in report.rows] == ["failed"]


LAST = failed("run", 'RuntimeError: of "two", über')


def test_last_line_that_was_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut it everywhere, also inside a quotation or a character. It is left out, the rows around it count."""
    path = tmp_path / "rows.csv"
    first, third = row("time", 10.0), row("time", 30.0, batch=3)
    start(path)
    append(path, first)
    begin = path.stat().st_size
    append(path, LAST)
    content = path.read_bytes()
    lost = 0
    for end in range(begin, len(content) + 1):
        path.write_bytes(content[:end])
        assert start(path)[0] == first
        append(path, third)
        capsys.readouterr()
        found = read([path])
        assert (found["batch"].iloc[0], found["batch"].iloc[-1]) == (8, 3)
        # The row is there, perhaps without the end of its commit, or it is left out with one message.
        assert list(found["error"])[1:-1] in ([], [LAST.error])
        assert len(capsys.readouterr().err.splitlines()) == (len(found) == 2 and end > begin)
        lost += len(found) == 2
    assert lost == len(content) - begin - len(LAST.commit) - 1


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", ",".join(COLUMNS)[:-3], "\n", "\0\n", ",".join(COLUMNS) + ",more\n", '"' + "a" * 200_000]
)
@pytest.mark.usefixtures("layers")
def test_foreign_file_is_not_changed(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text)
    assert bench(*RUN[:4], "--csv", str(path)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"triton-convbn: {path} ")
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_last_line_without_an_end_is_kept(tmp_path: Path) -> None:
    """An editor may leave it so."""
    path = tmp_path / "rows.csv"
    start(path)
    append(path, row("time", 10.0))
    path.write_text(path.read_text().removesuffix("\n"))
    start(path)
    append(path, row("time", 20.0, batch=2))
    assert [each["p50"] for each in rows_of(path)] == ["10.0", "20.0"]


APPEND = """
import sys, time
from dataclasses import replace
from pathlib import Path
from triton_convbn.perf import environment
from triton_convbn.perf.results import Key, Report

path, ready, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
(ready / name).touch()
while len(list(ready.iterdir())) < 2:
    time.sleep(0.001)
for part in range(4):
    report = Report(path, "a CPU")
    environment.note(path)
    for index in range(20):
        report.checked(Key(f"{name} {part} {index}"), "time", "ms", 2.0, 1.0, "of " + name * 400)
"""


@pytest.mark.slow
def test_two_processes_start_one_file(tmp_path: Path) -> None:
    path, ready = tmp_path / "rows.csv", tmp_path / "ready"
    ready.mkdir()
    running = [
        subprocess.Popen([sys.executable, "-c", APPEND, str(path), str(ready), name], stderr=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    for process in running:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    lines = path.read_text().splitlines()
    assert lines.count(",".join(COLUMNS)) == 1
    assert lines[0] == ",".join(COLUMNS)
    cases_ = [each["case"] for each in rows_of(path)]
    assert sorted(cases_) == sorted(
        f"{name} {part} {index}" for name in "ab" for part in range(4) for index in range(20)
    )
    assert all(each["error"].startswith("of " + each["case"][0] * 400) for each in rows_of(path))
    assert all(each["status"] == "failed" and None not in each and None not in each.values() for each in rows_of(path))
    assert len(json.loads(path.with_suffix(".environment.json").read_text())) == 8, (
        "nor does one lose the other's entry"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_rows_are_written_under_a_lock(tmp_path: Path) -> None:
    """A process that opens the file must not read half a row."""
    path = tmp_path / "rows.csv"
    start(path)
    content = path.read_bytes()
    writer = threading.Thread(target=append, args=[path, row("time", 1)])
    with path.open("a+") as other, locked(other):
        writer.start()
        writer.join(0.1)
        assert writer.is_alive()
        assert path.read_bytes() == content
    writer.join(10)
    assert len(rows_of(path)) == 1


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [
        row("time", 0.1, 1 / 3, 1e-300),
        row("time", math.nan, math.inf, 5, status="failed", error='a "b", c', device="a CPU, with a comma", batch=0),
    ]
    write(tmp_path / "rows.csv", rows)
    back = read_rows(tmp_path / "rows.csv")
    assert back[0] == rows[0]
    assert (back[1].error, back[1].device, back[1].p80) == (rows[1].error, rows[1].device, 5)
    assert math.isnan(back[1].p50)
    assert math.isnan(back[1].p20), "the file has no infinity"


@pytest.mark.usefixtures("layers")
def test_environment_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    arguments = ["--layers", "other", "--provider", "eager", "--rounds", "1", "--csv", str(path)]
    monkeypatch.setenv("OMP_SOMETHING", "1")
    for times in (1, 2):
        assert bench(*arguments) == 0
        text = (tmp_path / "rows.environment.json").read_text()
        entries = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in it"))
        assert len(entries) == times
    entry = entries[-1]
    assert entry["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (entry["threads"], entry["variables"]["OMP_SOMETHING"]) == (torch.get_num_threads(), "1")
    assert entry["command"][1:] == sys.argv[1:]
    assert entry["commit"] == rows_of(path)[0]["commit"]
    assert entry["processor"] == rows_of(path)[0]["device"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["rows.csv", "rows.environment.json"]


@pytest.mark.parametrize("text", ['{"not": "a list"}', "3", "no JSON", ""])
@pytest.mark.usefixtures("layers")
def test_foreign_environment_file_is_not_changed(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "rows.environment.json"
    other.write_text(text)
    assert bench(*RUN[:4], "--csv", str(tmp_path / "rows.csv")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"triton-convbn: {other} is no list of runs"
    assert other.read_text() == text
