"""The configuration of a generated kernel, and the split of a call into launches. Neither changes the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .spec import ARGUMENT_LIMIT, GradSpec, PairSpec

EMITS = ("tree", "shared")
EVICTS = ("none", "loads", "loads+stores")


@dataclass(frozen=True)
class KernelConfig:
    """Options of the generators. The default applies if nothing was tuned.

    Attributes:
        block, threads: Elements and threads of a program. By default 128 threads (4 warps of 32, 2 wavefronts of 64)
            have 8 elements each: one 16-byte load of a 16-bit weight, two of an fp32 one. Wider dtypes get fewer
            elements.
        emit: "tree" has one body for each pair. "shared" has one body for all pairs with equal specs and selects their
            pointers: less code, more registers.
        rows: The maximum number of channels that a program of the backward holds. None: as many as fill `block`.
        evict: The accesses to large tensors that use the evict-first policy: "none", "loads", or "loads+stores", which
            adds the stores of the backward. Stores of the forward never do: the convolution reads them next.
        pairs_per_launch: The maximum number of pairs in one launch. None: no limit. Only `split_launches` reads it.
    """

    block: int = 1024
    threads: int = 128
    emit: str = "tree"
    rows: int | None = None
    evict: str = "none"
    pairs_per_launch: int | None = None

    def __post_init__(self) -> None:
        for name in ("block", "threads", "rows"):
            value = getattr(self, name)
            if name == "rows" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value & (value - 1):
                raise ValueError(f"{name} is {value!r}, not a power of two")
        pairs = self.pairs_per_launch
        if pairs is not None and (type(pairs) is not int or pairs < 1):
            raise ValueError(f"pairs_per_launch is {pairs!r}, not a number of pairs")
        for name, known in (("emit", EMITS), ("evict", EVICTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(known)}")

    def describe(self) -> str:
        """Return block and threads, and the other values that are not the default."""
        words = [f"{self.block} elements", f"{self.threads} threads"]
        if self.emit != "tree":
            words.append(f"{self.emit} bodies")
        if self.rows is not None:
            words.append(f"{self.rows} row{'s' * (self.rows != 1)}")
        if self.evict != "none":
            words.append(f"evict {self.evict}")
        if self.pairs_per_launch is not None:
            words.append(f"{self.pairs_per_launch} pair{'s' * (self.pairs_per_launch != 1)} a launch")
        return ", ".join(words)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KernelConfig:
        """Return the inverse of `asdict`. Missing fields get their defaults. Raise ValueError for bad ones."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(
                f"unknown field {', '.join(map(repr, unknown))} of a configuration; known: {', '.join(known)}"
            )
        return cls(**values)


DEFAULT_CONFIG = KernelConfig()


def plan_groups(
    specs: Sequence[PairSpec | GradSpec],
    max_pairs: int,
    byte_budget: int | None = None,
    argument_limit: int = ARGUMENT_LIMIT,
) -> list[list[int]]:
    """Split pairs into launches, in order.

    A pair that exceeds a limit by itself gets a launch of its own.

    Args:
        specs: The pairs.
        max_pairs: The maximum number of pairs in a launch.
        byte_budget: The maximum number of bytes that one launch writes, and so allocates at once.
        argument_limit: The maximum number of arguments of a kernel.

    Returns:
        The indices of the pairs of each launch.
    """
    if max_pairs < 1:
        raise ValueError(f"max_pairs is {max_pairs}")
    groups: list[list[int]] = []
    arguments = written = 0
    for index, spec in enumerate(specs):
        full = (
            not groups
            or len(groups[-1]) == max_pairs
            or arguments + spec.arguments > argument_limit
            or (byte_budget is not None and written + spec.written_bytes > byte_budget)
        )
        if full:
            groups.append([])
            arguments = written = 0
        groups[-1].append(index)
        arguments += spec.arguments
        written += spec.written_bytes
    return groups


def split_launches(
    specs: Sequence[PairSpec | GradSpec], config: KernelConfig, argument_limit: int = ARGUMENT_LIMIT
) -> list[slice]:
    """Split a call into launches of at most `config.pairs_per_launch` pairs and `argument_limit` arguments."""
    parts = plan_groups(specs, config.pairs_per_launch or max(1, len(specs)), argument_limit=argument_limit)
    return [slice(part[0], part[-1] + 1) for part in parts]
