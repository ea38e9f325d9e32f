"""Test the output of the benchmark: Markdown tables, plots, and the command that makes them."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_rows import failed, frame, planned, ratio, row, write
from triton_convbn.perf.frame import number
from triton_convbn.perf.results import Row
from triton_convbn.perf.tables import tables

from triton_convbn.cli import main
from triton_convbn.errors import UsageError

ROWS = [
    row("time", 120.4, 119, 123, provider="inductor"),
    row("time_rounds", 15, provider="inductor"),
    row("saved_for_backward", 693.1e6, provider="inductor"),
    row("output_error", 3.2e-7, provider="inductor"),
    failed("time", "OutOfMemoryError: 2 GiB | of `x` [1]\nand more", provider="eager", unit=""),
    failed("saved_for_backward", "no autograd here", provider="eager", status="skipped"),
    failed("run", "did not compile", provider="inductor_freezing"),
    row("time", 98.76, 98, 99),
    row("time_min", 97),
    row("time_rounds", 15),
    *ratio(0.8203, 0.8101, 0.8304),
    row("saved_for_backward", 299.2e6),
    row("output_error", 2.9e-7),
    row("pairs_folded", 53),
    planned("saved_for_backward", 299.2e6),
    planned("launches_forward", 1161),
]
GOLDEN = r"""### resnet50, train, float32, contiguous, batch 8

Measured on a CPU, torch 2.14.1, triton 3.8.0, commit c0ffee0. Times are medians of 15 rounds. In brackets: the 95 % confidence interval of a ratio's median. Errors: against fp64, relative to the largest value.

| provider | time (ms) | time / inductor | kept for backward (MB) | output error | pairs folded |
| :-- | --: | --: | --: | --: | --: |
| eager | failed (1) |  | skipped (2) |  |  |
| inductor | 120 |  | 693 | 3.2e-07 |  |
| inductor_freezing | failed (3) | failed (3) | failed (3) | failed (3) | failed (3) |
| triton_convbn | 98.8 | 0.820 (0.810 to 0.830) | 299 | 2.9e-07 | 53 |

