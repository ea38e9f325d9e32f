"""The property under torch.compile: with the pass, a program does what it does when compiled without it."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import min_cut_rematerialization_partition
from programs import Program
from property import TOLERANCES, Invalid, counts, differences, finite, outcome
from render import functions
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

from triton_convbn import ConvBNPass, patched


def aot_eager(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """AOTAutograd with the partitioner that Inductor uses, and no code generation."""
    nothing: Any = lambda graph, _inputs: graph.forward  # noqa: E731
    return aot_autograd(fw_compiler=nothing, partition_fn=min_cut_rematerialization_partition)(gm, inputs)


def folded(backend: Callable[..., Any], seen: list[str], **options: Any) -> Callable[..., Any]:
    """The backend, given graphs that are rewritten, of which `seen` gets the code."""

    def with_pass(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        ConvBNPass(**{"when": "always"} | options)(gm.graph)
        gm.recompile()
        seen.append(gm.code)
        return backend(gm, inputs)

    return with_pass


def check(program: Program, inductor: bool = False, **options: Any) -> int:
    """How many pairs were folded. Raises: AssertionError; Invalid, where it does not compile without the pass."""

    def run(backend: Any) -> Any:
        torch._dynamo.reset()
        call = torch.compile(functions(program, examples=False).gm, backend=backend)

        def on(given: dict[str, Tensor]) -> tuple[Any, ...]:
            returned = call(*given.values())
            return returned if isinstance(returned, tuple) else (returned,)

        return outcome(on, program)

    try:
        want = run("inductor" if inductor else aot_eager)
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
    wrong = differences(found, want, TOLERANCES)
    assert not wrong, "\n".join([*wrong, repr(program), *code])
    return Counter(counts() - before)["folded"]
