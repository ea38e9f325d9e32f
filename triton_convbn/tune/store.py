"""The store: the outcome of every candidate, in a file of JSON lines that only grows.

    {"header": {arch, device, driver, torch, triton, sources}}               the first line: what the records hold for
    {"problem": key, "specs": [..]}                                          before the first record of a problem
    {"problem": key, "config": {..}, status, cost, facts, message, seconds}  a record

The newest record of a problem and configuration holds. A line is one write under a lock, so that processes share a file
and a killed one loses at most the line that it was writing. Lines that cannot be read are counted and skipped.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import UsageError, usage_error_from
from ..kernels import config
from ..kernels.config import KernelConfig
from ..kernels.files import append_line, hash_files, locked
from ..kernels.spec import GradSpec, Needs, PairSpec
from ..kernels.tuned import Gpu
from ..kernels.tuned_files import OFFLINE, generator_files
from ..versions import package_version
from .outcome import Outcome, Status
from .problem import Problem

_OTHER_FILE = "give another --store, or --fresh to set it aside"
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Header:
    """The GPU and the versions that made the records. device: The GPU's name; empty if it was not there."""

    arch: str
    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    sources: str = ""

    @classmethod
    def of(cls, gpu: Gpu) -> "Header":
        """Return the header of records made here and now: measured if the GPU has a name, else compiled."""
        import torch

        version = getattr(torch._C, "_cuda_getDriverVersion", str)  # absent from ROCm builds
        driver = str(torch.version.hip or version()) if gpu.name else ""
        return cls(gpu.arch, gpu.name, driver, package_version("torch"), package_version("triton"), source_hash())

    @property
    def unit(self) -> str:
        """Return the unit of costs."""
        return "measured us" if self.device else "registers"

    @property
    def how(self) -> str:
        """Return how costs are obtained, in words."""
        return f"measured on {self.device}" if self.device else OFFLINE

    @property
    def margin(self) -> float:
        """Return the share of the default's cost that another configuration must save to replace it."""
        return 0.01 if self.device else 1.0  # compiled facts do not predict time well enough


@cache
def source_hash() -> str:
    """Return a hash of the sources that a record depends on: those that generate, compile, check, time and store."""
    here, kernels = Path(__file__).parent, Path(config.__file__).parent
    names = [here / f"{name}.py" for name in ("bench", "evaluate", "outcome", "store")]
    names += [kernels / f"{name}.py" for name in ("disassembly", "kernel_call", "offline", "testing")]
    return hash_files([*names, *generator_files()])


@dataclass
class Store:
    """The content of a file: problems by key, outcomes by key and configuration, the number of unreadable lines.

    Raises:
        UsageError: The file cannot be read or written, is no store, or is of another device or version.
    """

    path: Path
    header: Header
    problems: dict[str, Problem] = field(default_factory=dict)
    outcomes: dict[str, dict[KernelConfig, Outcome]] = field(default_factory=dict)
    unreadable: int = 0

    @classmethod
    def read(cls, path: Path) -> "Store":
        """Return the content of a file, of any device and version."""
        with usage_error_from(f"{path} cannot be read"):
            first, *lines = path.read_bytes().split(b"\n")
        try:
            store = cls(path, Header(**json.loads(first)["header"]))
        except _MALFORMED as error:
            raise UsageError(f"{path} is no store of the tuner: {_OTHER_FILE}") from error
        for line in filter(bytes.strip, lines):
            try:
                store._add(json.loads(line))
            except _MALFORMED:
                store.unreadable += 1
        return store

    @classmethod
    def open(cls, path: Path, header: Header) -> "Store":
        """Return the content of a file of this header. Make the file if it is missing."""
        first = json.dumps({"header": asdict(header)}).encode()
        with usage_error_from(f"{path} cannot be written", "give another --store"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b", buffering=0) as file, locked(file):
                file.seek(0)
                text = file.read(os.fstat(file.fileno()).st_size)
                if first.startswith(text):  # a new file, or a process was killed while it wrote the header
                    file.write(first[len(text) :])
        store = cls.read(path)
        pairs = zip(asdict(store.header).items(), asdict(header).values(), strict=True)
        if other := [f"{name} {old or 'none'} (here {new or 'none'})" for (name, old), new in pairs if old != new]:
            raise UsageError(f"{path} was recorded for {', '.join(other)}: {_OTHER_FILE}")
        return store

    def add(self, problem: Problem, candidate: KernelConfig, outcome: Outcome) -> None:
        """Record an outcome."""
        lines = [{"problem": problem.key, "config": asdict(candidate), **asdict(outcome)}]
        if problem.key not in self.problems:
            lines.insert(0, {"problem": problem.key, "specs": [asdict(spec) for spec in problem.specs]})
        with usage_error_from(f"{self.path} cannot be written"):
            append_line(self.path, b"\n".join(json.dumps(line, separators=(",", ":")).encode() for line in lines))
        self.problems[problem.key] = problem
        self.outcomes.setdefault(problem.key, {})[candidate] = outcome

    def _add(self, values: dict[str, Any]) -> None:
        """Add a line of the file. Raise one of _MALFORMED if it is neither a problem nor a record."""
        if "specs" in values:
            self.problems[values["problem"]] = Problem(tuple(map(_spec, values["specs"])))
            return
        key, candidate = str(values.pop("problem")), KernelConfig.from_dict(values.pop("config"))
        outcome = Outcome(**values | {"status": Status(values["status"]), "facts": dict(values["facts"])})
        if (outcome.status is Status.OK) is not isinstance(outcome.cost, int | float):
            raise ValueError("only a candidate that is ok has a cost")
        self.outcomes.setdefault(key, {})[candidate] = outcome


def _spec(values: dict[str, Any]) -> Any:
    """Return a PairSpec or a GradSpec from its `asdict`."""
    if "pair" not in values:
        return PairSpec(**values)
    return GradSpec(**{**values, "pair": PairSpec(**values["pair"]), "needs": Needs(*values["needs"])})


def set_aside(path: Path) -> Path | None:
    """Rename a file to a free name and return that, or None if there is no file."""
    if not path.exists():
        return None
    other = next(free for n in count(1) if not (free := path.with_name(f"{path.name}.{n}")).exists())
    with usage_error_from(f"{path} cannot be set aside"):
        return path.rename(other)
