"""The store: what it records and refuses, and what survives a kill, garbage, or a full disk."""

from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from triton_convbn.kernels.config import KernelConfig
from tune_cases import HEADER, problems

from triton_convbn.errors import UsageError
from triton_convbn.tune.outcome import Outcome, Status
from triton_convbn.tune.store import Header, Store, set_aside

CONFIGS = [KernelConfig(block=block, threads=threads) for block in (512, 1024, 2048) for threads in (64, 128, 256)]


def outcome(cost: float) -> Outcome:
    return Outcome(Status.OK, cost, {"registers": 40, "gb_per_s": 1.5}, "", 1.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "store.jsonl"


def filled(path: Path, count: int = 3) -> list[bytes]:
    """Fill a store with `count` records of one problem. Return its lines."""
    store = Store.open(path, HEADER)
    for number in range(count):
        store.add(problems()[0], CONFIGS[number], outcome(number + 1.0))
    return path.read_bytes().splitlines(keepends=True)


def records(store: Store) -> int:
    return sum(map(len, store.outcomes.values()))


def test_a_store_reads_what_was_added(path: Path) -> None:
    store = Store.open(path, HEADER)
    for problem in problems():
        for number, config in enumerate(CONFIGS):
            failed = Outcome(Status.HUNG, message="no result after 60 s", seconds=60.0)
            store.add(problem, config, failed if number % 2 else outcome(number))
    again = Store.open(path, HEADER)
    assert again == store
    assert list(again.problems.values()) == problems()  # a replay needs no model
    assert records(again) == len(problems()) * len(CONFIGS)


def test_the_newest_record_wins_and_nothing_is_rewritten(path: Path) -> None:
    before = b"".join(filled(path))
    Store.open(path, HEADER).add(problems()[0], CONFIGS[1], outcome(0.5))
    assert path.read_bytes().startswith(before)
    store = Store.read(path)
    assert store.outcomes[problems()[0].key][CONFIGS[1]].cost == 0.5
    assert records(store) == 3


@pytest.mark.parametrize("field", [f.name for f in fields(Header)])
def test_another_device_or_version_is_refused(field: str, path: Path) -> None:
    before = b"".join(filled(path))
    with pytest.raises(UsageError, match=rf"{field} .* \(here another\)") as refused:
        Store.open(path, replace(HEADER, **{field: "another"}))
    message = str(refused.value)
    assert str(path) in message
    assert "--store" in message
    assert "--fresh" in message
    assert "\n" not in message
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text", ["case,provider\nresnet50,eager\n", "{}\n", "[" * 100_000, "\0\0\n\0", '{"record": "x"}\n', "{\n"]
)
def test_another_file_is_refused(text: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UsageError, match="is no store of the tuner"):
        Store.open(path, HEADER)
    with pytest.raises(UsageError, match="is no store of the tuner"):
        Store.read(path)
    assert path.read_text() == text


def test_nothing_to_read(path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        Store.read(path)


def test_a_last_line_cut_anywhere(path: Path) -> None:
    lines = filled(path)
    whole, last = b"".join(lines[:-1]), lines[-1].rstrip()
    for kept in range(len(last) + 1):
        path.write_bytes(whole + last[:kept])
        store = Store.open(path, HEADER)
        complete = kept == len(last)
        assert records(store) == 2 + complete, kept
        assert store.unreadable == (0 < kept < len(last)), kept
        store.add(problems()[0], CONFIGS[5], outcome(9.0))
        again = Store.read(path)
        assert records(again) == 3 + complete, kept  # the remnant does not take the next line with it
        assert again.outcomes[problems()[0].key][CONFIGS[5]].cost == 9.0


def test_a_header_cut_anywhere(path: Path) -> None:
    header = filled(path, 0)[0]
    for kept in range(len(header)):
        path.write_bytes(header[:kept])
        Store.open(path, HEADER).add(problems()[0], CONFIGS[0], outcome(1.0))
        store = Store.read(path)
        assert (store.header, records(store), store.unreadable) == (HEADER, 1, 0), kept


_RECORD = '{"problem":"p","config":%s,"status":"%s","cost":%s,"facts":{},"message":"","seconds":1}\n'

GARBAGE = {
    "no JSON": b"<<<<<<< HEAD\n",
    "bytes": b"\xff\xfe\0\n",
    "a number": b"7\n",
    "a list": b"[]\n",
    "another object": b'{"case": "resnet50"}\n',
    "a nested one": b"[" * 100_000 + b"\n",
    "an unknown status": (_RECORD % ("{}", "fine", "1")).encode(),
    "a failure that costs": (_RECORD % ("{}", "hung", "1")).encode(),
    "one that is ok without a cost": (_RECORD % ("{}", "ok", "null")).encode(),
    "an invalid configuration": (_RECORD % ('{"block":3}', "ok", "1")).encode(),
    "a problem without pairs": b'{"problem":"p","specs":[{}]}\n',
    "a second header": b'{"header":{"arch":"sm_80"}}\n',
    "facts that are none": (_RECORD.replace('"facts":{}', '"facts":7') % ("{}", "ok", "1")).encode(),
}


@pytest.mark.parametrize("line", GARBAGE.values(), ids=GARBAGE)
def test_unreadable_lines_are_counted_and_skipped(line: bytes, path: Path) -> None:
    lines = filled(path)
    path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    store = Store.open(path, HEADER)
    assert (records(store), store.unreadable) == (3, 1)
    assert store.outcomes.keys() == {problems()[0].key}


def _append(path: Path, worker: int) -> None:
    store = Store.open(path, HEADER)
    for number in range(40):
        store.add(problems()[worker], KernelConfig(pairs_per_launch=number + 1), outcome(worker))


def test_many_processes_append(path: Path) -> None:
    """All of them create the file."""
    fork = get_context("fork")
    running = [fork.Process(target=_append, args=(path, worker)) for worker in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * 4
    store = Store.read(path)
    assert {key: len(found) for key, found in store.outcomes.items()} == {problem.key: 40 for problem in problems()}
    assert store.unreadable == 0  # a second header would be counted


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_ends_the_run(path: Path) -> None:
    with pytest.raises(UsageError, match="/dev/full cannot be written: No space left on device"):
        Store.open(Path("/dev/full"), HEADER)
    store = Store.open(path, HEADER)
    store.path = Path("/dev/full")
    with pytest.raises(UsageError, match="/dev/full cannot be written: No space left on device"):
        store.add(problems()[0], CONFIGS[0], outcome(1.0))


def test_a_folder_that_cannot_be_made_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written: .*; give another --store"):
        Store.open(tmp_path / "file" / "store", HEADER)


def test_set_aside(path: Path) -> None:
    assert set_aside(path) is None
    filled(path)
    before = path.read_bytes()
    assert set_aside(path) == path.with_name("store.jsonl.1")
    assert not path.exists()
    filled(path, 1)
    assert set_aside(path) == path.with_name("store.jsonl.2")
    assert path.with_name("store.jsonl.1").read_bytes() == before
