"""The property: what the pass returns equals the graph that it was given, or is that graph; and it never raises.

Equal is: outputs, gradients, and what the inputs and parameters hold afterwards. The graph runs in eager, without code
generation, so that an example costs milliseconds.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from programs import DTYPES, Call, Program
from render import Rendered, aten, decomposed, exported, functions, modules
from torch import Tensor, fx
from torch._guards import TracingContext, tracing

from triton_convbn import ConvBNPass
from triton_convbn.dispatch import planned_for
from triton_convbn.graph.profitability import select

# Relative to the largest magnitude of what is compared: of the one output, of all gradients together.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}

DIALECTS: dict[str, Callable[[Program], Rendered]] = {
    "functions": functions,
    "functions without examples": lambda program: functions(program, examples=False),
    "modules": modules,
    "modules without shapes": lambda program: modules(program, shapes=False),
    "aten": aten,
    "aten of fakes": lambda program: aten(program, "fake"),
    "aten after dispatch": lambda program: aten(program, pre_dispatch=False),
    "decomposed": decomposed,
    "decomposed, functional": lambda program: decomposed(program, functional=True),
    "exported": lambda program: exported(program, decompose=False),
    "exported, decomposed": lambda program: exported(program, decompose=True),
}


@dataclass
class Outcome:
    """What a run leaves behind. gradients: None where backward is refused."""

    outputs: dict[str, Tensor]
    state: dict[str, Tensor]
    gradients: dict[str, Tensor] | None


def outcome(
    run: Callable[[dict[str, Tensor]], tuple[Any, ...]],
    program: Program,
    backward: bool = True,
    given: dict[str, Tensor] | None = None,
) -> Outcome:
    """Run it on new tensors, the program's own where none are given. Raises what the forward raises."""
    given = program.given() if given is None else given
    grad_mode = torch.is_grad_enabled()
    torch.manual_seed(0)
    try:
        returned = run(given)
    finally:
        torch.set_grad_enabled(grad_mode)
    outputs = {f"output {i}": value for i, value in enumerate(returned) if isinstance(value, Tensor)}
    found = Outcome({k: v.detach().clone() for k, v in outputs.items()}, {}, {})
    found.state = {name: value.detach().clone() for name, value in given.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for value in outputs.values():
        if value.requires_grad:
            weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).reshape(value.shape)
            loss = loss + (value.double() * weights).sum()
    if loss.requires_grad and backward:
        try:
            loss.backward()
        except RuntimeError:
            found.gradients = None
            return found
    assert found.gradients is not None
    for name, value in given.items():
        if value.is_leaf and value.grad is not None:
            found.gradients[name] = value.grad
    return found


AMPLIFIED = 4
"""How many times the unmodified graph's own error a fold's may be, where that is known and is large."""


def exact_outcome(program: Program) -> Outcome | None:
    """What a program in a narrow dtype returns without rounding: its values, computed with in fp64. None where it is in
    fp64 itself, and where it draws random numbers, which are others in another dtype."""
    if not _narrow(program) or any(isinstance(step, Call) and step.is_random() for step in program.steps):
        return None
    wide = program.in_fp64()
    given = {
        name: value.detach().to(DTYPES[wide.tensors[name].dtype]).requires_grad_(value.requires_grad)
        for name, value in program.given().items()
    }
    try:
        return outcome(functions(wide, examples=False).run, wide, _has_gradients(program), given)
    except Exception:  # the program holds dtypes together that do not go together in fp64
        return None


def differences(
    found: Outcome, want: Outcome, tolerances: dict[torch.dtype, float], exact: Outcome | None = None
) -> list[str]:
    """What is not equal, in words. Every dtype has to agree, every value to the tolerance of the narrowest dtype.

    exact: the same without rounding. A program can amplify its rounding, the cosine of a sum of hundreds for one. With
    this the unmodified graph's own error, `AMPLIFIED` times, is allowed beside the tolerance.
    """
    wrong = []
    everything = {"": want.outputs, "after: ": want.state, "gradient of ": want.gradients or {}}
    others = {"": found.outputs, "after: ": found.state, "gradient of ": found.gradients or {}}
    dtypes = [v.dtype for group in everything.values() for v in group.values() if v.is_floating_point()]
    tolerance = max((tolerances[dtype] for dtype in dtypes), default=0.0)
    if want.gradients is not None and found.gradients is None:
        return ["backward raises"]
    for kind, wanted in everything.items():
        got = others[kind]
        if want.gradients is None and kind == "gradient of ":
            continue
        more = {name for name in got.keys() - wanted.keys() if _size(got[name])}  # zeros are a gradient of nothing
        if wanted.keys() - got.keys() or more:
            wrong.append(f"{kind}present: {sorted(wanted)}, found {sorted(got)}")
        largest = max((_size(v) for v in wanted.values()), default=0.0)
        for name in wanted.keys() & got.keys():
            a, b = got[name], wanted[name]
            if a.shape != b.shape or a.dtype != b.dtype:
                wrong.append(f"{kind}{name}: {a.dtype}{tuple(a.shape)}, want {b.dtype}{tuple(b.shape)}")
                continue
            if not b.numel():
                continue
            scale = largest if kind == "gradient of " else _size(b)
            own = _rounding(kind, name, b, exact)
            error = (a.double() - b.double()).abs().max().item()
            if not error <= tolerance * scale + AMPLIFIED * own + 1e-300:
                wrong.append(f"{kind}{name}: error {error:.1e} of {scale:.1e}")
    return wrong


