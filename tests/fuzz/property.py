"""The property: the rewritten graph equals the graph that the pass was given, or is that graph. The pass never raises.

Equal are outputs, results of transforms, gradients, and what the tensors hold afterwards. The graph runs in eager mode,
without code generation, so that an example takes milliseconds.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

from comparison import compare, draws_random_numbers, finite, has_gradients, is_narrow, other_strides
from programs import Block, Call, Program
from render import Rendered, aten, captured, decomposed, exported, functions
from render_modules import modules
from torch import fx
from torch._guards import TracingContext, tracing
from uses import outcome, reset_modes

from triton_convbn import ConvBNPass
from triton_convbn.dispatch import planned_for
from triton_convbn.graph import branch_groups
from triton_convbn.graph.findings import norms_of
from triton_convbn.graph.profitability import select
from triton_convbn.graph.reasons import Reason

# Read at the first convolution, see conftest.py. For the scripts beside this file, which have no conftest.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

DIALECTS: dict[str, Callable[[Program], Rendered]] = {
    "functions": functions,
    "functions without examples": lambda program: functions(program, examples=False),
    "modules": modules,
    "modules without shapes": lambda program: modules(program, shapes=False),
    "captured": captured,
    "aten": aten,
    "aten of fakes": lambda program: aten(program, "fake"),
    "aten after dispatch": lambda program: aten(program, pre_dispatch=False),
    "decomposed": decomposed,
    "decomposed, functional": lambda program: decomposed(program, functional=True),
    "exported": lambda program: exported(program, decompose=False),
    "exported, decomposed": lambda program: exported(program, decompose=True),
}


KNOW_STRIDES = "functions", "modules", "captured"
"""Those whose strides are known, and are those of a run. A compiler goes by the fake tensors' strides."""


class Invalid(Exception):
    """The program tests nothing: it does not run as it is, or its results are not finite."""


def check(
    program: Program, dialect: str, host: str = "by hand", seen: Counter[str] | None = None, **options: Any
) -> int:
    """Check the property for one program. Return the number of folded BatchNorms and merged sums.

    Raises:
        AssertionError: the property does not hold.
        Invalid: the program tests nothing.
    """
    if _writes_unseen(program):
        raise Invalid("torch.func does not see a write")
    if program.use.startswith("vmap") and any("_enter_autocast" in str(step) for step in program.steps):
        raise Invalid("autocast does not reach into a vmap of the graph, for which it was not captured")
    reset_modes()
    backward = has_gradients(program)
    try:
        rendered = DIALECTS[dialect](program)
        want = outcome(rendered.run, program, backward)
        unwritten = outcome(rendered.run, replace(program, later=()), backward) if program.later else None
        meaningful = finite(want)
    except Exception as error:
        raise Invalid(str(error)) from error
    if not meaningful:
        raise Invalid("not finite")
    before = text(rendered.gm)
    folded = rewrite(rendered.gm, host, seen, options)
    if not folded:
        same = text(rendered.gm) == before
        # The convolutions of pairs that are not profitable read their weights with their own strides.
        assert same or "preserve_strides" in text(rendered.gm), "nothing folds, but the graph has changed"
        if same:
            return 0
    if program.later and any(isinstance(step, Block) and step.how == "scan" for step in program.every_step()):
        raise Invalid("scan does not see a write before its backward, as documented")
    if "input_norm" in text(rendered.gm) and any("data" in write.how for write in program.later):
        raise Invalid("a fold of the input computes it again from what was written through .data, as documented")
    found = outcome(rendered.run, program, backward)
    if dialect.startswith("aten") and found.outputs.keys() != want.outputs.keys() and found.names() == want.names():
        raise Invalid("a parameter is of a subclass, which the graph does not say, and an output is too, as documented")
    wrong = compare(found, want, program, unwritten)
    if host != "compiling" and dialect in KNOW_STRIDES:
        wrong += other_strides(found, want)
    if wrong and is_narrow(program) and draws_random_numbers(program):
        # How much the program amplifies rounding is unknown: in fp64 it draws other numbers. It has to hold there.
        check(program.in_fp64(), dialect, host, **options)
        return folded
    assert not wrong, "\n".join([*wrong, before, text(rendered.gm)])
    return folded


def graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """Return the graph and the graphs inside it."""
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]


def text(gm: fx.GraphModule) -> str:
    return "\n".join(str(each.graph) for each in graphs(gm))


def rewrite(gm: fx.GraphModule, host: str, seen: Counter[str] | None, options: dict[str, Any]) -> int:
    """Run the pass twice on the graph and those inside it. Check its counts. Return how many fold or merge."""
    convbn = ConvBNPass(**options)
    expected, reported = Counter[str](), Counter[str]()
    # Beside inputs of some 100 elements hardly a weight is small, and none would be merged with others.
    with _as(host), mock.patch.object(branch_groups, "SMALL", 100.0):
        for each in graphs(gm):
            findings = select(each.graph, convbn.options)
            expected["folded"] += len(norms_of(findings.pairs)) + sum(len(branch.norms) for branch in findings.sums)
            expected["folded"] += len(findings.input_norms)
            expected["folded_forward"] += len(findings.input_norms)
            expected["merged"] += len(findings.sums)
            expected.update(f"not_merged:{decline.reason.value}" for decline in findings.sum_declines)
            expected.update(f"declined:{decline.reason.value}" for decline in findings.declines)
            earlier = counts()
            convbn(each.graph)
            reported += counts() - earlier
            each.graph.lint()
            each.recompile()
        again = text(gm)
        for each in graphs(gm):
            convbn(each.graph)
        # A sum that is merged takes the copies between its branches with it, which may be all that a pair declined for.
        copies = expected["merged"] and expected[f"declined:{Reason.VIEW_OR_COPY.value}"]
        assert text(gm) == again or copies, "a second pass changes the graph"
    assert reported == +expected, f"found {expected}, counted {reported}"
    if seen is not None:
        seen.update(reported)
    return expected["folded"] + expected["merged"]


_COUNTED = ("folded", "declined:", "merged", "not_merged:")


def counts() -> Counter[str]:
    from torch._dynamo.utils import counters

    return Counter({k: n for k, n in counters["triton_convbn"].items() if k.startswith(_COUNTED)})


def _as(host: str) -> Any:
    if host == "compiling":
        return tracing(TracingContext(None))
    return planned_for("cuda" if host == "kernels" else "cpu")


def _writes_unseen(program: Program) -> bool:
    """Return whether a foreach operator writes in a transform: torch.func forbids the write, but does not see it."""
    inside = [step for step in program.every_step() if program.use != "backward" or step not in program.steps]
    return any(isinstance(step, Call) and "_foreach" in step.function for step in inside)
