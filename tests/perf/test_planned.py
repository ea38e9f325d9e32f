"""Test the plan for an H100: its counts, its command line, and that the pretended GPU leaves nothing behind."""

import csv
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_model import pairs
from torch import nn
from torch._inductor import config as inductor_config
from torch.utils._triton import has_triton
from triton_convbn.perf.plan import code, h100
from triton_convbn.perf.plan.cli import DEVICE, Provider
from triton_convbn.perf.plan.code import Launch
from triton_convbn.perf.plan.planner import Plan, plan
from versions import TORCH, needs_torch

from triton_convbn.cli import main
from triton_convbn.dispatch import kernel_runs, planned_for
from triton_convbn.errors import UsageError

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

sums_fuse = needs_torch(2, 12, "Inductor sums one gradient of a bias in two launches of its own, all others as 2.14")
WEIGHTS = 4 * (3 * 64 * 9 + 64 * 128 * 9 + 128 * 128)


def of(model: nn.Module, provider: str, train: bool = True, **more: Any) -> Plan:
    return plan(model, torch.randn(8, 3, 56, 56), provider, train, **more)


@cache
def of_pairs(provider: str, train: bool = True, **more: Any) -> Plan:
    """Return the plan of the three pairs, made once for all tests that only read it."""
    return of(pairs(), provider, train, **more)


def launches(found: Plan, direction: str) -> list[Launch]:
    return [launch for launch in found.launches if launch.direction == direction]


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(["plan", *arguments])
    code = exited.value.code
    assert isinstance(code, int)
    return code


# -- what it counts ---------------------------------------------------------------------------------------------------


def test_launches_of_a_training_step() -> None:
    plain, ours = of_pairs("inductor"), of_pairs("triton_convbn")
    assert plain.figures()["folds_forward"] == plain.figures()["folds_backward"] == 0
    assert (ours.figures()["folds_forward"], ours.figures()["folds_backward"]) == (1, 2)  # again, and its gradients
    for found in (plain, ours):
        figures = found.figures()
        assert figures["convolutions"] == 6
        assert figures["other_calls"] == 0
        assert figures["bytes_forward"] == sum(kernel.bytes for kernel in launches(found, "forward"))
        assert figures["bytes_backward"] == sum(kernel.bytes for kernel in launches(found, "backward"))
        assert figures["saved_for_backward"] == found.saved
        kernels = found.launches
        assert figures["launches_forward"] + figures["launches_backward"] == sum(
            kernel.launches for kernel in kernels if kernel.kind in ("triton", "fold")
        )
    # Without ours: the input and two weights to channels_last, and three times BatchNorm and ReLU. Ours: no weights.
    assert plain.figures()["launches_forward"] == 6
    assert ours.figures()["launches_forward"] == 1 + 1 + 3
    assert ours.figures()["saved_for_backward"] < plain.figures()["saved_for_backward"]


@sums_fuse
def test_a_fold_moves_every_weight_twice() -> None:
    """Read and write each weight in forward and again in backward, where gradients are read and written as well.

    Forward does not fold the 1x1 convolution: it scales the output.
    """
    found = of_pairs("triton_convbn")
    (forward,) = (kernel.bytes for kernel in launches(found, "forward") if kernel.kind == "fold")
    again, gradients = (kernel.bytes for kernel in launches(found, "backward") if kernel.kind == "fold")
    vectors = 4 * (64 + 128 + 128)
    folded = 2 * (WEIGHTS - 4 * 128 * 128)
    assert forward == folded + 5 * 4 * (64 + 128)  # weight, bias, mean and variance in, the folded bias out
    assert again == 2 * WEIGHTS + 2 * vectors  # with bn_weight and variance; nothing reads a folded bias there
    rows = 4 * 8 * (54 * 64 + 52 * 128 + 52 * 128)  # bias gradients arrive as a row for each image and line of it
    assert 3 * WEIGHTS + rows < gradients < 3 * WEIGHTS + rows + 10 * vectors


@pytest.mark.parametrize("provider", ["triton_convbn", "triton_convbn_keep"])
def test_no_weight_is_copied(provider: str) -> None:
    """Give parameters, folded weights and gradients the layout that their reader wants."""
    found = of_pairs(provider)
    sizes = {4 * 2 * 64 * 128 * 9, 4 * 3 * 64 * 128 * 9, 4 * 2 * 3 * 64 * 9, 4 * 3 * 3 * 64 * 9}
    kernels = [kernel for kernel in found.launches if kernel.kind == "triton"]
    assert [kernel for kernel in kernels if kernel.bytes in sizes] == []


