"""Test the table of applications: a tiny model, lost processes, resumption, and the committed rows."""

import json
from pathlib import Path

import pytest
import torch
from triton_convbn.perf import applications
from triton_convbn.perf.frame import read

from triton_convbn.errors import UsageError

TABLE = Path(__file__).parents[2] / "perf" / "results" / "applications.csv"

TINY = """
import os, torch
from torch import nn

def model():
    pairs = [(nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for inputs in (3, 4)]
    return nn.Sequential(*pairs[0], *pairs[1], nn.Flatten(), nn.BatchNorm1d(256)), (torch.randn(2, 3, 8, 8),)

def crash():
    os._exit(3)
"""


@pytest.fixture
def csv(tmp_path, monkeypatch):
    (tmp_path / "tiny_application.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "applications.csv"


def run(csv, *models, limit=600, in_process=True):
    applications.command(csv, list(models), limit, in_process, True)


@pytest.mark.slow
def test_tiny_model(csv, capsys):
    """Two BatchNorms fold, one reads no convolution. The fold keeps fewer bytes for backward."""
    run(csv, "tiny_application:model")
    found = json.loads(capsys.readouterr().out)["rows"]
    fp64 = {row["metric"]: row["p50"] for row in found if row["dtype"] == "float64"}
    rows = {(row["provider"], row["metric"]): row for row in found if row["dtype"] == "float32"}
    value = {key: row["p50"] for key, row in rows.items()}
    assert {row["status"] for row in rows.values()} == {"ok"}
    ours = {metric: value["triton_convbn", metric] for who, metric in rows if who == "triton_convbn"}
    assert (ours["batch_norms"], ours["planned"], ours["folded"], ours["declined_input_not_conv"]) == (3, 2, 2, 1)
    assert value["inductor", "folded"] == value["eager", "folded"] == 0
    assert value["inductor_efficient_conv_bn", "folded"] == 2
    assert ours["saved_for_backward"] < value["inductor", "saved_for_backward"] < value["eager", "saved_for_backward"]
    assert ours["saved_over_inductor"] == ours["saved_for_backward"] / value["inductor", "saved_for_backward"]
    assert ours["output_error"] < 1e-5
    assert ours["gradient_error"] < 1e-5
    assert 0 < fp64["gradient_error"] < 1e-12
    assert 0 < fp64["output_error"] < 1e-12


@pytest.mark.slow
def test_lost_processes_are_rows_and_are_not_tried_again(csv, capsys, monkeypatch):
    run(csv, "tiny_application:crash", in_process=False)
    run(csv, "tiny_application:model", limit=1, in_process=False)
    monkeypatch.setattr(applications, "_run", None)
    run(csv, "tiny_application:crash", "tiny_application:model", in_process=False)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["provider"], row["metric"], row["status"]) for row in rows] == 2 * [("all", "run", "failed")]
    assert [row["error"] for row in rows] == ["exit code 3", "not done after 1 seconds"]


@pytest.mark.slow
def test_measured_models_are_not_measured_again(csv, monkeypatch):
    run(csv, "tiny_application:model")
    text = csv.read_text()
    monkeypatch.setattr(applications, "measure", None)
    run(csv, "tiny_application:model")
    assert csv.read_text() == text


def test_errors():
    exact = {"": torch.tensor([1.0, -4.0]), "w": torch.tensor([3.0, 4.0])}
    other = {"": torch.tensor([1.0, -3.0]), "w": torch.tensor([3.0, 4.5])}
    assert applications.errors(other, exact) == {"output_error": 0.25, "gradient_error": pytest.approx(0.1)}
    with pytest.raises(RuntimeError, match="not the same gradients"):
        applications.errors({"": exact[""]}, exact)


def test_unknown_model(csv):
    with pytest.raises(UsageError, match="no_such_module"):
        run(csv, "no_such_module:model")


def test_models_of_missing_packages_are_left_out(csv, capsys, monkeypatch):
    monkeypatch.setitem(applications.APPLICATIONS, "missing.model", {"call": "no_such_package.nn:Model", "shapes": []})
    run(csv, "missing.model", in_process=False)
    assert "no_such_package is not installed" in capsys.readouterr().err
    assert len(csv.read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def table():
    frame = read([TABLE], ["status=ok", "dtype=float32"])
    return frame.pivot_table("p50", ["case", "provider"], "metric")


def test_committed_table_has_models_of_many_packages(table):
    models = table.index.unique("case")
    assert len(models) >= 20
    assert set(models) <= set(applications.APPLICATIONS)
    assert len({name.partition(".")[0] for name in models}) >= 9


def test_no_application_keeps_more_than_plain_inductor(table):
    kept = table["saved_for_backward"].unstack()
    assert (kept["triton_convbn"] <= kept["inductor"]).all()
    assert (kept["triton_convbn"] <= kept["inductor_efficient_conv_bn"]).all()


def test_committed_models_are_exact_in_fp64(table):
    """A wrong term would show as 1e-3. The largest is 9e-12, of a gradient of RT-DETR that nearly cancels."""
    errors = read([TABLE], ["dtype=float64"])
    assert set(errors["case"]) == set(table.index.unique("case"))
    assert (errors["p50"] < 1e-10).all()


def test_every_planned_batch_norm_of_the_committed_table_folds(table):
    """Blocks that share a compiled graph, as in BasicUNet, are counted once."""
    ours = table.xs("triton_convbn", level="provider")
    alone = ours.drop("monai.basic_unet")
    assert (alone["folded"] == alone["planned"]).all()
    declined = ours.filter(like="declined_").sum(axis=1)
    assert (ours["batch_norms"] == ours["planned"] + declined).all()
