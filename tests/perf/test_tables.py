"""Test that the tables of README and docs are made from the committed CSVs."""

from pathlib import Path

import pytest
import typer
from benchmark_rows import failed, frame, row, write
from triton_convbn.perf.tables import BLOCK, fill_documents, tables

from triton_convbn.errors import UsageError

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_committed_tables_match_the_csvs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert sum(len(BLOCK.findall(path.read_text())) for path in DOCUMENTS) >= 7
    fill_documents(DOCUMENTS, check=True)


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.csv", [row("time", 12.0, case="one"), row("time", 34.0, case="two")])
    path = tmp_path / "a.md"
    path.write_text("before\n<!-- table a.csv case=two metric=time -->\nold 99\n<!-- end -->\nafter\n")
    return path


def test_table_is_replaced(document: Path) -> None:
    with pytest.raises(typer.Exit) as exited:
        fill_documents([document], check=True)
    assert exited.value.exit_code == 1
    assert "old 99" in document.read_text()
    fill_documents([document])
    text = document.read_text()
    assert text.startswith("before\n<!-- table a.csv case=two metric=time -->\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "34" in text
    assert "12" not in text
    assert "old" not in text
    fill_documents([document], check=True)


def test_times_of_several_commits_are_dashes() -> None:
    """The machine may have been slower at one of them. Ratios and bytes stay, and so do failures."""
    rows = [
        row("time", 83.0, provider="eager"),
        row("time_over_inductor", 0.75, provider="eager"),
        row("saved_for_backward", 5e6, provider="eager"),
        failed("time", provider="frozen_bn"),
        row("time", 122.0, provider="inductor", commit="another"),
    ]
    mixed = tables(frame(*rows))
    assert "| eager | - | 0.750 | 5 |" in mixed
    assert "| inductor | - |  |  |" in mixed
    assert "| frozen_bn | failed (1) |" in mixed
    assert "commit c0ffee0 and another" in mixed
    assert "only the ratios compare" in mixed
    one = tables(frame(*rows[:-1], row("time", 122.0, provider="inductor")))
    assert "| eager | 83 | 0.750 | 5 |" in one
    assert "dash" not in one


def test_a_table_names_the_commits_of_its_columns_alone() -> None:
    rows = row("time", 83.0), row("compile_time", 9.0, commit="another")
    assert "commit c0ffee0. " in tables(frame(*rows), ["time"])


@pytest.mark.parametrize(
    ("block", "message"), [("a.csv colour=red", "colour"), ("a.csv case=three", "case=three"), ("b.csv", "b.csv")]
)
def test_bad_blocks_are_one_line(document: Path, block: str, message: str) -> None:
    document.write_text(f"<!-- table {block} -->\n<!-- end -->\n")
    with pytest.raises(UsageError, match=message):
        fill_documents([document])
