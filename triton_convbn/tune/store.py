"""What became of every candidate, in a file of JSON lines that only grows.

    {"header": {schema, arch, device, driver, torch, triton, sources}}      first: what every other line holds for
    {"problem": key, "direction": .., "specs": [..]}                        before its first record
    {"starts": key, "configs": [..]}                                        where the searches of a problem begin
    {"record": key, "config": {..}, status, cost, unit, facts, message, seconds}

Of several records of one problem and configuration the newest wins; nothing is rewritten. A line is one write under a
lock to a file opened for appending, so that many processes may share it, and a killed one loses at most the line that
it was writing. Such a remnant, and whatever else is no line of ours, is counted and passed over. Lines are with the
system as soon as they are written, which a killed process cannot undo; against a power cut they are synced when the
store is closed, and about once a second before that.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..kernels import config
from ..kernels.config import KernelConfig
from ..kernels.spec import GradSpec, Needs, PairSpec
from ..kernels.tuned import generator_hash
from .outcome import Outcome, Status
from .problem import Problem, Specs

SCHEMA = 1
_SYNC_SECONDS = 1.0
_JUDGES = ("archs.py", "bench.py", "cost.py", "values.py")
"""Of the tuner's sources those that a record depends on."""


@dataclass(frozen=True)
class Header:
    """What the records of a file hold for. device: the GPU's name, empty where they are compiled offline."""

    arch: str
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    sources: str = ""
    schema: int = SCHEMA

    def differences(self, other: "Header") -> list[str]:
        """In words, "arch sm_80 (here sm_90)" for every field in which `self`, of a file, is not `other`, of today."""
        return [
            f"{f.name} {getattr(self, f.name) or 'none'} (here {getattr(other, f.name) or 'none'})"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]

    @property
    def name(self) -> str:
        """Of a file that no other header would have: "sm_90-0123456789ab"."""
        words = "\n".join(map(str, asdict(self).values()))
        return f"{self.arch}-{hashlib.sha256(words.encode()).hexdigest()[:12]}"


@cache
def source_hash() -> str:
    """Of the sources that a record depends on: those of the generator, and those that compile, check and rank."""
    digest = hashlib.sha256(generator_hash().encode())
    here, kernels = Path(__file__).parent, Path(config.__file__).parent
    for path in (*(here / name for name in _JUDGES), kernels / "offline.py"):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class Content:
    """What a file holds. outcomes: by problem and configuration, the newest. starts: by problem. garbage: lines that
    are none of ours. repeated: records that a newer one has replaced."""

    header: Header | None = None
    problems: dict[str, Problem] = field(default_factory=dict)
    starts: dict[str, tuple[KernelConfig, ...]] = field(default_factory=dict)
    outcomes: dict[str, dict[KernelConfig, Outcome]] = field(default_factory=dict)
    garbage: int = 0
    repeated: int = 0

    def take(self, line: bytes) -> None:
        """One line of the file, whatever it is."""
        if not line.strip():
            return
        try:
            self._take(json.loads(line))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            self.garbage += 1

    def _take(self, values: dict[str, Any]) -> None:
        if "record" in values:
            candidate, outcome = KernelConfig.from_dict(values["config"]), _outcome(values)
            found = self.outcomes.setdefault(str(values["record"]), {})
            self.repeated += candidate in found
            found[candidate] = outcome
        elif "problem" in values:
            problem = Problem(values["direction"], _specs(values["specs"]))
            if problem.key != values["problem"]:
                raise ValueError("a problem under another's key")
            self.problems[problem.key] = problem
        elif "starts" in values:
            self.starts[str(values["starts"])] = tuple(map(KernelConfig.from_dict, values["configs"]))
        else:
            known = {f.name for f in fields(Header)}
            header = Header(**{name: value for name, value in values["header"].items() if name in known})
            self.header = self.header or header

    @property
    def records(self) -> int:
        return sum(map(len, self.outcomes.values()))


def _specs(values: list[dict[str, Any]]) -> Specs:
    """Back from `asdict`."""
    if "pair" not in values[0]:
        return tuple(PairSpec(**each) for each in values)
    return tuple(
        GradSpec(**{**each, "pair": PairSpec(**each["pair"]), "needs": Needs(*each["needs"])}) for each in values
    )


def _outcome(values: Mapping[str, Any]) -> Outcome:
    status, cost = Status(values["status"]), values["cost"]
    if (status is Status.OK) is not isinstance(cost, int | float):
        raise ValueError("a cost belongs to a candidate that is ok, and to no other")
    facts = dict(values["facts"])
    return Outcome(status, cost, str(values["unit"]), facts, str(values["message"]), float(values["seconds"]))


def read(path: Path) -> Content:
    """The content of a file, of whatever device. Raises: UsageError for what cannot be read or is no store."""
    content = Content()
    try:
        for line in path.read_bytes().split(b"\n"):
            content.take(line)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    if content.header is None:
        raise UsageError(f"{path} is no store of the tuner: it has no header")
    return content


