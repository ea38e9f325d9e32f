"""The problems that are tuned, which are calls of a fold without their tensors, and their configurations."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from itertools import groupby, product
from operator import attrgetter

from ..errors import choose
from ..kernels.config import DEFAULT_CONFIG, EMITS, KernelConfig
from ..kernels.kernel_source import KernelSource
from ..kernels.spec import GradSpec, PairSpec
from ..kernels.tuned import kernels_of, tuned_key

Specs = tuple[PairSpec, ...] | tuple[GradSpec, ...]


@dataclass(frozen=True)
class Problem:
    """One call: `specs` are its pairs in order, all forward or all backward."""

    specs: Specs

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

    def sources(self, config: KernelConfig) -> list[tuple[slice, KernelSource]]:
        """Return the kernel of each launch, and the pairs that it serves."""
        return kernels_of(self.specs, config)


def largest_first(problems: Iterable[Problem]) -> list[Problem]:
    """Return each problem once, grouped by key, the largest of each key first."""
    problems = list(dict.fromkeys(problems))
    keys = [problem.tuned_key for problem in problems]
    return sorted(problems, key=lambda problem: (keys.index(problem.tuned_key), -problem.elements))


def problems_of_model(name: str, dtype: str = "float32", shapes: Sequence[str] | None = None) -> list[Problem]:
    """Return the calls, forward and backward, that the pass makes of a model: the largest of each key.

    Runs the model once on the CPU.

    Args:
        name: A name that `models.load` takes, `module:callable` among them.
        dtype: A name of `models.DTYPES`.
        shapes: The shapes of its inputs, see `models.load_with_inputs`.

    Raises:
        UsageError: The model or the dtype is unknown, the model does not run, or nothing in it folds.
    """
    import torch

    from .. import models
    from ..example_inputs import check
    from ..kernel_view import kernels_of_named
    from ..options import Options

    choose("dtype", [dtype], models.DTYPES)
    own, autocast = models.DTYPES[dtype]
    model, inputs = models.load_with_inputs(name, shapes)
    check(name, model, inputs)
    model, inputs = model.to(own), inputs.to(dtype=own)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        views = kernels_of_named(name, model, inputs, Options())
    calls = largest_first(Problem(view.specs) for view in views)
    return [next(same) for _, same in groupby(calls, attrgetter("tuned_key"))]


@dataclass(frozen=True)
class Space:
    """The values of each field of a KernelConfig, in the order of its fields. Neighbours are one step apart.

    Attributes:
        block, threads, emit, rows, pairs_per_launch: See `KernelConfig`.
        evict: One value where nothing is timed, as only a clock can tell what a hint does.
        per_thread: The fewest and the most elements a thread. The default configuration is in every space.
    """

    block: tuple[int, ...]
    threads: tuple[int, ...]
    emit: tuple[str, ...] = ("tree",)
    rows: tuple[int | None, ...] = (None,)
    evict: tuple[str, ...] = ("none",)
    pairs_per_launch: tuple[int | None, ...] = (None,)
    per_thread: tuple[int, int] = (2, 32)


@lru_cache(maxsize=256)
def configurations(space: Space, problem: Problem) -> tuple[KernelConfig, ...]:
    """Return the configurations worth trying: the default first, then in the order of the fields.

    If several generate the same kernels, only the first of them is returned.
    """
    least, most = space.per_thread
    every = [KernelConfig(*values) for values in product(*astuple(space)[:-1])]
    wanted = [config for config in every if least <= config.block / config.threads <= most]
    found: dict[tuple[str, ...], KernelConfig] = {}
    for config in (DEFAULT_CONFIG, *wanted):
        found.setdefault(tuple(source.digest for _, source in problem.sources(config)), config)
    return tuple(found.values())


def neighbours(space: Space, problem: Problem, config: KernelConfig) -> list[KernelConfig]:
    """Return the configurations one step away in one field, or in block and threads together."""
    found = []
    for other in configurations(space, problem):
        pairs = zip(astuple(space)[:-1], astuple(config), astuple(other), strict=True)
        steps = [abs(values.index(one) - values.index(another)) for values, one, another in pairs]
        if sum(steps) == 1 or (steps[:2] == [1, 1] and not any(steps[2:])):
            found.append(other)
    return found


QUICK = Space(block=(512, 1024, 2048), threads=(64, 128, 256), emit=EMITS, per_thread=(4, 16))
FULL = Space(
    block=(256, 512, 1024, 2048, 4096),
    threads=(64, 128, 256, 512),
    emit=EMITS,
    rows=(None, 1, 4),
    pairs_per_launch=(None, 8, 4),
)
