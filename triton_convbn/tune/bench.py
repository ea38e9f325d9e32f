"""Configurations to outcomes without a GPU: compiled offline in a pool of processes, checked for values, modelled.

`OfflineBench` compiles every launch of a call for an architecture, drops what spills or exceeds a limit, checks the
rest for values in Triton's interpreter, and takes `cost.modelled` for its worth. `DeviceBench`, by time, is in
`device.py`.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..kernels.codegen import KernelSource, generate
from ..kernels.config import KernelConfig, split_launches
from ..kernels.launch import CACHE_VARIABLE
from ..kernels.offline import KernelFacts, facts
from .archs import Arch, arch_of
from .cost import Modelled, modelled, over_limit
from .outcome import MODELLED, Evaluator, Generate, Outcome, Status
from .pool import Done, Lane, Pool
from .problem import Problem, Specs

__all__ = ["MODELLED", "Evaluator", "OfflineBench", "Outcome", "Status"]


@dataclass(frozen=True)
class Candidate:
    """What a process of the pool is asked about: a call, a configuration, and what writes the kernels."""

    specs: Specs
    config: KernelConfig
    generate: Generate
    arch: str = ""

    def sources(self) -> list[tuple[slice, KernelSource]]:
        """The kernels of the call's launches, and which of its pairs each serves."""
        parts = split_launches(self.specs, self.config)
        return [(part, self.generate(self.specs[part], self.config)) for part in parts]


Compiled = list[tuple[KernelSource, KernelFacts]]


def compile_candidate(candidate: Candidate) -> Compiled:
    """Return the facts of each launch that has programs. Runs in a process of the pool."""
    from triton.backends.amd.compiler import HIPBackend

    HIPBackend._torch_available = False  # it would import torch, to look for tensors among the arguments

    return [(source, facts(source, candidate.arch)) for _, source in candidate.sources() if source.programs]


def check_candidate(candidate: Candidate) -> str | None:
    """In a process of the pool, interpreted: what is wrong with the values of a smaller call of the same kind."""
    import torch

    from ..kernels.kernel_call import KernelCall
    from .values import reduced

    torch.set_num_threads(1)
    small = replace(candidate, specs=reduced(candidate.specs, candidate.config)).sources()
    # The interpreter has no threads: texts that differ in them, which the docstring says, compute the same.
    key = tuple((part.start, part.stop, source.programs, source.text.split('"""', 2)[2]) for part, source in small)
    if key not in _CHECKED:
        call = KernelCall(reduced(candidate.specs, candidate.config), torch.device("cpu"))
        call.run(small)
        _CHECKED[key] = call.wrong()
    return _CHECKED[key]


_CHECKED: dict[Any, str | None] = {}
"""Of this process: what came of each check."""


class OfflineBench:
    """An `Evaluator` by compiled facts, for an architecture that need not be there.

    arch: one of `archs.ARCHS`. workers: processes that compile; one more checks values. timeout: seconds that a
    candidate may compile, and again that it may be checked, before it is killed and recorded as hung. generate: what
    writes a kernel; importable by name, for it goes to other processes.
    Raises: UsageError for an unknown architecture, and where the processes cannot start.
    """

    unit = MODELLED
    margin = 0.02

    def __init__(self, arch: str, workers: int = 2, timeout: float = 60.0, generate: Generate = generate) -> None:
        self.arch: Arch = arch_of(arch)
        self._generate = generate
        self._sources = tempfile.TemporaryDirectory(prefix="triton_convbn-tune-")  # losers leave nothing behind
        quiet = {CACHE_VARIABLE: self._sources.name, "OMP_NUM_THREADS": "1"}
        lanes = [
            Lane("compile", compile_candidate, workers, {**quiet, "TRITON_INTERPRET": "0"}),
            Lane("check", check_candidate, 1, {**quiet, "TRITON_INTERPRET": "1"}),
        ]
        self._pool = Pool(lanes, timeout)

    def __enter__(self) -> "OfflineBench":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.close()
        self._sources.cleanup()

    def evaluate(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Each configuration once, with its outcome, as they finish. What is given up is killed."""
        modelled_so_far: dict[KernelConfig, Outcome] = {}
        for config in dict.fromkeys(configs):
            self._pool.submit("compile", Candidate(problem.specs, config, self._generate, self.arch.name))
        for done in self._pool.results():
            config = done.task.config
            if done.lane == "compile":
                outcome = self._compiled(done)
                if outcome.status is Status.OK:
                    modelled_so_far[config] = outcome
                    self._pool.submit("check", done.task)
                    continue
            else:
                outcome = _checked(modelled_so_far.pop(config), done)
            yield config, outcome

    def rerank(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Nothing: the same facts have the same cost."""
        return iter(())

    def _compiled(self, done: Done) -> Outcome:
        if done.how != "returned":
            return failure(done)
        compiled: Compiled = done.value
        found = _facts(compiled)
        for _, each in compiled:
            if each.spills:
                return Outcome(Status.SPILLS, facts=found, message=f"{each.spills} spills", seconds=done.seconds)
            if limit := over_limit(each, self.arch):
                return Outcome(Status.OVER_LIMIT, facts=found, message=limit, seconds=done.seconds)
        launches = [modelled(source, each, self.arch) for source, each in compiled]
        cost = sum(launch.us for launch in launches)
        return Outcome(Status.OK, cost, facts=found | _modelled_facts(launches, cost), seconds=done.seconds)


def failure(done: Done) -> Outcome:
    """The outcome of a task that returned nothing."""
    status = {"raised": Status.FAILED, "hung": Status.HUNG, "crashed": Status.CRASHED}[done.how]
    return Outcome(status, message=done.message, seconds=done.seconds)


def _checked(outcome: Outcome, done: Done) -> Outcome:
    """The outcome of a candidate that compiled, once its values are checked."""
    seconds = outcome.seconds + done.seconds
    if done.how != "returned":
        failed = failure(done)
        return replace(failed, facts=outcome.facts, message=f"values: {failed.message}", seconds=seconds)
    if done.value is not None:
        return Outcome(Status.WRONG_VALUES, facts=outcome.facts, message=done.value, seconds=seconds)
    return replace(outcome, seconds=seconds)


def _facts(compiled: Compiled) -> dict[str, Any]:
    """Of all launches: the worst of what is bad, the sum of what adds up."""
    each = [facts for _, facts in compiled]
    return {
        "launches": len(each),
        "programs": sum(f.programs for f in each),
        "registers": max((f.registers for f in each), default=0),
        "spills": sum(f.spills for f in each),
        "shared_bytes": max((f.shared_bytes for f in each), default=0),
        "instructions": sum(f.instructions for f in each),
        "load_bits": max((max(f.load_bits, default=0) for f in each), default=0),
        "store_bits": max((max(f.store_bits, default=0) for f in each), default=0),
        "bytes": sum(f.bytes_read + f.bytes_written for f in each),
        "compile_seconds": round(sum(f.compile_seconds for f in each), 2),
    }


def _modelled_facts(launches: Sequence[Modelled], cost: float) -> dict[str, Any]:
    if not launches:
        return {}
    terms = {name: sum(asdict(launch)[name] for launch in launches) for name in ("memory", "latency", "balance")}
    return {
        "occupancy": round(min(launch.occupancy for launch in launches), 3),
        "waves": round(sum(launch.waves for launch in launches), 2),
        "bytes_in_flight": min(launch.bytes_in_flight for launch in launches),
        "share_of_bandwidth": round(sum(launch.share_of_bandwidth * launch.us for launch in launches) / cost, 4),
        **{f"{name}_us": round(value, 3) for name, value in terms.items()},
    }
