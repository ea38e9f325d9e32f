"""Test the numerics benchmark: its errors, its messages for bad input, and that it resumes."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from triton_convbn.perf import numerics
from triton_convbn.perf.frame import read
from triton_convbn.perf.providers import Compiled
from triton_convbn.perf.results import Key, Report, Row, read_rows

from triton_convbn.cli import main
from triton_convbn.errors import UsageError


def run(csv: Path, **options: list[str]) -> list[Row]:
    numerics.command(csv_=csv, seeds=2, **options)
    return read_rows(csv)


def test_errors_of_one_case(tmp_path, monkeypatch):
    """Expect rounding errors only, a ratio of 1 for eager, and nothing measured twice."""
    asked = {"case_": ["ordinary_pair"], "dtype": ["bfloat16"], "provider": ["eager", "folded_graph"]}
    rows = run(tmp_path / "n.csv", **asked)
    assert Counter(row.provider for row in rows) == {"eager": 4, "folded_graph": 4}
    value = {(row.provider, row.metric): row for row in rows}
    eps = torch.finfo(torch.bfloat16).eps
    for row in rows:
        assert row.p20 <= row.p50 <= row.p80
        if row.metric.endswith("_rms"):
            assert 1e-2 * eps < row.p50 < 2 * eps, row
    assert value["eager", "output_over_eager"].p50 == 1
    ratio = value["folded_graph", "output_rms"].p50 / value["eager", "output_rms"].p50
    assert value["folded_graph", "output_over_eager"].p50 == pytest.approx(ratio)
    monkeypatch.setattr(numerics, "measure", lambda *_: pytest.fail("it is there already"))
    assert run(tmp_path / "n.csv", **asked) == rows


def test_inference_has_no_gradients(tmp_path):
    asked = {"case_": ["ordinary_pair"], "dtype": ["float32"], "provider": ["eager", "folded_graph"]}
    numerics.command(csv_=tmp_path / "n.csv", seeds=2, mode="infer", **asked)
    rows = read_rows(tmp_path / "n.csv")
    assert {(row.mode, row.metric) for row in rows} == {("infer", "output_rms"), ("infer", "output_over_eager")}
    value = {(row.provider, row.metric): row.p50 for row in rows}
    assert value["eager", "output_over_eager"] == 1
    assert 0 < value["folded_graph", "output_rms"] < 1e-6


def test_rows_are_printed_without_a_file(capsys):
    command = ["dev", "numerics", "--case", "ordinary_pair", "--dtype", "bfloat16", "--provider", "eager"]
    with pytest.raises(SystemExit) as exited:
        main([*command, "--seeds", "2"])
    assert exited.value.code == 0
    assert (
        "| provider | output rms | output over eager | gradients rms | gradients over eager |"
        in capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        main([*command, "--seeds", "2", "--json"])
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 4


def test_interruption_prints_the_rows(monkeypatch, capsys):
    def interrupted(_build, _x, keys, _seeds, report):
        report.measured(keys["eager"], "output_rms", "1", 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(numerics, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        numerics.command(seeds=2, case_=["ordinary_pair"], dtype=["bfloat16"], provider=["eager"])
    assert "| eager | 0.500 |" in capsys.readouterr().out


def test_provider_that_raises_becomes_a_failed_row(tmp_path, monkeypatch):
    def refuses(_gm, _inputs):
        raise ValueError("cannot\ncompile")

    monkeypatch.setitem(numerics.COMPARED, "folded_graph", Compiled("folded_graph", refuses))
    asked = {"case_": ["ordinary_pair"], "dtype": ["float32"], "provider": ["folded_graph"]}
    (row,) = run(tmp_path / "n.csv", **asked)
    assert row.status == "failed"
    assert "cannot compile" in row.error
    assert math.isnan(row.p50)


class Scaled(nn.Module):
    """A parameter times the input. In the second seed, fp16 overflows."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(6e4 if seed == 1 else 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def test_infinite_errors_are_not_averaged() -> None:
    report = Report(None, "a CPU")
    keys = {"eager": Key("case", "eager", dtype="float16")}
    numerics.measure(Scaled, torch.linspace(1.1, 1.7, 6).reshape(2, 3), keys, range(2), report)
    found = {row.metric: row for row in report.rows}
    assert (found["output_rms"].status, found["output_rms"].error) == ("failed", "not finite")
    assert math.isnan(found["output_rms"].p50)
    assert found["gradients_rms"].status == "ok"


@pytest.mark.parametrize("what", ["provider", "dtype", "case"])
def test_unknown_names_are_usage_errors(what, tmp_path):
    with pytest.raises(UsageError, match=f"no such {what}: nothing; choose from "):
        run(tmp_path / "n.csv", **{"case_" if what == "case" else what: ["nothing"]})


def test_foreign_csv_is_a_usage_error(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match=r"other\.csv"):
        run(tmp_path / "other.csv")


NETWORKS = "mobileone_s0", "fastvit_t8", "repvgg_a0"
AIMS = {"float32": 1.1, "bfloat16": 1.2, "float16": 1.2, "autocast_bfloat16": 1.0, "autocast_float16": 1.0}


def test_committed_table():
    """Check that every provider, dtype and case is there, and that the fold is as exact as documented."""
    frame = read([Path(__file__).parent.parent.parent / "perf" / "results" / "numerics.csv"])
    cases = {"resnet50", *numerics.HOSTILE}
    measured = Counter(zip(frame["case"], frame["provider"], frame["dtype"], strict=True))
    providers = numerics.COMPARED.keys() - {"triton_convbn_channels_last"}
    for case, provider, dtype in itertools.product(cases, providers, AIMS):
        assert measured[case, provider, dtype] == 4
    folded = frame[(frame["provider"] == "folded_graph") & (frame["metric"] == "output_over_eager")]
    # repvgg_a0 misses the aim on one of two CPUs, see docs/numerics.md.
    folded = folded[(folded["case"] != "repvgg_a0" + numerics.MASKED) | (folded["device"] != "AMD EPYC")]
    folded = folded[folded["case"] != "norm_before_linear_mean_3"]  # misses it, see there
    for case, dtype, ratio in zip(folded["case"], folded["dtype"], folded["p50"], strict=True):
        # fp16 subnormals are rounded to the last bit, with and without a fold.
        assert ratio <= AIMS[dtype] + 0.01 * (case == "subnormal_results"), (case, dtype)
    for name, providers in (
        ("resnet50", ["folded_graph"]),
        ("mobileone_s0", ["folded_graph", "triton_convbn"]),
        ("fastvit_t8", ["folded_graph", "triton_convbn"]),
    ):
        masked = frame[(frame["case"] == name + numerics.MASKED) & (frame["metric"] == "gradients_over_eager")]
        assert (masked.set_index("provider")["p50"][providers] <= AIMS["float32"]).all(), name
    repvgg = frame[(frame["case"] == "repvgg_a0" + numerics.MASKED) & (frame["device"] == "AMD EPYC (AVX512)")]
    gradients = repvgg[repvgg["metric"] == "gradients_over_eager"].set_index("provider")["p50"]
    assert (gradients[["folded_graph", "triton_convbn"]] <= AIMS["float32"]).all()
    outputs = frame[(frame["mode"] == "infer") & (frame["metric"] == "output_over_eager")].set_index("case")
    outputs = outputs[outputs["provider"] == "triton_convbn"]["p50"]
    assert {name + numerics.MASKED for name in NETWORKS} == set(outputs.index)
    assert (outputs <= AIMS["float32"]).all()
