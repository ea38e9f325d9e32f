"""Name the kinds of things that an example contains, for the table that `make fuzz` prints."""

from collections.abc import Iterator
from typing import Any

from programs import Block, Call, Conv, Norm, P, Program, Step, V, used

_PLACES = {"x": "an input", "w": "a weight", "b": "a bias", "g": "an affine parameter", "h": "an affine parameter"}
_PLACES |= {"m": "a statistic", "v": "a statistic"}


def kinds_of(program: Program, dialect: str, host: str, options: dict[str, Any]) -> set[str]:
    """Return the kinds in an example."""
    return {f"dialect: {dialect}", f"host: {host}", f"use: {program.use}", *_options(options), *_of_program(program)}


def _options(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        yield f"option: {name}={value}"


def _of_program(program: Program) -> Iterator[str]:
    for name, spec in program.tensors.items():
        yield f"dtype: {spec.dtype}"
        if spec.subclass:
            yield f"subclass: {spec.subclass}, {_PLACES[name[0]]}"
    for write in program.later:
        yield f"later write: {write.how}"
        yield f"later write to {_PLACES[write.name[0]]}"
    yield from _of_steps(program.steps, inside=False)
    yield from _sums(program.steps)


def _sums(steps: tuple[Step, ...]) -> Iterator[str]:
    """Yield the kinds of the sums of two values of which one comes from a convolution or a BatchNorm."""
    made: dict[int, str] = {}
    for index, step in enumerate(steps):
        operands = list(used(step))
        if isinstance(step, Conv | Norm):
            made[index] = "convolution" if isinstance(step, Conv) else "BatchNorm"
            if any(isinstance(each, V) and made.get(each.index) == "sum" for each in operands):
                yield f"sum before a {made[index]}"
        elif isinstance(step, Call) and any(isinstance(each, V) and each.index in made for each in operands):
            name = step.function.rsplit(".", 1)[-1].strip("_")
            if name in ("add", "iadd", "sub", "isub") and len(operands) == 2:
                made[index] = "sum"
                yield f"sum: {step.function}" + (", alpha" if "alpha" in step.kwargs else "")
                terms = sorted(made.get(each.index, "other") if isinstance(each, V) else "input" for each in operands)
                yield f"sum of {terms[0]} and {terms[1]}"
            elif name == "mul" and "out" not in step.kwargs:
                made[index] = "factor"


def _of_steps(steps: tuple[Step, ...], inside: bool) -> Iterator[str]:
    for index, step in enumerate(steps):
        if isinstance(step, Block):
            pair = any(isinstance(each, Norm) for each in step.steps)
            yield f"function: {step.how}" + (", with a BatchNorm" if pair else "")
            yield from _of_steps(step.steps, inside=True)
        elif isinstance(step, Call) and _writes(step):
            where = "a function" if inside else "the graph"
            yield f"write in {where}"
            to = next(used(step), None)
            if isinstance(to, P) and not inside:
                yield f"write in the graph to {_PLACES[to.name[0]]}"
            if any(isinstance(each, Norm) for each in steps[:index]) and not inside:
                yield "write after a BatchNorm"
            if any(isinstance(each, Conv) for each in steps[:index]) and not inside:
                yield "write after a convolution"
        elif isinstance(step, Call) and ("autocast" in step.function or "grad_enabled" in step.function):
            yield "region: autocast" if "autocast" in step.function else "region: no_grad"


def _writes(step: Call) -> bool:
    name = step.function.rsplit(".", 1)[1] if "." in step.function else step.function
    return name.endswith("_") or name in ("iadd", "isub", "imul", "setitem") or "out" in step.kwargs