@sums_fuse
def test_the_gradient_of_a_bias_is_summed_where_it_is_made() -> None:
    """Sum a bias gradient outside of the convolution's backward, as on a GPU: it is a launch if it does not fuse."""
    found = of_pairs("triton_convbn")
    sums = [
        kernel.name for kernel in launches(found, "backward") if kernel.name.startswith(("triton_red", "triton_per"))
    ]
    assert len(sums) == 3
    assert all("threshold_backward" in name for name in sums), sums


def test_nothing_is_summed_for_a_frozen_bias() -> None:
    model = pairs()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    found = of(model, "triton_convbn_always")
    names = [kernel.name for kernel in launches(found, "backward") if kernel.kind == "triton"]
    assert names
    assert all(name.startswith("triton_poi") and "threshold_backward" in name for name in names), names
    assert found.figures()["folds_backward"] == 2


def test_keeping_the_folded_weights_shows() -> None:
    ours, kept = of_pairs("triton_convbn").figures(), of_pairs("triton_convbn_keep").figures()
    assert kept["folds_backward"] == 1
    assert kept["saved_for_backward"] - ours["saved_for_backward"] == WEIGHTS


def test_inference_has_no_backward() -> None:
    figures = of_pairs("triton_convbn_always", train=False).figures()
    assert (figures["folds_forward"], figures["convolutions"]) == (1, 3)
    plain, ours = of_pairs("inductor", train=False).figures(), of_pairs("triton_convbn", train=False).figures()
    assert ours == plain, "what does not pay is left alone"
    assert figures["launches_backward"] == figures["bytes_backward"] == figures["saved_for_backward"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_in_the_fold(dtype: torch.dtype) -> None:
    found = of_pairs("triton_convbn", autocast=dtype)
    smallest = 3 * 64 * 9 * (4 + 2)  # a weight, read and cast; what else is cast in fp16 are vectors, see prescale
    kernels = [kernel for kernel in found.launches if kernel.bytes >= smallest]
    copies = [kernel.name for kernel in kernels if "to_copy" in kernel.name]
    assert len(copies) == 1, copies  # of the input


def test_bf16_moves_what_fp16_moves() -> None:
    """Convolutions return the same layouts: no copy between them."""
    half, brain = (of_pairs("inductor", autocast=dtype) for dtype in (torch.float16, torch.bfloat16))
    metrics = "launches_forward", "launches_backward", "convolutions"
    assert [half.figures()[name] for name in metrics] == [brain.figures()[name] for name in metrics]


def resnet50(provider: str) -> dict[str, int]:
    """Return the figures of a training step at batch 8 in fp32."""
    pytest.importorskip("torchvision")
    from triton_convbn.models import load

    return plan(load("resnet50"), torch.randn(8, 3, 224, 224), provider, train=True).figures()


def test_resnet50() -> None:
    """Inductor has 69 + 202 launches, moves 5.35 GB and keeps 693 MB. In forward, ours moves what Inductor does: a fold
    is left only where it is the copy of a weight to channels_last as well."""
    figures = resnet50("triton_convbn")
    assert (figures["folds_forward"], figures["folds_backward"], figures["convolutions"]) == (4, 8, 106)
    # Max pooling keeps 20 MB more in torch 2.11, under plain Inductor as well: 719 MB.
    assert figures["saved_for_backward"] <= (300e6 if TORCH > (2, 11) else 320e6)
    assert figures["launches_forward"] + figures["launches_backward"] <= 120
    assert figures["bytes_forward"] + figures["bytes_backward"] <= 4.6e9


# -- what it leaves behind --------------------------------------------------------------------------------------------


def state() -> dict[str, Any]:
    from torch._dynamo import device_interface
    from torch._inductor import decomposition
    from triton.runtime.driver import driver

    interface = device_interface.CudaInterface
    return {
        "cuda": {name: vars(torch.cuda)[name] for name in vars(torch.cuda) if not name.startswith("__")},
        "interface": {name: vars(interface)[name] for name in vars(interface)},
        "available": torch.cuda.is_available(),
        "triton": has_triton(),
        "driver": driver._active,
        "properties": dict(device_interface.caching_worker_device_properties),
        "is_gpu": decomposition.is_gpu,
        "passes": (inductor_config.pre_grad_custom_pass, inductor_config.post_grad_custom_post_pass),
        "grad": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        "kernel": kernel_runs(torch.device("cpu")),
    }


def test_everything_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pairs()
    before = state()
    of(model, "triton_convbn")
    assert state() == before

    def fail(*_arguments: Any) -> None:
        assert has_triton()
        raise ZeroDivisionError

    monkeypatch.setattr(code, "_launch", fail)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        of(model, "triton_convbn")
    assert state() == before
    # And the same model still compiles for the CPU, folded by plain torch.
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.compile(model, backend="triton_convbn")(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_model_is_left_alone() -> None:
    model = pairs()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    of(model, "triton_convbn")
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])
        assert type(tensor) in (torch.Tensor, nn.Parameter)


