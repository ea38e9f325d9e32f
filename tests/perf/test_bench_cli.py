"""Test the command line of the benchmark."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from bench_kit import (
    RUN,
    Add,
    OnCall,
    Scaled,
    bench,
    case,
    out_of_luck,
    rows_of,
)
from benchmark_rows import row, write
from torch import nn
from triton_convbn.perf import workloads

REFUSED = {
    "nothing to do": ([], ["--model NAME", "--layers NAME", "--compare"]),
    "unknown model": (["--model", "resnet81"], ["'resnet81'", "did you mean"]),
    "unknown layers": (["--layers", "vgg"], ["vgg", "decoder"]),
    "unknown mode": (["--layers", "other", "--mode", "test"], ["--mode", "'test'", "train-frozen"]),
    "unknown dtype": (["--layers", "other", "--dtype", "int8"], ["--dtype", "'int8'", "autocast_bfloat16"]),
    "unknown layout": (["--layers", "other", "--layout", "nhwc"], ["--layout", "'nhwc'", "channels_last"]),
    "unknown provider": (["--layers", "other", "--provider", "easy"], ["provider: easy", "triton_convbn_keep"]),
    "no device": (["--layers", "other", "--device", "gpu"], ["device: gpu"]),
    "device without a clock": (["--layers", "other", "--device", "meta"], ["--device meta", "cpu and cuda"]),
    "batch of zero": (["--layers", "other", "--batch", "0"], ["--batch"]),
    "rounds of zero": (["--layers", "other", "--rounds", "0"], ["--rounds"]),
    "size of zero": (["--model", "resnet18", "--size", "0"], ["--size"]),
    "unknown flag": (["--colour"], ["--colour"]),
    "tolerance that is none": (["--compare", "a.csv", "b.csv", "--tolerance", "-1"], ["--tolerance"]),
    "nothing to compare": (["--compare", "a.csv", "b.csv"], ["a.csv"]),
    "compared with nothing": (["--compare", "a.csv"], ["--compare"]),
    "file that is a folder": (["--layers", "other", "--csv", "."], ["directory"]),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.usefixtures("layers")
def test_refused(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("triton-convbn: ")
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.usefixtures("layers")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--layers", "other", "--device", "cuda:1") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("triton-convbn: no such device: cuda:1 (")


@pytest.mark.usefixtures("layers")
def test_json_and_csv(tmp_path: Path, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    """stdout has one object, stderr has the progress, and the file has the same rows."""
    add(Scaled())
    path = tmp_path / "rows.csv"
    settings = ["--layers", "other", "--mode", "infer", "--mode", "train", "--batch", "1", "--batch", "3"]
    chosen = ["--provider", "eager", "--provider", "scaled", "--provider", "eager_folded"]
    assert bench(*settings, "--layers", "small", *chosen, "--rounds", "6", "--json", "--csv", str(path)) == 0
    out, err = capsys.readouterr()
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in it"))
    assert set(found) == {"device", "csv", "rows"}
    assert found["csv"] == str(path)
    in_file = rows_of(path)
    assert [{key: "" if value is None else str(value) for key, value in each.items()} for each in found["rows"]] == [
        dict(each) for each in in_file
    ]
    times = {
        (each["case"], each["mode"], each["batch"], each["provider"]) for each in in_file if each["metric"] == "time"
    }
    runs = set(itertools.product(("other", "small"), ("infer", "train"), "13", ("eager", "scaled", "eager_folded")))
    assert times == {key for key in runs if key[1::2] != ("train", "eager_folded")}
    assert all(each["device"] == found["device"] for each in found["rows"])
    assert "other train float32 contiguous batch 3: scaled" in err


@pytest.mark.usefixtures("layers")
def test_failed_row_gives_exit_code_1(add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    add(OnCall(out_of_luck, 1))
    assert bench(*RUN) == 1
    out, err = capsys.readouterr()
    assert "| on_call | failed (1) |" in out
    assert "(1) RuntimeError: out of luck" in out
    assert "failed: small on_call train float32 contiguous 2 run: RuntimeError: out of luck" in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("layers")
def test_every_case_runs_once_before_the_first_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(workloads.LAYERS, "broken", lambda: [case(nn.Conv2d(5, 4, 3), name="broken")])
    path = tmp_path / "rows.csv"
    assert bench("--layers", "other", "--layers", "broken", "--provider", "eager", "--csv", str(path)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("triton-convbn: broken does not run on an input of shape (1, 3, 8, 8)")
    assert not path.exists()


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is 1 if something is worse by more than the tolerance."""
    paths = []
    for name, figure in (("a", 10.0), ("b", 10.8), ("c", 14.0)):
        write(tmp_path / f"{name}.csv", [row("time", figure, figure, figure)])
        paths.append(str(tmp_path / f"{name}.csv"))
    a, b, c = paths
    assert bench("--compare", a, c) == 1
    assert "regression" in capsys.readouterr().out
    assert bench("--compare", c, a) == 0
    assert bench("--compare", a, a) == 0
    assert bench("--compare", a, b) == 1
    assert bench("--compare", a, b, "--tolerance", "0.1") == 0
    capsys.readouterr()
    assert bench("--compare", a, c, "--json") == 1
    assert json.loads(capsys.readouterr().out)["regression"] == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--help") == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--model", "--layers", "--provider", "--compare", "--cold"))
