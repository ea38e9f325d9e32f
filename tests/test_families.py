"""The table of families: its counts are those of `explain`, its errors those of rounding."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_convbn.perf import families
from triton_convbn.perf.frame import read

from triton_convbn.errors import UsageError

pytest.importorskip("torchvision")
pytest.importorskip("timm")

# As small as the model lets it be. mixnet_s: BatchNorms after concatenations; levit_128: after flattened Linears, and
# two after a mean; repvgg_a0: of which some follow nothing but the input.
MODELS = [
    ("mixnet_s", 32, 49, {}),
    ("levit_128", 224, 62, {"declined_input_not_conv": 2}),
    ("convnext_atto", 32, 0, {}),
    ("fasterrcnn_resnet50_fpn.backbone", 32, 53, {}),
    ("retinanet_resnet50_fpn.backbone", 32, 53, {}),
    ("deeplabv3_resnet50", 32, 60, {}),
]


@pytest.mark.parametrize(("name", "size", "folded", "declined"), MODELS, ids=[name for name, *_ in MODELS])
def test_folds_and_is_exact(name, size, folded, declined):
    rows = families.measure(name, size, ("cpu", torch.__version__, "", ""))
    value = {(row.provider, row.dtype, row.metric): row.p50 for row in rows}
    ours = {metric: p50 for (who, dtype, metric), p50 in value.items() if (who, dtype) == ("triton_convbn", "float32")}
    assert ours["pairs_folded"] == folded
    assert {metric: count for metric, count in ours.items() if metric.startswith("declined_")} == declined
    assert ours["batch_norms"] == folded + sum(declined.values())
    assert ours["output_error"] <= 3 * value["eager", "float32", "output_error"] + 2 * torch.finfo(torch.float32).eps
    # In fp32 a ReLU near its kink may go either way, whoever decides; in fp64 none lies that near.
    assert ours["gradient_error"] < 5e-2
    assert value["triton_convbn", "float64", "output_error"] < 1e-12
    assert value["triton_convbn", "float64", "gradient_error"] < 1e-11


def test_errors_are_found():
    exact = families.Result([torch.tensor([1.0, -4.0])], {"w": torch.tensor([3.0, 4.0])})
    other = families.Result([torch.tensor([1.0, -3.0])], {"w": torch.tensor([3.0, 4.5])})
    assert families.output_error(other, exact) == 0.25
    assert families.gradient_error(other, exact) == pytest.approx(0.1)
    with pytest.raises(RuntimeError, match="not the same gradients"):
        families.gradient_error(families.Result([], {}), exact)


def test_unknown_model():
    with pytest.raises(UsageError, match="no model 'resnet51'"):
        families.main(["resnet51"], None, False)


def test_command_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    path = tmp_path / "families.csv"
    families.main(["convnext_atto"], path, True)
    first = json.loads(capsys.readouterr().out)["rows"]
    monkeypatch.setattr(families, "measure", lambda *_: pytest.fail("measured again"))
    families.main(["convnext_atto"], path, False)
    assert "convnext_atto" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) == 1 + len(first)


def test_bad_file_is_one_line(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    command = [sys.executable, "-m", "triton_convbn.perf.families", "--model", "resnet18", "--csv", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("families: ")
    assert len(done.stderr.splitlines()) == 1


def test_committed_table():
    """Of every family, exact, and with no reason that says that the pass could not read something."""
    frame = read([Path(__file__).parent.parent / "perf" / "results" / "families.csv"])
    assert set(frame["case"]) == set(families.SIZES)
    assert set(frame["status"]) == {"ok"}
    assert (frame[(frame["dtype"] == "float64")]["p50"] < 1e-11).all()
    reasons = {metric.removeprefix("declined_") for metric in frame["metric"] if metric.startswith("declined_")}
    assert reasons <= {"input_not_conv", "concatenation", "conv_shared"}
