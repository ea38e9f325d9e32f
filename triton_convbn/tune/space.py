"""The configurations of a problem."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product

from ..kernels.codegen import generate
from ..kernels.config import DEFAULT_CONFIG, EMITS, EVICTS, KernelConfig, split_launches
from .problem import Problem


@dataclass(frozen=True)
class Space:
    """The values of each field of a KernelConfig, in order: neighbours are one step apart.

    per_thread: the fewest and the most elements a thread. evict: one value, as only a clock can tell what a hint does;
    see `measured`.
    """

    block: tuple[int, ...]
    threads: tuple[int, ...]
    emit: tuple[str, ...] = ("tree",)
    rows: tuple[int | None, ...] = (None,)
    evict: tuple[str, ...] = ("none",)
    group: tuple[int | None, ...] = (None,)
    per_thread: tuple[int, int] = (2, 32)
    default: KernelConfig = DEFAULT_CONFIG

    def measured(self) -> "Space":
        """Return the same space with eviction hints, for measuring on a device."""
        return replace(self, evict=EVICTS)

    def configurations(self, problem: Problem) -> tuple[KernelConfig, ...]:
        """Return those worth trying, the default first, then in the order of the fields.

        Of configurations that generate the same kernels only the first is one of them.
        """
        return _configurations(self, problem)

    def neighbours(self, problem: Problem, config: KernelConfig) -> tuple[KernelConfig, ...]:
        """Return configurations one step away in one field, or in block and threads together."""
        usable = set(self.configurations(problem))
        found = dict.fromkeys(other for other in self._steps(config) if other in usable and other != config)
        return tuple(found)

    def _steps(self, config: KernelConfig) -> Iterator[KernelConfig]:
        for field in fields(KernelConfig):
            for value in self._next(field.name, getattr(config, field.name)):
                yield replace(config, **{field.name: value})
        for block in self._next("block", config.block):
            for threads in self._next("threads", config.threads):
                yield replace(config, block=block, threads=threads)

    def _next(self, name: str, value: object) -> list:
        values = getattr(self, name)
        if value not in values:
            return list(values)
        at = values.index(value)
        return [values[i] for i in (at - 1, at + 1) if 0 <= i < len(values)]


@lru_cache(maxsize=256)
def _configurations(space: Space, problem: Problem) -> tuple[KernelConfig, ...]:
    every = product(*(getattr(space, field.name) for field in fields(KernelConfig)))
    least, most = space.per_thread
    found: dict[tuple[str, ...], KernelConfig] = {}
    for config in (space.default, *(KernelConfig(*values) for values in every)):
        if config == space.default or least <= config.block / config.threads <= most:
            parts = split_launches(problem.specs, config)
            found.setdefault(tuple(generate(problem.specs[part], config).digest for part in parts), config)
    return tuple(found.values())


QUICK = Space(block=(512, 1024, 2048), threads=(64, 128, 256), emit=EMITS, per_thread=(4, 16))
FULL = Space(
    block=(256, 512, 1024, 2048, 4096),
    threads=(64, 128, 256, 512),
    emit=EMITS,
    rows=(None, 1, 4),
    group=(None, 8, 4),
)
