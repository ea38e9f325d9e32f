"""The store: what it records and refuses, and what survives a kill, garbage, or a full disk."""

import json
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from triton_convbn.kernels.config import KernelConfig
from tune_cases import HEADER, problems

from triton_convbn.errors import UsageError
from triton_convbn.tune.header import Header
from triton_convbn.tune.outcome import MEASURED, Outcome, Status
from triton_convbn.tune.store import Store, read, set_aside

CONFIGS = [KernelConfig(block=block, threads=threads) for block in (512, 1024, 2048) for threads in (64, 128, 256)]


def outcome(cost: float) -> Outcome:
    return Outcome(Status.OK, cost, MEASURED, {"registers": 40, "loads": {32: 1}, "odd": float("nan")}, "", 1.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "store.jsonl"


def filled(path: Path, count: int = 3) -> list[bytes]:
    """Fill a store with `count` records of one problem. Return its lines."""
    store = Store(path, HEADER)
    for number in range(count):
        store.add(problems()[0], CONFIGS[number], outcome(number + 1.0))
    store.close()
    return path.read_bytes().splitlines(keepends=True)


def test_what_was_added_is_there_again(path: Path) -> None:
    store = Store(path, HEADER)
    added = {}
    for problem in problems():
        for number, config in enumerate(CONFIGS):
            failed = Outcome(Status.HUNG, message="no result after 60 s", seconds=60.0)
            added[problem.key, config] = store.add(problem, config, failed if number % 2 else outcome(number))
    store.close()
    again = Store(path, HEADER)
    assert {(p.key, c): again.get(p, c) for p in problems() for c in CONFIGS} == added
    first = again.get(problems()[0], CONFIGS[0])
    assert first is not None
    assert first.facts == {"registers": 40, "loads": {"32": 1}, "odd": None}  # JSON has no NaN and no number as a name
    assert (first.cost, first.unit, first.seconds) == (0.0, MEASURED, 1.5)
    assert list(again.content.problems.values()) == problems()  # the specs, too, so that a replay needs no model
    assert again.content.garbage == 0
    again.close()


def test_the_newest_record_wins_and_nothing_is_rewritten(path: Path) -> None:
    before = b"".join(filled(path))
    store = Store(path, HEADER)
    store.add(problems()[0], CONFIGS[1], outcome(0.5))
    store.close()
    assert path.read_bytes().startswith(before)
    content = read(path)
    assert content.outcomes[problems()[0].key][CONFIGS[1]].cost == 0.5
    assert content.records == 3


@pytest.mark.parametrize("field", [f.name for f in fields(Header)])
def test_another_device_or_version_is_refused(field: str, path: Path) -> None:
    before = b"".join(filled(path))
    other = replace(HEADER, **{field: 3 if field == "schema" else "another"})
    with pytest.raises(UsageError, match=rf"{field} .* \(here (3|another)\)") as refused:
        Store(path, other)
    message = str(refused.value)
    assert str(path) in message
    assert "--store" in message
    assert "--fresh" in message
    assert "\n" not in message
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["case,provider\nresnet50,eager\n", "{}\n", "\0\0\n\0", '{"record": "x"}\n', "{\n"])
def test_what_is_no_store_is_refused(text: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UsageError, match="is no store of the tuner"):
        Store(path, HEADER)
    with pytest.raises(UsageError, match="is no store of the tuner"):
        read(path)
    assert path.read_text() == text


def test_nothing_to_read(path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read(path)


def test_a_last_line_cut_anywhere(path: Path) -> None:
    lines = filled(path)
    whole, last = b"".join(lines[:-1]), lines[-1]
    for kept in range(len(last)):
        path.write_bytes(whole + last[:kept])
        store = Store(path, HEADER)
        complete = kept == len(last) - 1  # nothing but its end is missing
        assert store.content.records == 2 + complete, kept
        assert store.content.garbage == (0 < kept < len(last) - 1), kept
        store.add(problems()[0], CONFIGS[5], outcome(9.0))
        store.close()
        content = read(path)
        assert content.records == 3 + complete, kept  # the remnant does not take the next line with it
        assert content.outcomes[problems()[0].key][CONFIGS[5]].cost == 9.0


def test_a_header_cut_anywhere(path: Path) -> None:
    header = filled(path)[0]
    for kept in range(13, len(header)):
        path.write_bytes(header[:kept])
        store = Store(path, HEADER)
        store.add(problems()[0], CONFIGS[0], outcome(1.0))
        store.close()
        assert read(path).records == 1, kept
        assert read(path).header == HEADER


_RECORD = '{"record":"p","config":%s,"status":"%s","cost":%s,"unit":"us","facts":{},"message":"","seconds":1}\n'

GARBAGE = {
    "no JSON": b"<<<<<<< HEAD\n",
    "bytes": b"\xff\xfe\0\n",
    "a number": b"7\n",
    "a list": b"[]\n",
    "another object": b'{"case": "resnet50"}\n',
    "a nested one": b"[" * 100_000 + b"\n",
    "a status that there is not": (_RECORD % ("{}", "fine", "1")).encode(),
    "a failure that costs": (_RECORD % ("{}", "hung", "1")).encode(),
    "one that is ok for nothing": (_RECORD % ("{}", "ok", "null")).encode(),
    "a configuration that there is not": (_RECORD % ('{"block":3}', "ok", "1")).encode(),
    "a problem under another key": b'{"problem":"p","direction":"fold","specs":[]}\n',
}


@pytest.mark.parametrize("line", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_counted_and_passed_over(line: bytes, path: Path) -> None:
    lines = filled(path)
    path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    store = Store(path, HEADER)
    assert (store.content.records, store.content.garbage) == (3, 1)
    assert store.content.outcomes.keys() == {problems()[0].key}
    store.close()


def _append(path: Path, worker: int) -> None:
    store = Store(path, HEADER)
    for number in range(40):
        store.add(problems()[worker], KernelConfig(group=number + 1), outcome(worker))
    store.close()


def test_many_processes_append(path: Path) -> None:
    """All of them create the file."""
    fork = get_context("fork")
    running = [fork.Process(target=_append, args=(path, worker)) for worker in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * 4
    content = read(path)
    assert {key: len(found) for key, found in content.outcomes.items()} == {problem.key: 40 for problem in problems()}
    assert content.garbage == 0
    assert sum(b'"header"' in line for line in path.read_bytes().splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_ends_the_run() -> None:
    with pytest.raises(UsageError, match="/dev/full cannot be written: No space left on device"):
        Store(Path("/dev/full"), HEADER)


def test_a_folder_that_cannot_be_made_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written: .*; give another --store"):
        Store(tmp_path / "file" / "store", HEADER)


def test_set_aside(path: Path) -> None:
    assert set_aside(path) is None
    filled(path)
    before = path.read_bytes()
    assert set_aside(path) == path.with_name("store.jsonl.1")
    assert not path.exists()
    filled(path, 1)
    assert set_aside(path) == path.with_name("store.jsonl.2")
    assert path.with_name("store.jsonl.1").read_bytes() == before


def test_memory_alone() -> None:
    store = Store(None, HEADER)
    store.add(problems()[0], CONFIGS[0], outcome(1.0))
    assert store.get(problems()[0], CONFIGS[0]) is not None
    store.close()


def test_every_line_is_json(path: Path) -> None:
    for line in filled(path):
        assert isinstance(json.loads(line), dict)
