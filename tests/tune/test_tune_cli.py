"""The command: its output and files, the lines with which it refuses, and the winners in force after it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import tune_hooks
from triton_convbn.kernels import tuned, tuned_files
from triton_convbn.kernels.config import DEFAULT_CONFIG, KernelConfig
from tune_cases import HEADER, Landscape, problems

from triton_convbn.cli import main
from triton_convbn.tune import cli
from triton_convbn.tune import run as run_module
from triton_convbn.tune.bench import Bench
from triton_convbn.tune.outcome import Outcome, Status
from triton_convbn.tune.problem import FULL, Problem, configurations
from triton_convbn.tune.run import Preset
from triton_convbn.tune.store import Store
from triton_convbn.versions import commit

MODEL = """
from torch import nn

def net():
    convs = [nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 256, 1)]
    return nn.Sequential(*(each for conv in convs for each in (conv, nn.BatchNorm2d(conv.out_channels)))).eval()

def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
"""


class Spilling(Landscape):
    """The default spills, so that another configuration wins."""

    def outcome(self, problem: Problem, config: KernelConfig) -> Outcome:
        spills = Outcome(Status.SPILLS, message="8 spills")
        return spills if config == DEFAULT_CONFIG else super().outcome(problem, config)


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Use a current directory, cache and shipped files of the test's own. Nothing compiles."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_CONVBN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuned_files, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(cli, "Bench", lambda *_, **__: Landscape())
    Path("tiny.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    tuned_files.forget()


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["tune", *arguments])
    return exit_.value.code


def records(store: Path) -> int:
    return sum(map(len, Store.read(store).outcomes.values()))


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return the JSON object on stdout."""
    assert called(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


RUN = ("--model", "tiny:net", "--arch", "sm_90")


def test_table_csv_store_and_winners(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert called(*RUN, "--csv", "out/found.csv") == 0
    streams = capsys.readouterr()
    for words in ("fold/fp32/small: 4 pairs", "fold_backward/fp32/small", "registers", "gain", "default", "winner"):
        assert words in streams.out
    assert "ranked by compiled facts (offline), not measured" in streams.out
    assert "winners of 2 keys are in" in streams.out
    frame = pd.read_csv("out/found.csv", dtype={"commit": str})  # a hash may be all digits
    stores = list((tmp_path / "cache" / "tune").iterdir())
    assert len(stores) == 1
    assert len(frame) == records(stores[0])
    keys = ["fold/fp32/small", "fold_backward/fp32/small"]
    assert list(frame["key"].unique()) == keys
    for key, rows in frame.groupby("key"):
        best = rows[rows["winner"]]
        assert len(best) == 1
        assert set(rows["status"]) <= set(Status)
        assert (best["status"] == "ok").all()
        default = rows[rows["default"]]["cost"].item()
        good = rows[rows["status"] == "ok"]
        assert (good["gain"] - default / good["cost"]).abs().max() < 1e-9
        assert rows[rows["status"] != "ok"]["cost"].isna().all()
        choice = tuned.choose(str(key), tuned.Gpu("sm_90"))
        assert choice.file == tmp_path / "cache" / "tuned" / "sm_90.json"
        expected = {name: best[name].item() for name in ("block", "threads", "emit", "evict")}
        assert choice.config == KernelConfig(**expected)
        assert choice.entry is not None
        assert choice.entry.how == tuned_files.OFFLINE
    assert set(frame["commit"]) == {commit()}
    assert set(frame["arch"]) == {"sm_90"}
    assert {"torch", "triton", "device", "driver", "sources", "registers", "seconds", "message"} <= set(frame.columns)


def test_json_and_resume(capsys: pytest.CaptureFixture[str]) -> None:
    first = result(capsys, *RUN)
    second = result(capsys, *RUN)
    assert first["evaluated"] == len(first["rows"]) > 0
    assert (second["evaluated"], second["from_store"]) == (0, first["evaluated"])
    assert second["rows"] == first["rows"]
    for before, after in zip(first["problems"], second["problems"], strict=True):
        assert (after["winner"], after["cost"], after["ended"]) == (before["winner"], before["cost"], True)


def test_fresh_starts_over_and_keeps_the_old_store(capsys: pytest.CaptureFixture[str]) -> None:
    first = result(capsys, *RUN, "--store", "store.jsonl")
    before = Path("store.jsonl").read_bytes()
    again = result(capsys, *RUN, "--store", "store.jsonl", "--fresh")
    assert again["evaluated"] == first["evaluated"]
    assert Path("store.jsonl.1").read_bytes() == before


def test_replay(capsys: pytest.CaptureFixture[str]) -> None:
    full = result(capsys, *RUN, "--preset", "full", "--store", "store.jsonl", "--tuned", "tuned.json")
    before = Path("tuned.json").read_bytes(), Path("store.jsonl").read_bytes()
    replayed = result(capsys, "--replay", "store.jsonl", "--preset", "full", "--search", "local")
    assert replayed["evaluated"] == 0
    assert 0 < replayed["from_store"] < full["evaluated"]
    assert len(replayed["problems"]) == 2
    assert (Path("tuned.json").read_bytes(), Path("store.jsonl").read_bytes()) == before


def test_show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert called("--show", "--arch", "sm_90") == 0
    text = capsys.readouterr().out
    assert "nothing is tuned for sm_90, every call runs with the default" in text
    files = [tuned_files.user_file("sm_90"), tuned_files.shipped_file("sm_90")]
    assert text.endswith(f"looked in {files[0]} and {files[1]}\n")
    key = "fold/fp32/small"
    shipped = tuned_files.Entry(key, KernelConfig(block=512)), tuned_files.Entry("fold/fp16/large", DEFAULT_CONFIG)
    tuned_files.write(tuned_files.shipped_file("sm_90"), "sm_90", shipped)
    shown = result(capsys, "--show", "--arch", "sm_90", "--model", "tiny:net")
    why = {row["key"]: (row["config"]["block"], row["why"]) for row in shown["rows"]}
    assert why == {
        key: (512, f"shipped: {tuned_files.OFFLINE}"),
        "fold/fp16/large": (1024, f"shipped: {tuned_files.OFFLINE}"),
        "fold_backward/fp32/small": (1024, "default: no tuned file has this key"),
    }
    mine = tuned_files.Entry(key, KernelConfig(block=2048), "measured on NVIDIA H100", "NVIDIA H100")
    tuned_files.write(tuned_files.user_file("sm_90"), "sm_90", [mine])
    assert called("--show", "--arch", "sm_90") == 0
    text = capsys.readouterr().out
    assert "512 elements" in text
    assert "shipped" in text
    assert f"{key}: passed over {tmp_path / 'cache' / 'tuned' / 'sm_90.json'}: measured on NVIDIA H100" in text


def test_winners_are_in_force(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """--show lists the winners of a run for the calls that it tuned."""
    monkeypatch.setattr(cli, "Bench", lambda *_, **__: Spilling())
    found = result(capsys, *RUN)
    shown = {row["key"]: row for row in result(capsys, "--show", *RUN)["rows"]}
    assert len(found["problems"]) == 2
    for each in found["problems"]:
        assert KernelConfig.from_dict(each["winner"]) != DEFAULT_CONFIG
        assert each["default_cost"] is None
        assert shown[each["key"]]["config"] == each["winner"]
        assert shown[each["key"]]["why"] == f"the user's: {tuned_files.OFFLINE}"


REFUSED = {
    "neither arch nor device": (["--model", "resnet18"], ["--arch sm_90", "--device cuda:0"]),
    "both": ([*RUN, "--device", "cuda:0"], ["--arch sm_90", "--device cuda:0"]),
    "no model": (["--arch", "sm_90"], ["--model NAME"]),
    "unknown arch": (["--arch", "sm_91", "--model", "tiny:net"], ["sm_91", "sm_90"]),
    "unknown preset": ([*RUN, "--preset", "slow"], ["slow", "quick"]),
    "unknown search": ([*RUN, "--search", "genetic"], ["genetic", "exhaustive"]),
    "unknown dtype": (["--model", "resnet18", "--arch", "sm_90", "--dtype", "int8"], ["int8", "float32"]),
    "unknown model": (["--model", "resnet81", "--arch", "sm_90"], ["resnet81"]),
    "no budget": ([*RUN, "--budget", "0"], ["--budget"]),
    "csv is a folder": ([*RUN, "--csv", "."], ["--csv", "directory"]),
    "no gpu": (["--model", "tiny:net", "--device", "cuda:0"], ["cuda:0", "--arch sm_90"]),
    "no device": (["--model", "tiny:net", "--device", "gpu:0"], ["gpu:0"]),
    "store is no store": ([*RUN, "--store", "tiny.py"], ["tiny.py", "--fresh", "--store"]),
    "nothing to replay": (["--replay", "nowhere.jsonl"], ["nowhere.jsonl"]),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert called(*arguments) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    last = streams.err.strip().splitlines()[-1]
    assert last.startswith("triton-convbn: ")
    assert "Traceback" not in streams.err
    for word in words:
        assert word in last
    assert Path("tiny.py").read_text() == MODEL


def test_the_store_of_another_arch(capsys: pytest.CaptureFixture[str]) -> None:
    result(capsys, *RUN, "--store", "store.jsonl")
    assert called("--model", "tiny:net", "--arch", "sm_80", "--store", "store.jsonl") == 2
    assert "store.jsonl was recorded for arch sm_90 (here sm_80)" in capsys.readouterr().err


def test_winners_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert called(*RUN, "--tuned", "tiny.py/tuned.json", "--csv", "found.csv") == 1
    streams = capsys.readouterr()
    assert "the winners are not in force, for tiny.py/tuned.json cannot be written" in streams.err
    assert "registers" in streams.out  # the results are printed all the same
    assert len(pd.read_csv("found.csv")) > 0


def test_a_budget_that_ends_before_anything_is_tried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count(0, 100)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    assert called(*RUN, "--budget", "1") == 0
    assert "no candidate was tried" in capsys.readouterr().out


def test_a_search_that_max_configs_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """The same command again would try no more."""
    assert called(*RUN, "--max-configs", "2") == 0
    text = capsys.readouterr().out
    assert "--max-configs are tried" in text
    assert "run the same command again" not in text


def test_another_file_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.json").write_text('{"of": "the user"}')
    assert called(*RUN, "--tuned", "notes.json") == 2
    assert "notes.json is no tuned file" in (text := capsys.readouterr().err)
    assert "give another --tuned" in text
    assert Path("notes.json").read_text() == '{"of": "the user"}'


def test_a_csv_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    """The run ends with an error, but its records are kept."""
    assert called(*RUN, "--csv", "tiny.py/found.csv") == 2
    assert "--csv tiny.py/found.csv: " in capsys.readouterr().err
    again = result(capsys, *RUN, "--csv", "found.csv")
    assert (again["evaluated"], again["from_store"]) == (0, len(pd.read_csv("found.csv")))


def test_nothing_can_win(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Landscape):
        def outcome(self, problem: Problem, config: KernelConfig) -> Outcome:
            return Outcome(Status.FAILED, message="RuntimeError: no compiler")

    monkeypatch.setattr(cli, "Bench", lambda *_, **__: Broken())
    assert called(*RUN, "--tuned", "tuned.json") == 1
    text = capsys.readouterr().out
    assert "failed: RuntimeError: no compiler" in text
    assert "nothing can win: the default stays in force" in text
    assert "there is no winner" in text
    assert not Path("tuned.json").exists()


def test_a_store_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert called(*RUN, "--store", "tiny.py/store", "--json") == 2
    assert "tiny.py/store cannot be written" in capsys.readouterr().err


def test_help_fits_one_screen() -> None:
    environment = os.environ | {"COLUMNS": "100"}
    command = [sys.executable, "-m", "triton_convbn", "tune", "--help"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert len(text.splitlines()) <= 45


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(Landscape):
        def outcome(self, problem: Problem, config: KernelConfig) -> Outcome:
            if len(self.evaluated) == 4:
                raise KeyboardInterrupt
            return super().outcome(problem, config)

    monkeypatch.setattr(cli, "Bench", lambda *_, **__: Interrupted())
    assert called(*RUN, "--store", "store.jsonl") == 130
    assert "interrupted: 3 records are in store.jsonl; the same command resumes" in capsys.readouterr().err
    assert records(Path("store.jsonl")) == 3


def test_candidates_with_faults_are_recorded_and_do_not_win(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problems()[0]
    given = dict(zip(configurations(FULL, problem), Status, strict=False))  # the default is the one that is ok
    monkeypatch.setattr(run_module, "configurations", lambda space, problem: tuple(given))

    class Faulty(Landscape):
        def outcome(self, problem: Problem, config: KernelConfig) -> Outcome:
            return Outcome(given[config], cost=40.0 if config == DEFAULT_CONFIG else None)

    def run() -> dict[str, Any]:
        store, preset = Store.open(tmp_path / "store", HEADER), Preset(FULL, "exhaustive")
        cli.run([problem], Faulty(), store, preset, time.monotonic(), tmp_path / "csv", json_=True)
        return json.loads(capsys.readouterr().out)

    said = run()
    found = Store.read(tmp_path / "store").outcomes[problem.key]
    assert {config: outcome.status for config, outcome in found.items()} == given
    assert said["problems"][0]["winner"] == asdict(DEFAULT_CONFIG)
    assert said["problems"][0]["failures"] == dict.fromkeys(set(Status) - {Status.OK}, 1)
    assert set(pd.read_csv(tmp_path / "csv")["status"]) == set(Status)
    assert run()["evaluated"] == 0  # candidates that failed are not tried again


# ---- real kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_by_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU, and interprets."""
    monkeypatch.setattr(cli, "Bench", lambda *_, **__: Bench(tune_hooks.time_interpreted, 1, 120, noisy=True))
    monkeypatch.setattr(cli, "gpu_of", lambda device: tuned.Gpu("sm_90", "NVIDIA H100"))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    arguments = ("--model", "tiny:small", "--device", "cuda:0", "--search", "exhaustive", "--max-configs", "3")
    found = result(capsys, *arguments, "--store", "store.jsonl")
    assert {row["status"] for row in found["rows"]} == {"ok"}
    assert {(row["unit"], row["how"], row["driver"], row["reranked"]) for row in found["rows"]} == {
        ("measured us", "measured on NVIDIA H100", "13000", True)
    }
    assert {row["evict"] for row in found["rows"]} > {"none"}
    assert {problem["tried"] for problem in found["problems"]} == {3}
    for problem in found["problems"]:
        entry = tuned.choose(problem["key"], tuned.Gpu("sm_90", "NVIDIA H100")).entry
        assert entry is not None
        assert (entry.how, entry.cost) == ("measured on NVIDIA H100", problem["cost"])
    assert result(capsys, *arguments, "--store", "store.jsonl")["evaluated"] == 0


@pytest.mark.slow
def test_killed_while_it_compiles(tmp_path: Path) -> None:
    """The command is killed while it compiles. Recorded candidates are not compiled again."""
    command = [sys.executable, "-m", "triton_convbn", "tune", "--model", "tiny:net", "--arch", "sm_90", "--json"]
    command += ["--store", "store.jsonl", "--search", "exhaustive", "--max-configs", "3", "--workers", "1"]
    environment = os.environ | {"TRITON_CONVBN_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while written() < 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = records(Path("store.jsonl"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["evaluated"] + said["from_store"] == 6
    assert said["from_store"] == kept >= 2
    assert all(each["winner"] for each in said["problems"])


def written() -> int:
    try:
        return Path("store.jsonl").read_bytes().count(b'"config"')
    except OSError:
        return 0
