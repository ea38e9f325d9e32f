"""Plant one bug at a time into the package, and show that the fuzz finds it: python tests/fuzz/plant.py

A bug is a patch of the running package, of a name that has to exist. Prints a line for each bug. The exit code is 1 if
one is not found within its number of examples.
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

from triton_convbn.graph import branches as graph_branches
from triton_convbn.graph import channels, fit, input_norms, match, merge, mutation, rewrite, twins
from triton_convbn.graph.dialects import aten, functions
from triton_convbn.graph.mutation import Mutations
from triton_convbn.ops import (
    activation,
    autograd,
    branch_runs,
    branch_terms,
    input_norm,
    merge_in_place,
    merge_reference,
    merge_together,
    reference,
    registration,
    strides,
)

KINDS = {"": 600, "sums": 350, "input norms": 350, "moves": 350, "layers": 350}
"""What is drawn, see `examples`, and the number of examples within which the fuzz has to find a bug of it."""


class Bug(NamedTuple):
    """A bug.

    Attributes:
        name: What it does.
        where: The modules or classes whose attribute is replaced.
        attribute: Its name.
        make: Makes the wrong attribute from the right one.
        limit: The number of examples within which the fuzz has to find it, if not that of `KINDS`.
        only: Draw only graphs that Dynamo captures, only sums, only BatchNorms before a convolution, only calls that
            move elements, or only layers with activations, because no others can show it. See `examples`.
        rare: A test has no time for as many examples as it takes. `make fuzz-planted` hunts it.
    """

    name: str
    where: tuple[Any, ...]
    attribute: str
    make: Callable[[Any], Any]
    limit: int | None = None
    only: str = ""
    rare: bool = False


def _without(*names: str) -> Callable[[Any], Any]:
    """Make a `bind` that forgets these arguments if they are keywords."""

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
    """Read the channels of a transposed weight group by group in the wrong order, or from the wrong dimension."""

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


def _unversioned(_setup: Any) -> Any:
    """Save tensors of which autograd does not see later writes."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.rest, ctx.conv, ctx.kernel = inputs
        ctx.save_for_backward(*[None if each is None else each.data for each in tensors])

    return staticmethod(setup_context)


def _folds_once(scale_and_shift: Any) -> Any:
    """Keep the scale and shift of the same tensors, as if their values never changed."""
    kept: dict[Any, Any] = {}

    def folds(*tensors: Any, **keywords: Any) -> Any:
        key = tuple(map(id, tensors))
        if key not in kept:
            kept[key] = scale_and_shift(*tensors, **keywords), tensors  # held, so that no other gets their ids
        return kept[key][0]

    return folds


def _constant(value: Any) -> Callable[[Any], Any]:
    """Replace a function by one that always returns the value."""
    return lambda _right: lambda *_args: value


def _at_a_corner(_right: Any) -> Any:
    """Embed a smaller kernel at the first element of the largest."""

    def margins(size: Any, kernel: Any) -> list[int]:
        return [each for k, n in zip(reversed(kernel), reversed(size), strict=True) for each in (0, k - n)]

    return margins


def _cropped_at_a_corner(_right: Any) -> Any:
    """Add a smaller kernel to the first elements of the largest."""
    return lambda merged, weight: merged[tuple(slice(0, size) for size in weight.shape)]


def _other_channel(diagonal: Any) -> Any:
    """Let the identity read the next input channel of its group."""
    return lambda identity, weight, groups: diagonal(identity, weight, groups).roll(1, 1)


def _unshifted(shift: Any) -> Any:
    """Leave the first BatchNorm out of the bias."""

    def leaves_out(vectors: Any) -> Any:
        vectors.shifts = [0 * each if index == 0 else each for index, each in enumerate(vectors.shifts)]
        return shift(vectors)

    return leaves_out


def _ones(_right: Any) -> Any:
    return lambda _run, _factor, like: like.new_ones(like.shape[-1])


def _rolled(merge: Any) -> Any:
    return lambda *arguments: merge(*arguments).roll(1, 0)


def _unsigned(read_sum: Any) -> Any:
    def forgets(node: Any) -> Any:
        found = read_sum(node)
        return found and dataclasses.replace(found, terms=tuple((1, term) for _, term in found.terms))

    return forgets


def _twice(multiplied: Any) -> Any:
    def multiplies(matcher: Any, call: Any) -> Any:
        found = multiplied(matcher, call)
        return found and dataclasses.replace(found, expression=("factor", found.expression, found.expression[2]))

    return multiplies


def _of_the_first_group(per_weight: Any) -> Any:
    """Let every group read the input channels of the first."""

    def reads(vector: Any, weight: Any, by_input: bool = False, groups: int = 1) -> Any:
        return per_weight(vector[: weight.shape[1]].repeat(groups) if by_input else vector, weight, by_input, groups)

    return reads


def _without_shift(scale_and_shift: Any) -> Any:
    """Leave the shift of the BatchNorm out of the bias."""

    def leaves_out(norm: Any, wide: Any) -> Any:
        inverse, scale, shift = scale_and_shift(norm, wide)
        return inverse, scale, shift * 0

    return leaves_out


def _as_it_is(_right: Any) -> Any:
    return lambda _graph, _output, _source, last, *_more, **_keywords: last


