"""The command line: what it prints where, and that bad input is one line on stderr and exit code 2."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from triton_convbn.cli import main

MODELS = """
import torch
from torch import nn

number = 3


def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def small():
    return nn.Sequential(*block(3, 16), *block(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(16))


def five_channels():
    return nn.Sequential(*block(5, 4))


def no_module():
    return [1, 2]


def no_inputs():
    return small(), "image"


def needs_argument(width):
    return nn.Sequential(*block(3, width))


ready = nn.Sequential(*block(3, 4))
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the name of a module in the current directory."""
    (tmp_path / "models_of_the_user.py").write_text(MODELS)
    (tmp_path / "needs_a_package.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "models_of_the_user"
    sys.modules.pop("models_of_the_user", None)


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    return exit_.value.code


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """Return the JSON object on stdout."""
    assert called(*arguments) == 0
    return json.loads(capsys.readouterr().out)


def assert_refused(code: int, out: str, err: str, *words: str) -> None:
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("triton-convbn: ")
    for word in words:
        assert word in lines[0]


WITH_INPUTS = {
    "3-D U-Net": (["unet", "--shape", "1,1,8,8,8"], 3),
    "audio": (["audio", "--shape", "2,1,64"], 1),
    "an image and indices": (["mixed", "--shape", "2,3,8,8", "--shape", "2,9:int64"], 1),
    "keywords, returns a dict": (["returns_dict"], 1),
    "keywords, returns a list": (["returns_list"], 1),
    "keywords, returns nested tuples": (["returns_nested"], 1),
    "keywords, returns a dataclass": (["returns_dataclass"], 1),
    "keywords, returns a mapping that is a dataclass": (["returns_output"], 1),
    "a list of images": (["nested_inputs"], 2),
    "indices alone": (["only_indices"], 1),
}

REFUSED = {
    "no model": (["explain"], ["--model"]),
    "unknown flag": (["explain", "--model", "resnet18", "--colour"], ["--colour"]),
    "unknown when": (["explain", "--model", "resnet18", "--when", "never"], ["'never'", "'profitable'"]),
    "unknown command": (["explian"], ["explian"]),
    "too many arguments": (["explain", "--model", "resnet18", "resnet34"], ["resnet34"]),
    "size of zero": (["explain", "--model", "resnet18", "--size", "0"], ["--size"]),
    "size of a demo": (["demo", "--size", "31"], ["--size", "32"]),
    "batch that is no number": (["demo", "--batch", "four"], ["--batch", "integer"]),
    "batch of zero": (["demo", "--batch", "0"], ["--batch"]),
    "rounds of zero": (["demo", "--rounds", "0"], ["--rounds"]),
    "unknown model": (["explain", "--model", "resnet81"], ["'resnet81'", "did you mean", "resnet18", ":callable"]),
    "unknown model of a demo": (["demo", "--model", "mobilnet_v2"], ["'mobilnet_v2'", "did you mean"]),
    "unlike any model": (["explain", "--model", "zzzzzzzz"], ["'zzzzzzzz'", ":callable"]),
    "module not there": (["explain", "--model", "not_there.at_all:model"], ["'not_there.at_all'", "import"]),
    "module without a name": (["explain", "--model", ":model"], ["':model'"]),
    "module that does not import": (["explain", "--model", "needs_a_package:x"], ["a_package_that_is_not_there"]),
    "callable not there": (["explain", "--model", "models_of_the_user:large"], ["'models_of_the_user'", "'large'"]),
    "no module returned": (["explain", "--model", "models_of_the_user:no_module"], ["no_module", "list", "nn.Module"]),
    "no callable": (["explain", "--model", "models_of_the_user:number"], ["models_of_the_user:number", "int"]),
    "callable with arguments": (["explain", "--model", "models_of_the_user:needs_argument"], ["needs_argument"]),
    "input does not fit": (
        ["explain", "--model", "models_of_the_user:five_channels"],
        ["models_of_the_user:five_channels does not run on an input of shape (1, 3, 224, 224)", "accepts by --shape"],
    ),
    "inputs that are no tuple": (["explain", "--model", "models_of_the_user:no_inputs"], ["tuple", "(model, args)"]),
    "input of a demo does not fit": (["demo", "--model", "models_of_the_user:five_channels", "--size", "32"], []),
    "no script": (["run"], ["script"]),
    "script not there": (["run", "not_there.py"], ["no such script", "not_there.py"]),
    "script that is a folder": (["run", "."], ["no such script"]),
    "module not there to run": (["run", "-m", "not_there"], ["no such module: not_there"]),
    "module of a package not there": (["run", "-m", "not_there.train"], ["no such module: not_there.train"]),
    "relative module": (["run", "-m", ".train"], ["no such module: .train"]),
    "package that does not run": (["run", "-m", "json"], ["no such module: json"]),
    "shape of words": (["explain", "--model", "resnet18", "--shape", "1,x"], ["--shape 1,x", "2,9:int64"]),
    "shape without a number": (["explain", "--model", "resnet18", "--shape", "1,,2"], ["--shape 1,,2"]),
    "shape of no dtype": (["kernel", "--model", "resnet18", "--shape", "1,3:Tensor"], ["--shape 1,3:Tensor"]),
    "shape that does not fit": (["plan", "--model", "resnet18", "--shape", "1,3,9"], ["(1, 3, 9)", "--shape"]),
    "too many shapes": (["bench", "--model", "resnet18", *["--shape", "1,3,9,9"] * 2], ["(1, 3, 9, 9), (1, 3, 9, 9)"]),
    "shape of layers": (["bench", "--layers", "heads", "--shape", "1,3"], ["--shape", "--model"]),
    "shape and size": (
        ["explain", "--model", "resnet18", "--shape", "1,3,9,9", "--size", "9"],
        ["leave out", "--size"],
    ),
    "shape and batch": (["bench", "--model", "resnet18", "--shape", "1,3,9,9", "--batch", "2"], ["leave out --batch"]),
    "unknown flag of run": (["run", "--colour", "script.py"], ["--colour"]),
    "bad kernel": (["run", "--kernel", "cuda", "script.py"], ["--kernel", "'cuda'", "'auto'", "'torch'", "'triton'"]),
    "bad on-decline": (["run", "--on-decline", "stop", "script.py"], ["--on-decline", "'stop'", "'warn'"]),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments: list[str], words: list[str], models: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("script.py").write_text("raise SystemExit('it ran')\n")
    code = called(*arguments)
    streams = capsys.readouterr()
    # A demo that has begun says what it is doing; the refusal is what comes last.
    err = (
        streams.err.strip().splitlines()[-1]
        if arguments[0] == "demo" and "Traceback" not in streams.err
        else streams.err
    )
    assert_refused(code, streams.out, err, *words)


def run_python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | variables,
        check=False,
    )


@pytest.mark.slow
def test_no_package_of_models() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = sys.modules['timm'] = None\n"
        "from triton_convbn.cli import main; main(sys.argv[1:])"
    )
    done = run_python(code, "explain", "--model", "resnet18")
    assert_refused(done.returncode, done.stdout, done.stderr, "torchvision", "timm", "pip install '.[models]'")


def test_one_package_of_models_is_enough(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert result(capsys, "explain", "--model", "resnet18", "--size", "32", "--json")["folded"] == 20


@pytest.mark.slow
def test_as_a_process() -> None:
    command = [sys.executable, "-m", "triton_convbn", "explain", "--model", "not_there:model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_refused(done.returncode, done.stdout, done.stderr, "'not_there'")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("explain", "demo", "run"))


@pytest.mark.parametrize(
    ("command", "values"),
    [("explain", "profitable|always"), ("run", "auto|torch|triton"), ("run", "ignore|warn|raise")],
)
def test_help_lists_the_values_of_options(command: str, values: str) -> None:
    arguments = [sys.executable, "-m", "triton_convbn", command, "--help"]
    text = subprocess.run(arguments, env=os.environ | {"COLUMNS": "160"}, capture_output=True, text=True).stdout
    assert values in text


def test_help_of_the_gpu_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("dev", "gpu-check", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: triton-convbn dev gpu-check ")


def test_explain_json(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "explain", "--model", f"{models}:small", "--size", "32", "--json")
    assert set(found) == {"model", "folded", "batch_norms", "rows", "unmerged"}
    assert (found["model"], found["folded"], found["batch_norms"]) == (f"{models}:small", 2, 3)
    assert [row["batch_norm"] for row in found["rows"]] == ["1", "4", "8"]
    assert [row["conv"] for row in found["rows"]] == ["0", "3", ""]
    assert [row["reason"] for row in found["rows"]] == ["", "", "input_not_conv"]
    assert found["unmerged"] == []
    assert all(set(row) == {"batch_norm", "conv", "reason", "why", "detail", "kept"} for row in found["rows"])


def test_explain_table(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("explain", "--model", f"{models}:small", "--size", "32") == 0
    text = capsys.readouterr().out
    assert "input_not_conv: its input is not the output of a convolution" in text
    assert text.strip().endswith("2 of 3 fold")


def test_explain_of_inference(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{models}:ready"
    found = result(capsys, "explain", "--model", name, "--infer", "--json")
    assert [row["reason"] for row in found["rows"]] == ["does_not_pay"]
    found = result(capsys, "explain", "--model", name, "--infer", "--when", "always", "--json")
    assert (found["folded"], found["batch_norms"]) == (1, 1)


def test_a_module_instead_of_a_callable(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "explain", "--model", f"{models}:ready", "--json")
    assert (found["folded"], found["batch_norms"]) == (1, 1)


@pytest.mark.parametrize(("arguments", "calls"), WITH_INPUTS.values(), ids=WITH_INPUTS)
def test_models_that_take_no_images(arguments: list[str], calls: int, capsys: pytest.CaptureFixture[str]) -> None:
    """explain and bench run them, and the outputs and gradients of a folded step are those of fp64."""
    model = ["--model", f"models_with_inputs:{arguments[0]}", *arguments[1:], "--json"]
    found = result(capsys, "explain", *model)
    assert (found["folded"], found["batch_norms"]) == (calls, calls)
    rows = result(capsys, "bench", *model, "--provider", "triton_convbn_eager", "--rounds", "1")["rows"]
    figures = {row["metric"]: row["p50"] for row in rows}
    assert figures["pairs_folded"] == calls
    assert max(figures["output_error"], figures["gradient_error"]) < 1e-5
    assert {row["status"] for row in rows} == {"ok"}


def test_a_case_is_named_after_its_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    """Volumes in channels_last are channels_last_3d."""
    model = ["--model", "models_with_inputs:unet", "--shape", "2,1,4,4,4", "--layout", "channels_last"]
    row = result(capsys, "bench", *model, "--provider", "eager", "--rounds", "1", "--json")["rows"][0]
    assert (row["case"], row["batch"]) == ("models_with_inputs:unet@2x1x4x4x4", 2)


@pytest.mark.slow
def test_plan_of_models_that_take_no_images(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, batch in ((["unet", "--shape", "1,1,8,8,8"], 1), (["returns_output"], 2)):
        model = ["--model", f"models_with_inputs:{arguments[0]}", *arguments[1:], "--train"]
        rows = result(capsys, "plan", *model, "--provider", "triton_convbn", "--json")["rows"]
        assert {row["metric"]: row["p50"] for row in rows}["folds_backward"] >= 1
        assert {row["batch"] for row in rows} == {batch}


def test_tune_and_kernel_take_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "models_with_inputs:unet", "--shape", "1,1,4,4,4"]
    assert called("kernel", *model, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["pairs"] == ["down.1", "middle.1", "up.1"]
    assert called("tune", *model, "--arch", "sm_90", "--show") == 0
    assert "fold_backward/fp32/small" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--facts"], ["--facts", "--json"]])
def test_kernel_of_a_model_in_which_nothing_folds(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert called("kernel", "--model", "torch.nn:Identity", "--shape", "1,3,4,4", *arguments) == 2
    assert "nothing folds in 'torch.nn:Identity'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["explain", "bench", "plan", "kernel", "run", "demo", "plot"])
def test_help_fits_one_screen(command: str) -> None:
    arguments = [sys.executable, "-m", "triton_convbn", command, "--help"]
    text = subprocess.run(arguments, env=os.environ | {"COLUMNS": "100"}, capture_output=True, text=True).stdout
    assert 10 < len(text.splitlines()) <= 45


@pytest.mark.slow
def test_demo(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{models}:small"
    size = ["--size", "32", "--batch", "2", "--rounds", "1"]
    found = result(capsys, "demo", "--model", name, *size, "--json")
    assert set(found) == {"device", "csv", "rows"}
    assert found["csv"] is None
    assert found["device"]
    figures: dict[str, dict[str, float]] = {}
    for row in found["rows"]:
        assert (row["case"], row["batch"], row["mode"], row["dtype"]) == (f"{name}@32", 2, "train", "float32")
        assert (row["layout"], row["status"], row["error"]) == ("contiguous", "ok", "")
        assert (row["device"], row["torch"]) == (found["device"], torch.__version__)
        figures.setdefault(row["provider"], {})[row["metric"]] = row["p50"]
    assert {key: each["pairs_folded"] for key, each in figures.items()} == {
        "eager": 0,
        "inductor": 0,
        "inductor_efficient_conv_bn": 2,
        "triton_convbn": 2,
    }
    for provider, each in figures.items():
        # Two convolutions of at most 144 products a sum, in fp32; the seed keeps every ReLU off its kink.
        assert 0 < each["output_error"] < 1e-5, provider
        assert 0 < each["gradient_error"] < 1e-4, provider
        assert each["time_rounds"] == 1
        assert each["time"] == each["time_min"] > 0
        assert each["peak_memory"] > each["saved_for_backward"]
        assert "compile_time" not in each, "not with empty caches"
        for baseline in ("eager", "inductor", "inductor_efficient_conv_bn"):
            if baseline != provider:
                assert each[f"time_over_{baseline}"] == pytest.approx(each["time"] / figures[baseline]["time"])
                assert f"time_over_{baseline}_low" not in each, "an interval of one round"
    assert figures["triton_convbn"]["saved_for_backward"] < figures["inductor"]["saved_for_backward"]
    # Of the two blocks at least the map that the second convolution reads has to be kept: (2, 16, 30, 30), fp32.
    assert figures["triton_convbn"]["saved_for_backward"] > 2 * 16 * 30 * 30 * 4


def test_developer_commands_are_those_of_the_modules(capsys: pytest.CaptureFixture[str]) -> None:
    """Each has the options of its module, and a wrong one is exit code 2."""
    assert called("dev", "docs", "--help") == 0
    assert "--check" in capsys.readouterr().out
    assert called("dev", "docs", "--chek") == 2
    assert called("dev", "doc") == 2
