"""The table that a run ends with."""

import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console
from triton_convbn.perf import show
from triton_convbn.perf.providers import PROVIDERS
from triton_convbn.perf.report import Report
from triton_convbn.perf.table import Key

SETTING = Key("small", "", "train", "float32", "contiguous", 8)


def shown(report: Report, console: Console | None = None, **options: Any) -> str:
    out = io.StringIO()
    show.show(report, [SETTING], console or Console(file=out, **options))
    return out.getvalue()


def full_report() -> Report:
    """With every column and every provider."""
    report = Report(None, "Some Processor(R) with a Long Name CPU @ 2.90GHz")
    for index, name in enumerate(PROVIDERS):
        key = SETTING._replace(provider=name)
        for column in show.COLUMNS:
            report.measured(key, column.metric, "", 123.456e6 if column.scale == 1e-6 else 1234.5 + index)
        for end in ("", "_low", "_high"):
            report.measured(key, f"time_over_inductor{end}", "1", 1.0 + index / 1000)
        report.measured(key, "time_rounds", "1", 10)
    return report


def test_table_in_a_pipe_is_wide_enough(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rich takes a pipe for a terminal of 80 columns, into which this does not fit."""
    monkeypatch.delenv("COLUMNS", raising=False)
    show.show(full_report(), [SETTING])
    lines = capsys.readouterr().out.splitlines()
    assert 80 < max(map(len, lines)) <= 140
    for index, name in enumerate(PROVIDERS):
        (line,) = (line for line in lines if re.match(rf"[│ ]+{name} ", line))
        assert line.count("123.5") == 2
        assert f"{1234.5 + index:.1f}" in line
        assert ("1.003 to 1.003" in lines[lines.index(line) + 1]) == (index == 3) or name == "inductor"
    assert "…" not in "".join(lines)


def test_table() -> None:
    report = Report(None, "a CPU")
    for name, ratio in (("inductor", None), ("triton_convbn", 0.5)):
        key = SETTING._replace(provider=name)
        report.measured(key, "pairs_folded", "pairs", 2)
        report.measured(key, "saved_for_backward", "bytes", 1.25e6)
        report.measured(key, "time", "ms", (12.34, 12.0, 13.0))
        report.measured(key, "time_rounds", "1", 7)
        if ratio:
            report.measured(key, "time_over_inductor", "1", ratio)
    report.checked(SETTING._replace(provider="triton_convbn"), "output_error", "1", 0.5, 0.1, "output")
    report.skipped(SETTING._replace(provider="frozen_bn"), "run", "", "no [torchvision] here")
    with report.keeping(SETTING._replace(provider="broken"), "run"):
        raise RuntimeError("[red]no luck")
    report.measured(SETTING._replace(case="another", provider="eager"), "time_rounds", "1", 99)
    text = shown(report, width=200)
    cells = {line.split()[1]: re.split(r" *│ *", line)[2:-1] for line in text.splitlines() if line.startswith("│")}
    assert cells["inductor"] == ["2", "", "1.2", "12.3", "1"]
    assert cells["triton_convbn"] == ["2", "5.0e-01 !", "1.2", "12.3", "0.500"]
    assert cells["broken"] == [""] * 5
    assert "frozen_bn" not in cells
    assert "compile" not in text
    assert "skipped: frozen_bn run: no [torchvision] here" in text
    assert "failed: broken run: RuntimeError: [red]no luck" in text
    assert "failed: triton_convbn output_error: output: 0.5 1, 0.1 allowed" in text
    assert "medians of 7 rounds" in text
    assert "measured on a CPU, torch" in text


def test_table_of_nothing() -> None:
    """As where a run was interrupted before it came to this, and where no provider can run it."""
    report = Report(None, "a CPU")
    text = shown(report, width=200)
    assert text.startswith("Errors: ")
    assert "medians of no rounds" in text
    report.skipped(SETTING._replace(provider="frozen_bn"), "run", "", "no reason")
    assert shown(report, width=200).splitlines()[:3] == [
        "small, train, float32, contiguous, batch 8",
        f"measured on a CPU, torch {torch.__version__}",
        "skipped: frozen_bn run: no reason",
    ]
