"""Test the tables that a run prints, which are those of `plot --markdown`."""

import pytest
from benchmark_rows import failed, frame, ratio, row
from rich import console as rich_console
from triton_convbn.perf.frame import to_frame
from triton_convbn.perf.results import Key, Report
from triton_convbn.perf.tables import show, tables

ROWS = [row("time", 12.34, provider="inductor"), row("time", 6.2), *ratio(0.5, 0.49, 0.51), failed("run", provider="x")]


def test_pipe_gets_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    show(to_frame(ROWS))
    assert capsys.readouterr().out == tables(frame(*ROWS))


def test_terminal_gets_a_drawn_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rich_console.Console, "is_terminal", True)
    monkeypatch.setenv("COLUMNS", "140")
    show(to_frame(ROWS))
    text = capsys.readouterr().out
    assert "0.500 (0.490 to 0.510)" in text
    assert "RuntimeError: boom" in text
    assert "| --: |" not in text


def test_error_above_its_limit_is_a_footnote() -> None:
    report = Report(None, "a CPU")
    report.checked(Key("small"), "output_error", "1", 0.5, 0.1, "output")
    report.skipped(Key("small", "frozen_bn"), "run", "", "no [torchvision] here")
    text = tables(to_frame(report.rows))
    assert "| triton_convbn | failed (" in text
    assert "output: 0.5 1, 0.1 allowed" in text
    assert r"no \[torchvision\] here" in text
