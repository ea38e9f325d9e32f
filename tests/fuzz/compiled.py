"""Check the property under torch.compile: with the pass, a program does what it does when compiled without it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from comparison import compare, finite
from functorch.compile import min_cut_rematerialization_partition
from programs import Program
from property import Invalid, counts, graphs
from render import functions
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from uses import Outcome, outcome

from triton_convbn import ConvBNPass, patched


def aot_eager(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Run AOTAutograd with the partitioner that Inductor uses, without code generation."""
    nothing: Any = lambda graph, _inputs: graph.forward  # noqa: E731
    return aot_autograd(fw_compiler=nothing, partition_fn=min_cut_rematerialization_partition)(gm, inputs)


def folded(backend: Callable[..., Any], seen: list[str], **options: Any) -> Callable[..., Any]:
    """Return the backend behind the pass. `seen` gets the code of the rewritten graphs."""

    def with_pass(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        for each in graphs(gm):
            ConvBNPass(**{"when": "always"} | options)(each.graph)
            each.recompile()
            seen.append(each.code)
        return backend(gm, inputs)

    return with_pass


def check(program: Program, inductor: bool = False, **options: Any) -> int:
    """Check the property for one program. Return the number of folded pairs.

    Raises:
        AssertionError: the property does not hold.
        Invalid: the program does not compile without the pass, or its results are not finite.
    """

    def run(backend: Any, program: Program = program) -> Outcome:
        torch._dynamo.reset()
        call = torch.compile(functions(program, examples=False).gm, backend=backend)

        def on(given: dict[str, Tensor]) -> tuple[Any, ...]:
            returned = call(*given.values())
            return returned if isinstance(returned, tuple) else (returned,)

        return outcome(on, program)

    plain = "inductor" if inductor else aot_eager
    try:
        want = run(plain)
        unwritten = run(plain, replace(program, later=())) if program.later else None
        meaningful = finite(want)
    except Exception as error:
        raise Invalid(str(error)) from error
    if not meaningful:
        raise Invalid("not finite")
    before, code = counts(), list[str]()
    if inductor:
        with patched(**{"when": "always"} | options):
            found = run("inductor")
    else:
        found = run(folded(aot_eager, code, **options))
    wrong = compare(found, want, program, unwritten)
    assert not wrong, "\n".join([*wrong, repr(program), *code])
    return Counter(counts() - before)["folded"]