def test_planned_for_nests() -> None:
    cpu = torch.device("cpu")
    here = kernel_runs(cpu)
    with planned_for("cuda"):
        assert kernel_runs(cpu)
        with planned_for("mps"):
            assert not kernel_runs(cpu)
        assert kernel_runs(cpu)
    assert kernel_runs(cpu) == here


def test_nothing_runs_on_a_planned_gpu() -> None:
    with h100.pretended_h100():
        from triton.runtime.driver import driver

        with pytest.raises(AttributeError, match="launcher_cls"):
            _ = driver.active.launcher_cls


# -- the command line -------------------------------------------------------------------------------------------------


def test_every_figure_says_planned(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "new" / "plan.csv"
    common = "--model", "planned_model:pairs", "--train", "--batch", "2", "--size", "32", "--csv", str(path)
    two = "--provider", "inductor", "--provider", "triton_convbn"
    assert cli(*common, *two, "--json", "--kernels") == 0
    found = json.loads(capsys.readouterr().out)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert found["status"] == "planned"
    assert found["device"] == DEVICE
    assert [row["metric"] for row in rows] == [row["metric"] for row in found["rows"]]
    assert {row["status"] for row in rows} == {"planned"}
    assert {row["case"] for row in rows} == {"planned_model:pairs@32"}, "not at its own size"
    assert {row["device"] for row in rows} == {DEVICE}
    assert {(row["p20"], row["p80"]) for row in rows} == {("", "")}
    assert {row["provider"] for row in rows} == {"inductor", "triton_convbn"} == set(found["kernels"])
    units = {row["metric"]: row["unit"] for row in rows}
    assert units["saved_for_backward"] == units["bytes_forward"] == units["bytes_backward"] == "bytes"
    assert units["launches_forward"] == units["convolutions"] == "launches"
    values = {(row["provider"], row["metric"]): float(row["p50"]) for row in rows}
    for name, kernels in found["kernels"].items():
        moved = values[name, "bytes_forward"] + values[name, "bytes_backward"]
        assert sum(kernel["bytes"] for kernel in kernels) == moved
    assert cli(*common, "--provider", "triton_convbn_always", "--frozen-affine", "--kernels") == 0
    out = capsys.readouterr().out
    assert "Not measured: planned for NVIDIA H100" in out
    assert "fold_3_0" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "resnet5000"], "resnet5000"),
        (["--model", "planned_model:pairs", "--provider", "none"], ", ".join(repr(str(each)) for each in Provider)),
        (["--model", "planned_model:pairs", "--dtype", "float8"], "is not one of 'float32'"),
        (["--model", "planned_model:pairs", "--frozen-affine"], "needs --train"),
        (["--model", "planned_model:pairs", "--batch", "0"], "--batch"),
        (["--model", "planned_model:pairs", "--csv", "other.csv"], "other columns"),
        (["--model", "planned_model:linear"], "does not run on an input of shape (8, 3, 224, 224)"),
    ],
)
def test_bad_input_is_one_line(
    given: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.csv").write_text("a,b\n")
    assert cli(*given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [
        ("triton.backends", "backends", {}, "NVIDIA"),
        ("torch.version", "hip", "7.0", "ROCm"),
    ],
)
def test_unsuitable_versions_are_one_line(
    owner: str, name: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton.backends  # noqa: F401

    monkeypatch.setattr(sys.modules[owner], name, value)
    with pytest.raises(UsageError, match=said):
        h100.check()
