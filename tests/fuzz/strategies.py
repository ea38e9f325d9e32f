"""Draw examples: a program, the dialect it is written in, who calls the pass, and with which options."""

from collections.abc import Callable
from typing import Any

import input_norms
import moves
import noise
import patterns
import sums
from builder import Builder
from hypothesis import strategies as st
from programs import Block, Call, Later, Norm, P, Program, Step, V
from spelling import perform
from subclasses import SUBCLASSES
from torch import Tensor
from uses import TRANSFORMS, reset_modes

HOSTS = ("by hand", "compiling", "kernels")
"""Who calls the pass: the user, a compiler, or the user for a device on which the generated kernels run."""

DIALECTS = (
    *("functions",) * 10,
    *("functions without examples", "modules without shapes"),
    *("modules",) * 6,
    *("aten", "aten of fakes", "aten after dispatch") * 2,
    *("decomposed", "decomposed, functional"),
)
"""As often as each is drawn. Those that take 30 ms instead of 10 are drawn less often."""

OPTIONS = (
    {},
    {"recompute": False},
    {"when": "always"},
    {"pairs_per_launch": 2},
    {"codegen": False},
    {"codegen": False},
    {"codegen": False, "when": "always"},
)

Example = tuple[Program, str, str, dict[str, Any]]


@st.composite
def examples(draw: Callable[..., Any], only: str = "") -> Example:
    """Return one example. One in sixteen is captured by Dynamo, which takes ten times as long.

    only: ``"captured"`` if all examples are captured. ``"sums"``, ``"input norms"``, ``"moves"`` or ``"layers"`` if
        they have nothing but sums of branches, BatchNorms before a convolution, calls that move elements before
        BatchNorms, or layers with activations.
    """
    choose = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    if only in ALONE:
        return draw(programs(alone=only)), choose("functions", "modules", "aten"), "by hand", choose(*OPTIONS)
    if only == "captured" or draw(st.integers(0, 15)) == 15:
        return draw(programs(blocks=True)), "captured", choose(*HOSTS), choose(*OPTIONS) | {"when": "always"}
    dialect = choose(*DIALECTS)
    program = draw(programs(use=choose(*("backward",) * 3, "later", "transform")))
    return program, dialect, choose(*HOSTS), choose(*OPTIONS)


@st.composite
def programs(draw: Callable[..., Any], use: str = "backward", blocks: bool = False, alone: str = "") -> Program:
    """Return one program.

    Args:
        draw: hypothesis's.
        use: ``"backward"``; ``"later"``, with writes between forward and backward; or ``"transform"``.
        blocks: Put pairs into functions that are called through something else, and draw writes as for ``"later"``.
        alone: A name of `ALONE`: draw such steps and nothing else.
    """
    dtype = draw(st.sampled_from(("float64",) * 6 + ("float32", "float32", "bfloat16", "float16")))
    mixed = dtype in ("bfloat16", "float16") and draw(st.booleans())
    subclass = draw(st.sampled_from(("",) * 24 + tuple(SUBCLASSES) + ("quantized",) * 2))
    builder = Builder(draw, dtype, mixed, subclass, blocks, bias_alone=use != "transform" and not blocks)
    # The last example may have ended inside a mode, as it was drawn or as it was checked. Under autocast the same
    # choices make other dtypes.
    reset_modes()
    try:
        return _program(builder, use, (ALONE[alone],) if alone else STEPS)
    finally:
        while builder.open:
            perform(builder.open.pop(), builder.values.__getitem__)


STEPS = (
    *(patterns.pair,) * 4,
    *(patterns.frozen, patterns.concatenated, patterns.flattened),
    *(moves.moved, moves.several, moves.parts, patterns.layers),
    *(sums.summed,) * 4,
    *(input_norms.normed,) * 2,
    noise.add,
)
"""As often as each is drawn."""

ALONE = {
    "sums": sums.summed,
    "input norms": input_norms.normed,
    "moves": moves.any_of_them,
    "layers": patterns.layers,
}


def _program(b: Builder, use: str, steps: tuple[Any, ...]) -> Program:
    size = lambda: b.one_of(2, 3, 4)  # noqa: E731
    rank = b.one_of(4, 4, 4, 2, 3, 3, 5)
    shape = tuple(size() for _ in range(rank))
    b.activations.append(b.tensor("x", shape, b.dtype, trains=b.chance(2)))
    if not b.chance(2):  # a tensor of the graph's own, which can be written to
        b.keep(b.emit(Call("torch.mul", (b.activations[0], 1.5))))
    if b.dtype == "float32" and b.chance(2):
        noise.autocast(b)
    for _ in range(b.one_of(1, 2) if b.blocks else b.one_of(1, 2, 3, 4)):
        add = b.one_of(*steps)
        if b.blocks and not b.chance(6):
            noise.in_block(b, lambda add=add: add(b))  # type: ignore[misc]
        else:
            add(b)
    while b.open:
        b.emit(b.open.pop())
    floating = [
        made
        for made, value in b.values.items()
        if isinstance(made, V) and isinstance(value, Tensor) and value.is_floating_point()
    ]
    if not floating:
        floating = [b.emit(Call("torch.tanh", (b.activations[0],)))]  # type: ignore[list-item]
    last = floating[-1]
    others = [made for made in floating[:-1] if b.chance(6)][:3]
    return Program(
        dict(b.tensors),
        tuple(b.steps),
        (*others, last),
        b.draw(st.integers(0, 99)),
        b.one_of(*TRANSFORMS) if use == "transform" else "backward",
        _later(b) if use == "later" or (b.blocks and b.chance(4)) else (),
    )


def _later(b: Builder) -> tuple[Later, ...]:
    """Return one or two writes between forward and backward.

    A write through ``.data`` goes to a BatchNorm's own tensors, in a program with one BatchNorm. Elsewhere its effect
    on gradients is not defined: eager computes from what it has saved, a fold from what it reads again.
    """
    if b.chance(4) and (own := _of_the_only_norm(b.steps)):
        return (Later(b.one_of(*own), b.one_of("data", "assigned data")),)
    kinds = ("add_", "mul_", "copy_", "view", "detach", "foreach", "setitem")
    return tuple(Later(b.one_of(*b.tensors), b.one_of(*kinds)) for _ in range(b.one_of(1, 1, 2)))


def _of_the_only_norm(steps: list[Step]) -> list[str]:
    """Return the names of the BatchNorm's tensors if there is exactly one, and no other arithmetic or function."""
    norms = [step for step in steps if isinstance(step, Norm)]
    others = [
        step for step in steps if isinstance(step, Block) or (isinstance(step, Call) and step.function == ".rsqrt")
    ]
    if len(norms) != 1 or others:
        return []
    return [each.name for each in (norms[0].mean, norms[0].var, norms[0].weight, norms[0].bias) if isinstance(each, P)]
