"""Name the kinds of things that an example contains, for the table that `make fuzz` prints."""

from collections.abc import Iterator
from typing import Any

from programs import Block, Call, Conv, Norm, P, Program, Step, used

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
    return name.endswith("_") or name in ("iadd", "imul", "setitem") or "out" in step.kwargs
