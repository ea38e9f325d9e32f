"""The problems that are tuned: calls of a fold, forward or backward, without their tensors."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ..errors import UsageError
from ..kernels.spec import GradSpec, PairSpec, tuned_key

Direction = Literal["fold", "fold_backward"]
Specs = tuple[PairSpec, ...] | tuple[GradSpec, ...]
DTYPES = ("float32", "float16", "bfloat16", "autocast_float16", "autocast_bfloat16")


@dataclass(frozen=True)
class Problem:
    """One call: `specs` are its pairs in order, all of one direction."""

    direction: Direction
    specs: Specs

    def __post_init__(self) -> None:
        kind = GradSpec if self.direction == "fold_backward" else PairSpec
        if not self.specs or not all(isinstance(spec, kind) for spec in self.specs):
            raise ValueError(f"a problem of {self.direction} is one or more of {kind.__name__}")

    @cached_property
    def tuned_key(self) -> str:
        """Return the key of the launcher's lookup, such as "fold/fp32/large"."""
        return tuned_key(self.specs)

    @cached_property
    def key(self) -> str:
        """Return a name unique to this problem, such as "fold/fp32/large/0123456789ab"."""
        return f"{self.tuned_key}/{hashlib.sha256(repr(self.specs).encode()).hexdigest()[:12]}"

    @property
    def elements(self) -> int:
        """Return the number of elements of all weights."""
        return sum((spec.pair if isinstance(spec, GradSpec) else spec).numel for spec in self.specs)

    def describe(self) -> str:
        """Return the key, the number of pairs and the number of elements, in words."""
        count = len(self.specs)
        return f"{self.tuned_key}: {count} pair{'s' * (count != 1)}, {self.elements / 1e6:.2f} M elements"


def largest_call_of_each_key(calls: Sequence[Specs]) -> list[Problem]:
    """Return one problem for each tuned key among the calls: the largest call with that key."""
    found: dict[str, Problem] = {}
    for specs in calls:
        problem = Problem("fold_backward" if isinstance(specs[0], GradSpec) else "fold", specs)
        known = found.get(problem.tuned_key)
        if known is None or known.elements < problem.elements:
            found[problem.tuned_key] = problem
    return list(found.values())


def largest_first(problems: Sequence[Problem]) -> list[Problem]:
    """Return each problem once, grouped by key, the largest of each key first."""
    by_key: dict[str, list[Problem]] = {}
    for problem in dict.fromkeys(problems):
        by_key.setdefault(problem.tuned_key, []).append(problem)
    return [problem for same in by_key.values() for problem in sorted(same, key=lambda each: -each.elements)]


def problems_of_model(name: str, dtype: str = "float32") -> list[Problem]:
    """Return the calls, forward and backward, that the pass makes of a model: one problem for each tuned key.

    Runs the model once on the CPU.

    Args:
        name: a name that `models.load` takes, `module:callable` among them.
        dtype: one of DTYPES. "autocast_" leaves parameters and input in float32 and runs under autocast.

    Raises:
        UsageError: for an unknown model or dtype, and if nothing in the model folds.
    """
    if dtype not in DTYPES:
        raise UsageError(f"no dtype {dtype!r}; choose {', '.join(DTYPES)}")
    import torch

    from .. import models
    from ..kernel_view import kernels_of
    from ..options import Options

    model = models.load(name)
    x = models.example_input(model)
    plain = getattr(torch, dtype.removeprefix("autocast_"))
    autocast = dtype.startswith("autocast_")
    if not autocast:
        model, x = model.to(plain), x.to(plain)
    with torch.autocast("cpu", plain if autocast else torch.bfloat16, enabled=autocast):
        views = kernels_of(model, (x,), Options())
    if not views:
        raise UsageError(f"nothing folds in {name!r}; triton-convbn explain says why")
    return largest_call_of_each_key([view.specs for view in views])
