"""Compare what two graphs leave behind, within the tolerance of the program's dtypes."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from programs import DTYPES, Block, Call, Program
from render import functions
from subclasses import Quantized
from torch import Tensor
from uses import Outcome, outcome

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Relative to the largest magnitude of what is compared: of the one output, or of all gradients together."""

AMPLIFIED = 4
"""The allowed multiple of the unmodified graph's own error, if that is known and large."""


def exact_outcome(program: Program, seed: int | None = None) -> Outcome | None:
    """Return the outcome without rounding, computed in fp64.

    None if the program draws random numbers, which differ in another dtype. That of a program in fp64 is its own: a
    BatchNorm in training mode of what is constant gave 3e-14, all of it rounding, and `seed` shows that.

    Args:
        seed: Draws a rounding of every element of a weight, a bias, or a BatchNorm's vector but the variance, up or
            down by half a unit in the last place of the program's narrowest dtype. None: no rounding.
    """
    if draws_random_numbers(program):
        return None
    wide = program.in_fp64()
    given: dict[str, Tensor] = {}
    for name, value in program.given().items():
        exact = value.dequantize() if isinstance(value, Quantized) else value.detach()
        given[name] = exact.to(DTYPES[wide.tensors[name].dtype]).requires_grad_(value.requires_grad)
    if seed is not None:
        noise, eps = torch.Generator().manual_seed(seed), torch.finfo(narrowest(program)).eps
        with torch.no_grad():
            for name, value in given.items():
                if name[0] in "wbghm":
                    signs = 2 * torch.randint(2, value.shape, generator=noise) - 1
                    value *= 1 + signs.double() * eps / 2
    try:
        return outcome(functions(wide, examples=False).run, wide, has_gradients(program), given)
    except Exception:  # dtypes that do not go together in fp64
        return None


def narrowest(program: Program) -> torch.dtype:
    """Return the dtype with the largest tolerance among those that the program computes in."""
    dtypes = {DTYPES[spec.dtype] for spec in program.tensors.values()} & TOLERANCES.keys()
    autocast = any(isinstance(step, Call) and "_enter_autocast" in step.function for step in program.every_step())
    return max((*dtypes, *[torch.bfloat16] * autocast), key=TOLERANCES.__getitem__)


def differences(
    found: Outcome,
    want: Outcome,
    tolerance: float,
    exact: Outcome | None = None,
    unwritten: Outcome | None = None,
    rounded: Sequence[Outcome] = (),
) -> list[str]:
    """Return what differs, in words. Every dtype has to agree, every value to the tolerance.

    Args:
        found, want: What to compare.
        tolerance: Relative to the largest magnitude.
        exact: The outcome without rounding. A program can amplify its rounding, the cosine of a sum of hundreds say.
            The unmodified graph's own error is then allowed, `AMPLIFIED` times, beside the tolerance.
        rounded: Outcomes with rounded parameters. A fold rounds its weight, which the unmodified graph does not. In a
            sum that cancels, rounding bf16 weights changed a gradient of 14 by 128. `AMPLIFIED` times what such a
            rounding changes is allowed too.
        unwritten: An outcome whose gradients are right as well.
    """
    wrong = []
    groups = {"": (found.outputs, want.outputs), "after: ": (found.state, want.state)}
    if want.gradients is not None and found.gradients is None:
        return [f"backward raises {found.error}"]
    if want.gradients is not None:
        groups["gradient of "] = found.gradients or {}, want.gradients
    for kind, (got, wanted) in groups.items():
        more = {name for name in got.keys() - wanted.keys() if _size(got[name])}  # zeros are a gradient of nothing
        if wanted.keys() - got.keys() or more:
            wrong.append(f"{kind}present: {sorted(wanted)}, found {sorted(got)}")
        largest = max((_size(v) for v in wanted.values()), default=0.0)
        others = (unwritten.gradients or {}) if kind == "gradient of " and unwritten is not None else {}
        for name in wanted.keys() & got.keys():
            a, b = got[name], wanted[name]
            if a.shape != b.shape or a.dtype != b.dtype:
                wrong.append(f"{kind}{name}: {a.dtype}{tuple(a.shape)}, want {b.dtype}{tuple(b.shape)}")
                continue
            if not b.numel():
                continue
            scale = largest if kind == "gradient of " else _size(b)
            allowed = tolerance * scale + AMPLIFIED * _rounding(kind, name, b, exact) + 1e-300
            if exact is not None and name in (values := _group(exact, kind)):
                changes = [_rounding(kind, name, values[name], each) for each in rounded]
                allowed += AMPLIFIED * max(changes, default=0.0)
            error = min(_error(a, each) for each in (b, others.get(name, b)))
            if not error <= allowed:
                wrong.append(f"{kind}{name}: error {error:.1e} of {scale:.1e}")
    return wrong


