"""Test reading and comparing the benchmark's CSV: which row counts, and which change is a regression."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import failed, frame, planned, ratio, row, write
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_convbn.perf.compare import compare, report
from triton_convbn.perf.frame import latest, read
from triton_convbn.perf.results import COLUMNS, Row

from triton_convbn.errors import UsageError


def verdicts(before: list[Row], after: list[Row], **options: Any) -> dict[str, str]:
    """Return the verdict of each metric, for rows that differ in nothing else."""
    found = compare(frame(*before), frame(*after), **options)
    assert found["metric"].is_unique
    return dict(zip(found["metric"], found["verdict"], strict=True))


# A row before, a row after, and the verdict.
JUDGED = {
    "slower": (row("time", 10, 9.9, 10.1), row("time", 12, 11.9, 12.1), "regression"),
    "faster": (row("time", 12, 11.9, 12.1), row("time", 10, 9.9, 10.1), "improvement"),
    "slower, but the spreads overlap": (row("time", 10, 9, 12), row("time", 12, 11.9, 15), "same"),
    "slower by less than the tolerance": (row("time", 10, 9.99, 10.01), row("time", 10.4, 10.39, 10.41), "same"),
    "slower, no spread known": (row("time", 10, math.nan, math.nan), row("time", 12, 11, 13), "regression"),
    "compiles longer": (row("compile_time", 20, 19, 21), row("compile_time", 30, 29, 31), "regression"),
    "keeps more": (row("saved_for_backward", 1000), row("saved_for_backward", 1010), "regression"),
    "keeps hardly more": (row("saved_for_backward", 1000), row("saved_for_backward", 1004), "same"),
    "peak is lower": (row("peak_memory", 1000), row("peak_memory", 900), "improvement"),
    "something out of nothing": (row("saved_for_backward", 0), row("saved_for_backward", 4), "regression"),
    "folds fewer": (row("pairs_folded", 53), row("pairs_folded", 52), "regression"),
    "folds more": (row("pairs_folded", 0), row("pairs_folded", 53), "improvement"),
    "error of twice the size": (row("output_error", 1e-6), row("output_error", 2e-6), "same"),
    "error of three times the size": (row("output_error", 1e-6), row("output_error", 3e-6), "regression"),
    "error of a tenth": (row("gradient_error", 1e-5), row("gradient_error", 1e-6), "improvement"),
    "error of fp64's rounding": (row("output_error", 0), row("output_error", 1e-15), "same"),
    "fails now": (row("time", 10), failed("time"), "regression"),
    "no finite number now": (row("output_error", 1e-6), row("output_error", math.inf), "regression"),
    "failed before": (failed("time"), row("time", 10), "improvement"),
    "failed and fails": (failed("time"), failed("time", "another error"), "same"),
    "skipped now": (row("peak_memory", 10), failed("peak_memory", status="skipped", unit=""), "missing"),
    "skipped before": (failed("peak_memory", status="skipped"), row("peak_memory", 10), "new"),
    "more planned launches": (planned("launches_forward", 100), planned("launches_forward", 101), "regression"),
}


@pytest.mark.parametrize(("before", "after", "verdict"), JUDGED.values(), ids=JUDGED)
def test_judged(before: Row, after: Row, verdict: str) -> None:
    assert verdicts([before], [after]) == {before.metric: verdict}


def test_shortest_time_and_rounds_are_not_judged() -> None:
    assert verdicts([row("time_min", 9), row("time_rounds", 15)], [row("time_min", 12), row("time_rounds", 5)]) == {}


def test_tolerance() -> None:
    before, after = [row("time", 10)], [row("time", 10.4)]
    assert verdicts(before, after, tolerance=0.03) == {"time": "regression"}
    for tolerance in (-0.1, math.nan, math.inf):
        with pytest.raises(UsageError, match="tolerance"):
            compare(frame(*before), frame(*after), tolerance)


def test_ratio_needs_disjoint_intervals_and_spreads() -> None:
    before = ratio(0.9, 0.88, 0.92)
    assert verdicts(before, ratio(1.0, 0.98, 1.02)) == {"time_over_inductor": "regression"}
    assert verdicts(before, ratio(1.0, 0.91, 1.02)) == {"time_over_inductor": "same"}
    assert verdicts(before, ratio(1.0, 0.98, 1.02, spread=0.11)) == {"time_over_inductor": "same"}
    assert verdicts(before[:1], ratio(1.0, 0.91, 1.02)[:1]) == {"time_over_inductor": "regression"}


def test_run_that_fails_as_a_whole() -> None:
    before = [row("time", 10), row("peak_memory", 10)]
    after = [failed("run", "out of memory")]
    assert verdicts(before, after) == {"time": "missing", "peak_memory": "missing", "run": "regression"}
    assert verdicts(after, before) == {"time": "new", "peak_memory": "new", "run": "improvement"}
    # Another provider that fails has lost nothing. Neither has one that was repeated and then ran.
    other = failed("run", provider="eager")
    assert verdicts(before, [*before, other]) == {"time": "same", "peak_memory": "same"}
    assert verdicts(before, [*after, *before]) == {"time": "same", "peak_memory": "same"}


def test_planned_is_never_compared_with_measured() -> None:
    before, after = frame(row("saved_for_backward", 100)), frame(planned("saved_for_backward", 200))
    assert dict(Counter(compare(before, after)["verdict"])) == {"missing": 1, "new": 1}
    # The status or the device alone is enough.
    after = frame(planned("saved_for_backward", 200, device="a CPU"))
    assert dict(Counter(compare(before, after)["verdict"])) == {"missing": 1, "new": 1}
    assert set(frame(planned("saved_for_backward", 200, status="ok"))["kind"]) == {"planned"}
    assert set(frame(planned("saved_for_backward", math.nan, status="failed"))["kind"]) == {"planned"}


def test_devices() -> None:
    """A device is compared with itself. If there is no common device, rows are compared across devices."""
    a, b = [row("time", 10, device="A")], [row("time", 20, device="B")]
    across = compare(frame(*a, planned("launches_forward", 3)), frame(*b, planned("launches_forward", 3)))
    assert list(across["verdict"]) == ["regression", "same"]
    both = compare(frame(*a, *b), frame(*b))
    assert dict(zip(both["device"], both["verdict"], strict=True)) == {"A": "missing", "B": "same"}


FIGURES = st.floats(0, 1e12) | st.just(math.nan)
ROWS = st.builds(
    row,
    st.sampled_from(["time", "time_over_inductor", "time_over_inductor_low", "time_over_inductor_high", "pairs_folded"])
    | st.sampled_from(["saved_for_backward", "output_error", "compile_time", "run"]),
    FIGURES,
    FIGURES,
    FIGURES,
    provider=st.sampled_from(["eager", "triton_convbn"]),
    batch=st.sampled_from([1, 8]),
    status=st.sampled_from(["ok", "failed", "skipped", "planned"]),
    device=st.sampled_from(["A", "B"]),
    commit=st.sampled_from(["1", "2"]),
)
FILES = st.lists(ROWS, min_size=1, max_size=12)


@pytest.mark.slow
@given(FILES)
@settings(max_examples=20, deadline=None)
def test_file_and_itself(rows: list[Row]) -> None:
    assert set(compare(frame(*rows), frame(*rows))["verdict"]) <= {"same"}


@pytest.mark.slow
@given(FILES, FILES)
@settings(max_examples=20, deadline=None)
def test_swapped_files(before: list[Row], after: list[Row]) -> None:
    """A regression in one direction is an improvement in the other."""
    there = Counter(compare(frame(*before), frame(*after))["verdict"])
    back = Counter(compare(frame(*after), frame(*before))["verdict"])
    turned = {"regression": "improvement", "improvement": "regression", "missing": "new", "new": "missing"}
    assert there == Counter({turned.get(verdict, verdict): n for verdict, n in back.items()})


def test_latest() -> None:
    """The last row of a key counts, with the interval of the same commit."""
    old, new = {"commit": "1"}, {"commit": "2"}
    rows = [*ratio(0.9, 0.8, 1.0, **old), row("time", 10, **old), row("time_over_inductor", 0.7, **new)]
    found = latest(frame(*rows)).set_index("metric")
    assert list(found.index) == ["time_over_inductor", "time"]
    assert (found["p50"]["time_over_inductor"], found["p50"]["time"]) == (0.7, 10)
    assert math.isnan(found["low"]["time_over_inductor"])
    found = latest(frame(*reversed(rows))).set_index("metric")
    assert tuple(found.loc["time_over_inductor", ["p50", "low", "high"]]) == (0.9, 0.8, 1.0)
    assert len(latest(frame(row("time", 1), row("time", 2, torch="2.15.0")))) == 2


def test_later_failure_invalidates_earlier_figures() -> None:
    rows = [row("time", 10, commit="1"), *ratio(0.9, 0.8, 1.0, commit="1"), failed("time", commit="2")]
    assert list(latest(frame(*rows))["status"]) == ["failed"]
    rows[-1] = failed("time", provider="eager", commit="2")
    assert list(latest(frame(*rows))["status"]) == ["ok", "ok", "failed"]


def written(path: Path, *rows: Row) -> Path:
    write(path, rows)
    return path


HEADER = ",".join(COLUMNS) + "\n"
LINE = ",".join(["resnet50", "eager", "train", "float32", "contiguous", "8", "time", "ms", "1", "1", "1", "ok"]) + ","
BAD_FILES = {
    "empty": ("", "other columns"),
    "header only": (HEADER, "no row"),
    "other columns": ("case,provider\r\n1,2\r\n", "other columns than case, provider"),
    "no text": (b"\x00\xff\xfe", "other columns"),
    "only a row that was cut short": (HEADER + "resnet50,ea", "no row"),
}


@pytest.mark.parametrize(("content", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=words) as found:
        read([path])
    assert "\n" not in str(found.value)
    assert str(path) in str(found.value)


BAD_LINES = {
    "cut short": ("resnet50,ea", "2 columns, not 17"),
    "two rows in one": ("resnet50,ea" + LINE + ",,,," + LINE, "columns, not 17"),
    "batch": (LINE.replace(",8,", ",8.5,") + ",,,,", "'8.5'"),
    "no batch": (LINE.replace(",8,", ",,") + ",,,,", "''"),
    "figure": (LINE.replace("ms,1", "ms,fast") + ",,,,", "'fast'"),
    "status": (LINE.replace("ok", "fine") + ",,,,", "unknown status 'fine'"),
}


@pytest.mark.parametrize(("line", "words"), BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_bad_line_is_left_out(
    tmp_path: Path, line: str, words: str, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes((HEADER + LINE + ",,,,\n" + line + end).encode())
    assert list(read([path])["p50"]) == [1]
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"triton-convbn: {path}: line 3 is left out: ")
    assert words in message


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(UsageError, match=str(path)):
            read([path])


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reported(before: Path, after: Path, json_: bool = False) -> tuple[int, str]:
        return report(before, after, 0.05, json_), capsys.readouterr().out

    before = written(tmp_path / "a.csv", row("time", 10), row("saved_for_backward", 3e8), row("compile_time", 20))
    after = written(tmp_path / "b.csv", row("time", 8), failed("saved_for_backward", "[/b] boom", torch="2.15.0"))
    code, text = reported(before, after)
    assert code == 1
    assert [line.split()[1] for line in text.splitlines() if " resnet50 " in line] == [
        "regression",
        "improvement",
        "missing",
    ]
    assert "300 MB" in text
    assert "failed: [/b] boom" in text
    assert "Compared across environments: torch 2.14.1 before, 2.14.1 and 2.15.0 after." in text
    assert text.splitlines()[-1] == "2 compared: 1 worse, 1 better; 1 missing after, 0 new"

    code, text = reported(before, after, json_=True)
    found = json.loads(text)
    assert code == 1
    counts = {key: found[key] for key in ("regression", "improvement", "same", "missing", "new")}
    assert counts == {"regression": 1, "improvement": 1, "same": 0, "missing": 1, "new": 0}
    assert [entry["after"] for entry in found["rows"]] == [None, 8, None]
    assert reported(before, before) == (0, "3 compared: 0 worse, 0 better; 0 missing after, 0 new\n")


def test_nothing_in_common(tmp_path: Path) -> None:
    paths = written(tmp_path / "a.csv", row("time", 1)), written(tmp_path / "b.csv", row("time", 1, batch=9))
    with pytest.raises(UsageError, match="no figure in common"):
        report(*paths, 0.05, False)
