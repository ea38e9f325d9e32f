"""What is tuned: one call of a fold, forward or backward, described without its tensors."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ..kernels.spec import GradSpec, Needs, PairSpec, tuned_key

Direction = Literal["fold", "fold_backward"]
Specs = tuple[PairSpec, ...] | tuple[GradSpec, ...]


@dataclass(frozen=True)
class Problem:
    """One call: `specs` are its pairs in order, of one direction."""

    direction: Direction
    specs: Specs

    def __post_init__(self) -> None:
        kind = GradSpec if self.direction == "fold_backward" else PairSpec
        if not self.specs or not all(isinstance(spec, kind) for spec in self.specs):
            raise ValueError(f"a problem of {self.direction} is one or more of {kind.__name__}")

    @cached_property
    def tuned_key(self) -> str:
        """What the launcher looks the winner up by: "fold/fp32/large"."""
        return tuned_key(self.specs)

    @cached_property
    def key(self) -> str:
        """Names this problem and no other, on every machine: "fold/fp32/large/0123456789ab"."""
        return f"{self.tuned_key}/{hashlib.sha256(repr(self.specs).encode()).hexdigest()[:12]}"

    @property
    def pairs(self) -> tuple[PairSpec, ...]:
        return tuple(spec.pair if isinstance(spec, GradSpec) else spec for spec in self.specs)

    def describe(self) -> str:
        pairs = self.pairs
        elements = sum(pair.numel for pair in pairs)
        return f"{self.tuned_key}: {len(pairs)} pair{'s' * (len(pairs) != 1)}, {elements / 1e6:.2f} M elements"


def problems_of_calls(calls: Sequence[Specs]) -> list[Problem]:
    """One problem for each tuned key among the calls, its largest call; in the order of the keys' first calls."""
    found: dict[str, Problem] = {}
    for specs in calls:
        direction: Direction = "fold_backward" if isinstance(specs[0], GradSpec) else "fold"
        problem = Problem(direction, specs)
        known = found.get(problem.tuned_key)
        if known is None or _elements(known) < _elements(problem):
            found[problem.tuned_key] = problem
    return list(found.values())


def _elements(problem: Problem) -> int:
    return sum(pair.numel for pair in problem.pairs)


def backward_of(pair: PairSpec) -> GradSpec:
    """The backward of a training step in which everything trains, gradients like the fold's outputs."""
    needs = Needs(True, pair.bias is not None, pair.bn_weight is not None, pair.bn_bias is not None)
    return GradSpec(pair, pair.out, pair.out, pair.out_last, needs)
