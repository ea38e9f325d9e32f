"""Test that README's picture of the memory kept for backward is made from the committed CSVs."""

import re
from pathlib import Path

import pandas as pd
import pytest
from triton_convbn.perf.plot import RESULTS

from triton_convbn.cli import main

ROOT = Path(__file__).parent.parent.parent


def labels(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def test_committed_picture_matches_the_csvs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare words and figures: fonts, and with them positions, differ between machines."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in files:
        with pytest.raises(SystemExit) as exited:
            main(["plot", "--memory", str(path)])
        assert exited.value.code == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    committed = labels((ROOT / "docs" / "memory.svg").read_text())
    assert committed == labels(files[0].read_text())
    rows = pd.read_csv(RESULTS / "gpu_h200.csv")
    rows = rows[(rows["case"] == "resnet50") & (rows["dtype"] == "autocast_bfloat16") & (rows["batch"] == 32)]
    rows = rows[(rows["metric"] == "saved_for_backward") & (rows["mode"] == "train")]
    assert {f"{value / 1e6:,.0f}" for value in rows["p50"]} <= set(committed)