(1) OutOfMemoryError: 2 GiB \| of \`x\` \[1\] and more  
(2) no autograd here  
(3) did not compile

### resnet50, train, float32, contiguous, batch 8

Not measured: planned for NVIDIA H100, torch 2.14.1, triton 3.8.0, commit c0ffee0.

| provider | kept for backward (MB) | launches, forward |
| :-- | --: | --: |
| triton_convbn | 299 | 1,161 |
"""  # noqa: E501, W291 - Markdown's own line breaks


def test_golden() -> None:
    assert tables(frame(*ROWS)) == GOLDEN


def test_tables_by_layer_layout_and_batch() -> None:
    layers = [row("time", 1, case=f"resnet50/layer{n}", layout=layout) for n in (2, 1) for layout in ("b", "a")]
    whole = [row("time", n, batch=n) for n in (8, 1)]
    text = tables(frame(*layers, *whole))
    assert "### layers of resnet50, train, float32, batch 8\n" in text
    assert "### resnet50, train, float32, contiguous\n" in text
    cells = [line.split(" | ")[:2] for line in text.splitlines() if "triton_convbn" in line]
    assert cells == [
        ["| resnet50/layer2", "a"],
        ["| resnet50/layer2", "b"],
        ["| resnet50/layer1", "a"],
        ["| resnet50/layer1", "b"],
        ["| 1", "triton_convbn"],
        ["| 8", "triton_convbn"],
    ]


def test_tables_of_some_metrics() -> None:
    text = tables(frame(*ROWS), ["time_min", "time"])
    assert "| provider | shortest time (ms) | time (ms) |" in text
    assert "planned" not in text
    with pytest.raises(UsageError, match="no such metric: tyme; choose from launches_forward, "):
        tables(frame(*ROWS), ["tyme"])


def test_each_kind_and_environment_has_its_table() -> None:
    rows = [row("time", 1), row("time", 2, torch="2.15.0"), row("time", 3, device="another")]
    rows += [row("time", 4, status=status) for status in ("planned", "interpreted", "compiled")]
    texts = tables(frame(*rows)).split("###")[1:]
    assert [text.splitlines()[2].split(",")[0] for text in texts] == [
        "Measured on a CPU",
        "Measured on a CPU",
        "Measured on another",
        *(f"Not measured: {what} a CPU" for what in ("planned for", "interpreted on", "compiled for")),
    ]
    assert all(text.count("| triton_convbn |") == 1 for text in texts)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (53, "53"), (1234567, "1,234,567"), (1234.5, "1,234"), (12.345, "12.3"), (-0.12345, "-0.123")],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code


@pytest.fixture
def csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file with whole models, layers, a plan and failures, in the current directory."""
    monkeypatch.chdir(tmp_path)
    rows: list[Row] = list(ROWS)
    for batch in (1, 8, 32):
        for value, provider in ((1.2, "eager"), (0.9, "triton_convbn"), (0.8, "of/others")):
            rows += ratio(value, value - 0.1, value + 0.1, batch=batch, provider=provider)
        rows += [planned("saved_for_backward", 1e7 * batch, batch=batch), row("peak_memory", 2e7 * batch, batch=batch)]
    rows += ratio(1.1, 1.0, 1.2, case="resnet50/layer1.0.conv1")
    rows.append(failed("time_over_inductor", case="resnet50/layer1.0.conv2"))
    write(tmp_path / "rows.csv", rows)
    return tmp_path / "rows.csv"


STEMS = {
    "resnet50-train-time_over_inductor",
    "resnet50-train-saved_for_backward",
    "resnet50-train-peak_memory",
    "resnet50-layers-train-float32-contiguous-batch8-time_over_inductor",
    "planned-resnet50-train-saved_for_backward",
}


@pytest.mark.slow
def test_plots(csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    first, second = csv.parent / "first", csv.parent / "deep" / "second"
    assert called("plot", csv, "--out", first, "--json") == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {Path(file).stem for file in files} == STEMS
    assert sorted(files) == sorted(str(path) for path in first.iterdir())
    assert called("plot", csv, "--out", second) == 0
    assert capsys.readouterr().out.splitlines() == [file.replace(str(first), str(second)) for file in files]
    for path in first.iterdir():
        content = path.read_bytes()
        assert content == (second / path.name).read_bytes()
        assert len(content) > 5000
        assert content.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    assert called("plot", csv, "--out", first, "--format", "svg") == 0  # replaces the files
    assert {path.suffix for path in first.iterdir()} == {".svg", ".png"}


def test_texts_of_plots(csv: Path) -> None:
    """Read them from the figure: in a PNG, letters are pixels."""
    pytest.importorskip("matplotlib")
    from triton_convbn.perf.frame import latest, read
    from triton_convbn.perf.plot import figures

    drawn = dict(figures(latest(read([csv]))))
    for name, figure in drawn.items():
        title, footer = figure.get_suptitle(), figure.get_supxlabel()
        assert title.endswith("NOT MEASURED)") == name.startswith("planned")
        start = "Not measured: planned for NVIDIA H100" if name.startswith("planned") else "Measured on a CPU"
        assert footer.startswith(f"{start}, torch 2.14.1,")
    figure = drawn["resnet50-train-time_over_inductor"]
    assert "Error bars: 95 % confidence interval of the median." in re.sub(r"\s+", " ", figure.get_supxlabel())
    shown = ["eager", "inductor_freezing", "triton_convbn", "of/others"]
    assert [text.get_text() for text in figure.legends[0].texts] == shown
    (axes,) = drawn["resnet50-train-saved_for_backward"].axes
    assert [text.get_text() for text in axes.texts] == [" eager: skipped", " inductor_freezing: failed"]
    (axes,) = drawn["resnet50-layers-train-float32-contiguous-batch8-time_over_inductor"].axes
    assert [text.get_text() for text in axes.texts] == [" triton_convbn: failed"]


def test_names_of_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from triton_convbn.perf.plot import plots

    rows = [row("peak_memory", 1e6, case=case) for case in ("../up", "a b", "a:b")]
    found = plots(frame(*rows[1:], row("peak_memory", 1, torch="2.15.0")), tmp_path, ["svg"])
    assert [path.name for path in found] == [
        "a-CPU-2.14.1-3.8.0-a-b-train-peak_memory.svg",
        "a-CPU-2.14.1-3.8.0-a-b-train-peak_memory-2.svg",
        "a-CPU-2.15.0-3.8.0-resnet50-train-peak_memory.svg",
    ]
    (outside,) = plots(frame(rows[0]), tmp_path, ["svg"], ["peak_memory"])
    assert outside.parent == tmp_path


def test_markdown(csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(csv, ROWS)
    assert called("plot", csv, "--markdown") == 0
    assert capsys.readouterr().out == GOLDEN
    assert called("plot", csv, "--markdown", "--metric", "time") == 0
    assert capsys.readouterr().out.count("\n| ") == 6
    assert list(csv.parent.iterdir()) == [csv]


REFUSED = {
    "no file": (["plot"], ["CSV"]),
    "file not there": (["plot", "none.csv"], ["none.csv", "No such file"]),
    "other columns": (["plot", "other.csv"], ["other.csv", "other columns"]),
    "one bad file of two": (["plot", "rows.csv", "other.csv"], ["other.csv"]),
    "unknown metric": (["plot", "rows.csv", "--metric", "speed"], ["metric: speed", "time_over_inductor"]),
    "unknown metric of a table": (["plot", "rows.csv", "--markdown", "--metric", "speed"], ["metric: speed"]),
    "unknown format": (["plot", "rows.csv", "--format", "pdf"], ["--format", "'pdf'"]),
    "tables and files": (["plot", "rows.csv", "--markdown", "--out", "x"], ["--markdown", "--out"]),
    "nothing to draw": (["plot", "rows.csv", "--metric", "run"], ["nothing to plot"]),
    "folder that is a file": (["plot", "rows.csv", "--out", "rows.csv"], ["rows.csv"]),
}


def assert_refused(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    streams = capsys.readouterr()
    assert streams.out == ""
    (line,) = streams.err.splitlines()
    assert line.startswith("triton-convbn: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments: list[str], words: list[str], csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    Path("other.csv").write_text("a,b\n1,2\n")
    before = csv.read_bytes()
    assert called(*arguments) == 2
    assert_refused(capsys, *words)
    assert csv.read_bytes() == before


def test_no_matplotlib(csv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "triton_convbn.perf.plot", raising=False)
    assert called("plot", csv) == 2
    assert_refused(capsys, "pip install '.[plot]'")
    assert called("plot", csv, "--markdown") == 0


def test_imports_no_more_than_it_needs(csv: Path) -> None:
    """A plot needs no window and no torch: it takes a second, on a machine without a display."""
    pytest.importorskip("matplotlib")
    code = (
        "import sys\nfrom triton_convbn.cli import app\n"
        "assert not {'pandas', 'matplotlib', 'torch'} & set(sys.modules)\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "plot", str(csv), "--format", "svg", "--metric", "peak_memory"]
    subprocess.run(command, check=True, cwd=csv.parent, capture_output=True)


def test_failed_row_has_no_number() -> None:
    (found,) = frame(failed("output_error", "too large", provider="eager")).to_dict("records")
    assert math.isnan(found["p50"])
    found = frame(row("output_error", 0.7, status="failed", error="too large")).iloc[0]
    assert math.isnan(found["p50"])
