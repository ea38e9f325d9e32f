"""Plants one bug at a time into the package, and shows that the fuzz finds it: python tests/fuzz/plant.py

A bug is a patch of the running package, and of a name that has to be there. Prints a line for each bug; the exit code
is 1 where one is not found within 1,000 examples.
"""

import contextlib
import dataclasses
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from property import Invalid, check
from strategies import examples

from triton_convbn.graph import match
from triton_convbn.graph.dialects import aten, functions
from triton_convbn.graph.mutation import Mutations
from triton_convbn.ops import reference


class Bug(NamedTuple):
    """where: the module or class whose attribute is replaced. make: from the right one, the wrong one."""

    name: str
    where: tuple[Any, ...]
    attribute: str
    make: Callable[[Any], Any]


def _without(*names: str) -> Callable[[Any], Any]:
    """`bind` that forgets arguments given by keyword."""

    def make(bind: Any) -> Any:
        def forgets(node: Any, signature: Any) -> Any:
            bound = bind(node, signature)
            if bound is None:
                return None
            defaults = dict(signature)
            return bound | {n: defaults[n] for n in names if n in node.kwargs and n in defaults}

        return forgets

    return make


def _swapped(per_weight: Any) -> Any:
    """The channels of a transposed weight, taken group by group in the wrong order, or from the wrong dimension."""

    def swaps(scale: Any, weight: Any, transposed: bool, groups: int) -> Any:
        if transposed and groups == 1 and weight.shape[0] == weight.shape[1]:
            return scale.reshape(-1, 1, *(1,) * (weight.ndim - 2))
        if transposed and groups > 1:
            scale = scale.reshape(groups, -1).flip(0).flatten()
        return per_weight(scale, weight, transposed, groups)

    return swaps


def _eps_of(bn_call: Any) -> Any:
    def forgets(node: Any, bound: Any, **keywords: Any) -> Any:
        found = bn_call(node, bound, **keywords)
        return found if found is None else dataclasses.replace(found, eps=1e-5)

    return forgets


def _nothing(_right: Any) -> Any:
    return lambda *_args: None


BUGS = [
    Bug("drop the mutation check", (Mutations,), "obstacle", _nothing),
    Bug("drop the check of later writes", (Mutations,), "written_after", _nothing),
    Bug("drop the rank check", (match,), "_rank", _nothing),
    Bug("swap the transposed channel map", (reference,), "_per_weight", _swapped),
    Bug("drop a keyword of the convolution", (functions, aten), "bind", _without("bias")),
    Bug("drop a keyword of the BatchNorm", (functions, aten), "bind", _without("weight")),
    Bug("drop eps", (functions, aten), "batch_norm_call", _eps_of),
    Bug("fold training BatchNorms", (match,), "_unfit", lambda _right: lambda _bn: iter(())),
]


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The package with the bug in it."""
    patches = [mock.patch.object(w, bug.attribute, bug.make(getattr(w, bug.attribute))) for w in bug.where]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def hunt(bug: Bug | None, limit: int, seed: int = 0) -> int | None:
    """How many examples it takes to find the bug; None where `limit` do not. Without a bug the same examples find
    nothing, or what they find is no planted bug."""
    count = 0

    @seeded(seed)
    @settings(
        max_examples=limit,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(examples())
    def fuzz(example: Any) -> None:
        nonlocal count
        program, dialect, host, options = example
        count += 1
        with contextlib.suppress(Invalid):
            check(program, dialect, host, **options)

    with planted(bug) if bug is not None else contextlib.nullcontext():
        try:
            fuzz()
        except Exception:  # a planted bug may raise anything, on the way or in the check
            return count
    return None


def main(limit: int = 1000) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seed, missed = random.randrange(2**32), 0
    if found := hunt(None, limit, seed):
        print(f"without a bug example {found} fails (seed {seed}): what would be found below says nothing")
        return 1
    for bug in BUGS:
        start = time.perf_counter()
        found = hunt(bug, limit, seed)
        missed += found is None
        what = f"found by example {found}" if found else f"not found in {limit}"
        print(f"{bug.name}: {what} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{len(BUGS) - missed} of {len(BUGS)} planted bugs are found within {limit} examples, seed {seed}")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