def _rounding(kind: str, name: str, value: Tensor, exact: Outcome | None) -> float:
    """How far the unmodified graph's value is from the exact one; 0 where that is not known."""
    if exact is None:
        return 0.0
    group = {"": exact.outputs, "after: ": exact.state, "gradient of ": exact.gradients or {}}[kind]
    if name not in group or group[name].shape != value.shape:
        return 0.0
    error = (value.double() - group[name].double()).abs().max().item()
    return error if math.isfinite(error) else 0.0


def _size(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() and value.is_floating_point() else 0.0


def finite(found: Outcome) -> bool:
    every = [*found.outputs.values(), *found.state.values(), *(found.gradients or {}).values()]
    return all(bool(torch.isfinite(value).all()) and _size(value) < 1e6 for value in every)


class Invalid(Exception):
    """The program says nothing: it does not run as it is, or what it returns is not finite."""


def check(
    program: Program, dialect: str, host: str = "by hand", seen: Counter[str] | None = None, **options: Any
) -> int:
    """The property, for one program. Returns how many pairs were folded.

    Raises: AssertionError, where it does not hold; Invalid, where the program says nothing.
    """
    try:
        rendered = DIALECTS[dialect](program)
        want = outcome(rendered.run, program, _has_gradients(program))
        meaningful = finite(want)
    except Exception as error:
        raise Invalid(str(error)) from error
    if not meaningful:
        raise Invalid("not finite")
    before = str(rendered.gm.graph)
    folded = rewrite(rendered.gm, host, seen, options)
    if not folded:
        assert str(rendered.gm.graph) == before, "nothing folds, but the graph has changed"
        return 0
    found = outcome(rendered.run, program, _has_gradients(program))
    wrong = differences(found, want, TOLERANCES)
    if wrong and (exact := exact_outcome(program)) is not None:
        wrong = differences(found, want, TOLERANCES, exact)
    assert not wrong, "\n".join([*wrong, before, str(rendered.gm.graph)])
    return folded


def rewrite(gm: fx.GraphModule, host: str, seen: Counter[str] | None, options: dict[str, Any]) -> int:
    """Run the pass on the graph, twice, and check what it says against what it did. Returns the folds."""
    convbn = ConvBNPass(**options)
    with _as(host):
        findings = select(gm.graph, convbn.options)
        reported = counts()
        convbn(gm.graph)
        reported = counts() - reported
        gm.graph.lint()
        gm.recompile()
        again = str(gm.graph)
        convbn(gm.graph)
        assert str(gm.graph) == again, "a second pass changes the graph"
    expected = Counter({"folded": len(findings.folded())})
    expected.update(f"declined:{decline.reason.value}" for decline in findings.declines)
    assert reported == +expected, f"found {expected}, counted {reported}"
    if seen is not None:
        seen.update(reported)
    return len(findings.folded())


def counts() -> Counter[str]:
    from torch._dynamo.utils import counters

    return Counter({k: n for k, n in counters["triton_convbn"].items() if k.startswith(("folded", "declined:"))})


def _as(host: str) -> Any:
    if host == "compiling":
        return tracing(TracingContext(None))
    return planned_for("cuda" if host == "kernels" else "cpu")


def _narrow(program: Program) -> bool:
    return any(spec.dtype not in ("float64", "int64") for spec in program.tensors.values())


def _has_gradients(program: Program) -> bool:
    """A write through `.data` is unknown to autograd: backward computes with what it finds, and may find either."""
    return not any(isinstance(step, Call) and step.function == "getattr" for step in program.steps)
