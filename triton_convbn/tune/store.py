"""The store: the outcome of every candidate, in a file of JSON lines that only grows.

    {"header": {schema, arch, device, driver, torch, triton, sources}}      the first line: what the records hold for
    {"problem": key, "direction": .., "specs": [..]}                        before the first record of a problem
    {"record": key, "config": {..}, status, cost, unit, facts, message, seconds}

The newest record of a problem and configuration holds. A line is one write under a lock, so that processes share a file
and a killed one loses at most the line that it was writing. Lines that cannot be read are counted and skipped.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..kernels.config import KernelConfig
from ..kernels.files import locked
from ..kernels.spec import GradSpec, Needs, PairSpec
from .header import Header
from .outcome import Outcome, Status
from .problem import Problem, Specs


@dataclass
class Content:
    """The content of a file: outcomes by problem and configuration; the count of lines that cannot be read."""

    header: Header | None = None
    problems: dict[str, Problem] = field(default_factory=dict)
    outcomes: dict[str, dict[KernelConfig, Outcome]] = field(default_factory=dict)
    garbage: int = 0

    def add_line(self, line: bytes) -> None:
        """Add one line of the file, or count it as garbage."""
        if not line.strip():
            return
        try:
            self._add(json.loads(line))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            self.garbage += 1

    def _add(self, values: dict[str, Any]) -> None:
        if "record" in values:
            candidate, outcome = KernelConfig.from_dict(values["config"]), _outcome(values)
            self.outcomes.setdefault(str(values["record"]), {})[candidate] = outcome
        elif "problem" in values:
            problem = Problem(values["direction"], _specs(values["specs"]))
            if problem.key != values["problem"]:
                raise ValueError("a problem under another's key")
            self.problems[problem.key] = problem
        else:
            known = {f.name for f in fields(Header)}
            header = Header(**{name: value for name, value in values["header"].items() if name in known})
            self.header = self.header or header

    @property
    def records(self) -> int:
        """Return the number of candidates with an outcome."""
        return sum(map(len, self.outcomes.values()))


def _specs(values: list[dict[str, Any]]) -> Specs:
    """Return specs from their `asdict`."""
    if "pair" not in values[0]:
        return tuple(PairSpec(**each) for each in values)
    return tuple(
        GradSpec(**{**each, "pair": PairSpec(**each["pair"]), "needs": Needs(*each["needs"])}) for each in values
    )


def _outcome(values: Mapping[str, Any]) -> Outcome:
    status, cost = Status(values["status"]), values["cost"]
    if (status is Status.OK) is not isinstance(cost, int | float):
        raise ValueError("only a candidate that is ok has a cost")
    facts = dict(values["facts"])
    return Outcome(status, cost, str(values["unit"]), facts, str(values["message"]), float(values["seconds"]))


def read(path: Path) -> Content:
    """Return the content of a file, of any device. Raise UsageError if it cannot be read or is no store."""
    try:
        return _parsed(path.read_bytes(), path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


def _parsed(text: bytes, path: Path) -> Content:
    content = Content()
    for line in text.split(b"\n"):
        content.add_line(line)
    if content.header is None:
        raise UsageError(f"{path} is no store of the tuner: give another --store, or --fresh to set it aside")
    return content


class Store:
    """A file of records, open for reading and appending; in memory only if `path` is None. Close it.

    Raises:
        UsageError: if the file cannot be written, is no store, or is of another device or version.
    """

    def __init__(self, path: Path | None, header: Header) -> None:
        self.path, self.header, self.content = path, header, Content(header)
        self._file: int | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror or error}; give another --store") from error
        try:
            with self.locked():
                self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        """Read the file. Give it a header if it is new, or if a process was killed while writing the header."""
        assert self._file is not None
        text = os.pread(self._file, os.fstat(self._file).st_size, 0)
        line = _line({"header": asdict(self.header)})
        if not text or (b"\n" not in text and text.startswith(line[:12])):
            self._write(line)
            return
        self.content = _parsed(text, path)
        assert self.content.header is not None
        if differences := self.content.header.differences(self.header):
            raise UsageError(
                f"{path} was recorded for {', '.join(differences)}: give another --store, or --fresh to set it aside"
            )

    def get(self, problem: Problem, candidate: KernelConfig) -> Outcome | None:
        """Return the recorded outcome of a candidate."""
        return self.content.outcomes.get(problem.key, {}).get(candidate)

    def add(self, problem: Problem, candidate: KernelConfig, outcome: Outcome) -> Outcome:
        """Record an outcome. Return it as `get` will read it."""
        record: dict[str, Any] = {"record": problem.key, "config": candidate.to_dict()}
        record |= {f.name: _plain(getattr(outcome, f.name)) for f in fields(outcome)}
        lines = _line(record)
        if problem.key not in self.content.problems:
            specs = [asdict(spec) for spec in problem.specs]
            lines = _line({"problem": problem.key, "direction": problem.direction, "specs": specs}) + lines
        if self._file is not None:
            with self.locked():
                self._write(lines)
        for line in lines.splitlines():
            self.content.add_line(line)
        return self.content.outcomes[problem.key][candidate]

    def close(self) -> None:
        """Sync the file to the disk and close it."""
        if self._file is not None:
            with suppress(OSError):  # not every file can be synced
                os.fsync(self._file)
            os.close(self._file)
            self._file = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the file's lock, which all processes of a run share."""
        if self._file is None:
            yield
            return
        with locked(self._file):
            yield

    def _write(self, data: bytes) -> None:
        """Append in one write, at the start of a line even if a killed process left a part of one."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
        data = b"\n" * torn + data
        try:
            if os.write(self._file, data) != len(data):
                raise OSError("only a part was written")
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror or error}") from error


def _plain(value: Any) -> Any:
    """Return a value that JSON has: no NaN, no infinity."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":"), allow_nan=False, default=str).encode() + b"\n"


def set_aside(path: Path) -> Path | None:
    """Rename a file to a free name and return that; None if there is no file. Raise UsageError if it cannot be."""
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