class Store:
    """A file of records, opened to read what is there and to append; without a path, nothing but memory. Close it.

    Where it cannot be written, tuning goes on without: `say` is told so, once, and records are kept to be written with
    the next that can be.

    Raises: UsageError for a file that is no store, or that is of another device or version.
    """

    def __init__(self, path: Path | None, header: Header, say: Callable[[str], None] = lambda text: None) -> None:
        self.path, self.header, self._say = path, header, say
        self.content = Content()
        self._file: int | None = None
        self._recording = False
        self._pending: list[bytes] = []
        self._told = False
        self._synced = time.monotonic()
        self._at = 0  # how far the file has been read
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            self._complain(error)
            self._read_only()
            return
        try:
            with self._locked():
                self._recording = True
                self._begin()
        except BaseException:
            self.close()
            raise

    @property
    def complete(self) -> bool:
        """Whether everything so far is in the file."""
        return self._recording and not self._pending

    def get(self, problem: Problem, candidate: KernelConfig) -> Outcome | None:
        return self.content.outcomes.get(problem.key, {}).get(candidate)

    def add(self, problem: Problem, candidate: KernelConfig, outcome: Outcome) -> Outcome:
        """Record it. Returns it as it will be read again, so that a run and its replay report the same."""
        if problem.key not in self.content.problems:
            self.content.problems[problem.key] = problem
            specs = [asdict(spec) for spec in problem.specs]
            self._append({"problem": problem.key, "direction": problem.direction, "specs": specs})
        record = {"record": problem.key, "config": candidate.to_dict()}
        record |= {f.name: _plain(getattr(outcome, f.name)) for f in fields(outcome)}
        self._append(record)
        again = _outcome(json.loads(_line(record)))
        self.content.outcomes.setdefault(problem.key, {})[candidate] = again
        return again

    def add_starts(self, problem: Problem, configs: Sequence[KernelConfig]) -> None:
        self.content.starts[problem.key] = tuple(configs)
        self._append({"starts": problem.key, "configs": [each.to_dict() for each in configs]})

    def refresh(self) -> None:
        """Read what other processes have appended."""
        if self._file is not None:
            with self._locked():
                self._read_on()

    def close(self) -> None:
        if self._file is not None:
            if self._pending:
                self._write()
            try:
                os.fsync(self._file)
            except OSError as error:
                self._complain(error)
            os.close(self._file)
            self._file = None

    # -- the file --

    def _begin(self) -> None:
        """Read the file, and give a new one its header."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        text = os.pread(self._file, size, 0)
        line = _line({"header": asdict(self.header)})
        # One that was killed while it wrote the header has left the beginning of it, and nothing else.
        if not text or (b"\n" not in text and text.startswith(line[:12])):
            try:
                _write_all(self._file, (b"\n" if text else b"") + line)
            except OSError as error:
                self._complain(error)
                self._pending.append(line)
        self._read_on()
        if text and self.content.header is None and not self._pending:
            raise UsageError(f"{self.path} is no store of the tuner: give another --store, or --fresh to set it aside")
        if self.content.header is not None:
            self._check(self.content.header)

    def _check(self, header: Header) -> None:
        if differences := header.differences(self.header):
            raise UsageError(
                f"{self.path} was recorded for {', '.join(differences)}: give another --store, or --fresh to set it "
                "aside and begin anew"
            )

    def _read_only(self) -> None:
        """What is there may still be read where nothing can be written."""
        assert self.path is not None
        try:
            text = self.path.read_bytes()
        except OSError:
            return
        for line in text.split(b"\n"):
            self.content.take(line)
        if self.content.header is None and text:
            self.content = Content()
        elif self.content.header is not None:
            self._check(self.content.header)

    def _read_on(self) -> None:
        assert self._file is not None
        size = os.fstat(self._file).st_size
        if size <= self._at:
            return
        data = os.pread(self._file, size - self._at, self._at)
        end = len(data) if self._at == 0 else data.rfind(b"\n") + 1
        for line in data[:end].split(b"\n"):
            self.content.take(line)
        self._at += end

    def _append(self, values: dict[str, Any]) -> None:
        if self._file is not None:
            self._pending.append(_line(values))
            self._write()

    def _write(self) -> None:
        """Everything that is pending, in one write; at the start of a line, even after a process killed within one."""
        assert self._file is not None
        try:
            with self._locked():
                size = os.fstat(self._file).st_size
                torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
                _write_all(self._file, (b"\n" if torn else b"") + b"".join(self._pending))
                if time.monotonic() - self._synced > _SYNC_SECONDS:
                    os.fsync(self._file)
                    self._synced = time.monotonic()
            self._pending.clear()
        except OSError as error:
            self._complain(error)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            import fcntl
        except ImportError:  # not on Windows, where one process must do
            yield
            return
        fcntl.flock(self._file, fcntl.LOCK_EX)  # type: ignore[arg-type]
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # type: ignore[arg-type]

    def _complain(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            self._say(f"{self.path} cannot be written ({error.strerror or error}): the run goes on, unrecorded")


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity, and no tuples."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":"), allow_nan=False, default=str).encode() + b"\n"


def _write_all(file: int, data: bytes) -> None:
    """One write; an OSError where it is cut short, as by a disk that has become full."""
    if os.write(file, data) != len(data):
        raise OSError("only a part of it was written")


def set_aside(path: Path) -> Path | None:
    """Rename a file out of the way, to a name that is free, and return that; None where there is no file.

    Raises: UsageError where it cannot be renamed.
    """
    if not path.exists():
        return None
    number = 1
    while (other := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    try:
        path.rename(other)
    except OSError as error:
        raise UsageError(f"{path} cannot be set aside: {error.strerror or error}") from error
    return other