def _unmoved(_right: Any) -> Any:
    return lambda call, dim, graph: dim


def _without_next_mean(compose: Any) -> Any:
    def drops(weight: Any, bias: Any, next_weight: Any, next_bias: Any, mean: Any, var: Any, eps: Any) -> Any:
        return compose(weight, bias, next_weight, next_bias, mean * 0, var, eps)

    return drops


BUGS = [
    Bug("drop the mutation check", (Mutations,), "obstacle", _constant(None)),
    Bug("drop the check of writes after the pair", (Mutations,), "written_after", _constant(None), 5000, rare=True),
    Bug("drop the rank check", (match,), "rank_obstacle", _constant(None), 1000),
    Bug("swap the transposed channel map", (reference,), "per_weight", _swapped),
    Bug("drop a keyword of the convolution", (functions, aten), "bind", _without("bias")),
    Bug("drop a keyword of the BatchNorm", (functions, aten), "bind", _without("weight")),
    Bug("drop eps", (functions, aten), "batch_norm_call", _eps_of),
    Bug("fold training BatchNorms", (match,), "unfit", _constant(None)),
    Bug("fold tensor subclasses", (fit,), "is_subclass", _constant(False)),
    Bug(
        "drop the tangents of a transform", (registration, autograd, strides), "needs_plain_autograd", _constant(False)
    ),
    Bug(
        "drop the check of writes in a function",
        (mutation,),
        "_body_writes",
        _constant([]),
        5000,
        only="captured",
        rare=True,
    ),
    Bug("ignore writes before the backward", (autograd._ConvWithFold,), "setup_context", _unversioned),
    Bug("keep a fold for the next call", (reference,), "scale_and_shift", _folds_once),
    Bug("embed a kernel at a corner", (merge_reference,), "_margins", _at_a_corner, only="sums"),
    Bug("crop the merged kernel at a corner", (merge_in_place,), "cropped", _cropped_at_a_corner, only="sums"),
    Bug("move the identity to another channel", (merge_reference,), "_diagonal", _other_channel, only="sums"),
    Bug("leave a branch out of the bias", (branch_terms.Vectors,), "shift", _unshifted, only="sums"),
    Bug("multiply every BatchNorm of a sum by 1", (branch_runs.Run,), "_multipliers", _ones, 1000, "sums"),
    Bug("give weights that merge together to other sums", (merge_together,), "merge", _rolled, 1000, "layers"),
    Bug("drop the sign of a term", (graph_branches,), "read_sum", _unsigned, only="sums"),
    Bug("apply a factor twice", (graph_branches._Matcher,), "_multiplied", _twice, only="sums"),
    Bug(
        "drop the check of writes in a sum",
        (graph_branches._Matcher,),
        "_check_writes",
        _constant(None),
        5000,
        only="sums",
        rare=True,
    ),
    Bug("leave a sum the strides of its convolution", (merge,), "restore_strides", _as_it_is, 5000, "sums", rare=True),
    Bug("read the channels of another group", (input_norm,), "per_weight", _of_the_first_group, only="input norms"),
    Bug("leave the shift out of the bias", (input_norm,), "_scale_and_shift", _without_shift, only="input norms"),
    Bug("leave the channels where they were", (channels,), "_after_view", _unmoved, only="moves"),
    Bug("leave a view in place of a BatchNorm", (rewrite,), "restore_strides", _as_it_is, 5000, "moves", rare=True),
    Bug("drop the next BatchNorm's mean", (reference,), "compose", _without_next_mean, only="moves"),
    Bug("take other BatchNorms for the same", (twins,), "_is_same", _constant(True), only="moves"),
    Bug("take every saved tensor for the activation's output", (activation,), "_facts", _constant(0), only="layers"),
    Bug("ignore the padding", (input_norms,), "padding_obstacle", _constant(None), only="input norms"),
    Bug("ignore the rank of the input", (input_norms,), "_rank", _constant(None), only="input norms"),
]


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """Run the block with the bug in the package."""
    patches = [mock.patch.object(w, bug.attribute, bug.make(getattr(w, bug.attribute))) for w in bug.where]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def hunt(bug: Bug, seed: int = 0) -> int | None:
    """Return the number of the example that finds the bug, or None if it is not found within its limit.

    Raises:
        Exception: What the example raises without the bug, if it does: then it has found something else.
    """
    count = 0
    last: Any = None

    def passes(example: Any) -> None:
        program, dialect, host, options = example
        with contextlib.suppress(Invalid):
            check(program, dialect, host, **options)

    @seeded(seed)
    @settings(
        max_examples=bug.limit or KINDS[bug.only],
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(examples(bug.only))
    def fuzz(example: Any) -> None:
        nonlocal count, last
        count, last = count + 1, example
        passes(example)

    with planted(bug):
        try:
            fuzz()
        except Exception:  # a planted bug may raise anything
            pass
        else:
            return None
    passes(last)
    return count


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seed, missed = random.randrange(2**32), 0
    for bug in BUGS:
        start = time.perf_counter()
        found = hunt(bug, seed)
        missed += found is None
        what = f"found by example {found}" if found else "not found"
        print(f"{bug.name}: {what} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{len(BUGS) - missed} of {len(BUGS)} planted bugs are found, seed {seed}")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
