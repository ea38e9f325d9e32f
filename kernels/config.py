"""What a generated kernel may be like, beside what it computes: the values that a tuner chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .spec import ARGUMENT_LIMIT, GradSpec, PairSpec, plan_groups

EMITS = ("tree", "shared")
EVICTS = ("none", "loads", "loads+stores")


@dataclass(frozen=True)
class KernelConfig:
    """What a tuner may change. The default is what runs where nothing was tuned.

    block, threads: elements and threads of a program. 128 threads (4 warps of 32, 2 wavefronts of 64) of 8 elements:
        one 16-byte load of a 16-bit weight each, two of an fp32 one. Pairs of wider dtypes get fewer elements, see
        `_fold_block` and `_tile`.
    emit: "tree" is one body a pair. "shared" is one body for all pairs of the group that are described alike, with
        their pointers selected: less code, and more registers.
    rows: the most channels that a program of the backward holds; None: as many as fill `block`.
    evict: which accesses of the large tensors say that their lines may go first: none, what is read, or what the
        backward writes as well. (What the forward writes is read next, by the convolution.)
    group: the most pairs of one call that go into one launch; None: all of them. The generators write one launch and do
        not look at it: `split_launches` does.
    """

    block: int = 1024
    threads: int = 128
    emit: str = "tree"
    rows: int | None = None
    evict: str = "none"
    group: int | None = None

    def __post_init__(self) -> None:
        for name in ("block", "threads", "rows"):
            value = getattr(self, name)
            if name == "rows" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value & (value - 1):
                raise ValueError(f"{name} is {value!r}, not a power of two")
        if self.group is not None and (type(self.group) is not int or self.group < 1):
            raise ValueError(f"group is {self.group!r}, not a number of pairs")
        for name, known in (("emit", EMITS), ("evict", EVICTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(known)}")

    def describe(self) -> str:
        """In a few words, those that differ from the default after block and threads."""
        words = [f"{self.block} elements", f"{self.threads} threads"]
        if self.emit != "tree":
            words.append(f"{self.emit} bodies")
        if self.rows is not None:
            words.append(f"{self.rows} row{'s' * (self.rows != 1)}")
        if self.evict != "none":
            words.append(f"evict {self.evict}")
        if self.group is not None:
            words.append(f"{self.group} pair{'s' * (self.group != 1)} a launch")
        return ", ".join(words)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KernelConfig:
        """Back from `to_dict`; fields that are not there have their defaults. Raises: ValueError, also for others."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(
                f"unknown field {', '.join(map(repr, unknown))} of a configuration; known: {', '.join(known)}"
            )
        return cls(**values)


DEFAULT_CONFIG = KernelConfig()


def split_launches(
    specs: Sequence[PairSpec | GradSpec], config: KernelConfig, argument_limit: int = ARGUMENT_LIMIT
) -> list[slice]:
    """Return the pairs of each launch of a call: at most `config.group`, with at most `argument_limit` arguments."""
    parts = plan_groups(specs, config.group or max(1, len(specs)), argument_limit=argument_limit)
    return [slice(part[0], part[-1] + 1) for part in parts]