def _error(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def _rounding(kind: str, name: str, value: Tensor, exact: Outcome | None) -> float:
    """Return how far the unmodified graph's value is from the exact one, or 0 if unknown."""
    if exact is None:
        return 0.0
    group = _group(exact, kind)
    if name not in group or group[name].shape != value.shape:
        return 0.0
    error = _error(value, group[name])
    return error if math.isfinite(error) else 0.0


def _group(found: Outcome, kind: str) -> dict[str, Tensor]:
    return {"": found.outputs, "after: ": found.state, "gradient of ": found.gradients or {}}[kind]


def _size(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() and value.is_floating_point() else 0.0


def finite(found: Outcome) -> bool:
    every = [*found.outputs.values(), *found.state.values(), *(found.gradients or {}).values()]
    return all(bool(torch.isfinite(value).all()) and _size(value) < 1e6 for value in every)


def compare(found: Outcome, want: Outcome, program: Program, unwritten: Outcome | None = None) -> list[str]:
    """Return what differs beyond rounding, and beyond what the documentation allows after a later write.

    unwritten: The outcome of the unmodified graph without the later writes, if there are any.

    Autograd raises if a tensor that it has saved is written to. A fold saves other tensors, so it may raise where the
    unmodified graph does not. Where it does not raise, its gradients are those of the values that the forward read.
    """
    if unwritten is not None:
        if found.gradients is None and re.search("modified (by an )?inplace", found.error):
            found = replace(found, gradients=want.gradients)
        elif want.gradients is None:
            want = replace(want, gradients=unwritten.gradients)
            if any(isinstance(step, Block) and "checkpoint" in step.how for step in program.every_step()):
                # A backward that raises does not run a checkpoint again, which updates statistics once more.
                want = replace(want, outputs=_of_first_call(want), state={})
                found = replace(found, outputs=_of_first_call(found), state={})
        if not any("data" in write.how or program.tensors[write.name].subclass for write in program.later):
            unwritten = None  # else autograd did not see the write, and the unmodified graph may read what was written
    tolerance = TOLERANCES[narrowest(program)]
    wrong = differences(found, want, tolerance, None, unwritten)
    if wrong and (exact := exact_outcome(program)) is not None:
        rounded = [each for seed in range(8) if (each := exact_outcome(program, seed)) is not None]
        wrong = differences(found, want, tolerance, exact, unwritten, rounded)
    return wrong


def _of_first_call(found: Outcome) -> dict[str, Tensor]:
    return {name: value for name, value in found.outputs.items() if not name.startswith("next")}


def other_strides(found: Outcome, want: Outcome) -> list[str]:
    """Return which outputs have other strides, in words. A view of them may fail."""
    return [
        f"{name}: strides {value.stride()}, want {want.outputs[name].stride()}"
        for name, value in found.outputs.items()
        if name in want.outputs and _strides(value) != _strides(want.outputs[name])
    ]


def _strides(tensor: Tensor) -> list[int]:
    if not tensor.numel():
        return []
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def draws_random_numbers(program: Program) -> bool:
    return any(isinstance(step, Call) and step.is_random() for step in program.every_step())


def is_narrow(program: Program) -> bool:
    """Return whether some tensor is not fp64."""
    return any(spec.dtype not in ("float64", "int64") for spec in program.tensors.values())


def has_gradients(program: Program) -> bool:
    """Return whether gradients are defined. After a write through `.data` in the forward they are not."""
    return not any(isinstance(step, Call) and step.function == "getattr" for step in program.every_step())
