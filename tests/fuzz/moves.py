"""Add BatchNorms that read a convolution's output through calls that move elements, in parts, or one after another."""

from typing import Any

import noise
from builder import Builder
from patterns import activated
from programs import Call, P, V
from torch import Tensor


def moved(b: Builder) -> None:
    """A convolution or Linear, one to three calls that move its elements, and one or two BatchNorms."""
    x = b.activation(lambda t: t.ndim in (3, 4))
    y = None if x is None else b.conv(x, dims=0 if b.chance(3) else None)
    if y is None:
        return
    for _ in range(b.one_of(1, 1, 2, 3)):
        y = b.emit(_move(b, y), view_of=y) or y
    if b.chance(5):
        noise.add(b, near=y)
    # In training mode the shift of its input has a gradient of 0, of which fp32 leaves noise: 2e-3 of 0.07.
    z = b.norm(y, may_train=b.dtype == "float64")
    if b.chance(10):
        b.keep(y)
    activated(b, _again(b, z))


def several(b: Builder) -> None:
    """A convolution and two or three BatchNorms, with or without a call between them."""
    x = b.activation()
    z = None if x is None else b.conv(x)
    for _ in range(b.one_of(2, 2, 3)):
        if z is not None and b.chance(4):
            z = b.emit(b.one_of(Call("torch.clone", (z,)), Call("torch.add", (z, 1)), _move(b, z)), view_of=z) or z
        if z is not None and b.chance(6):
            noise.add(b, near=z)
        if z is not None and b.chance(10):
            b.keep(z)
        z = None if z is None else b.norm(z, may_train=b.dtype == "float64")
    activated(b, z)


def parts(b: Builder) -> None:
    """A convolution whose output is cut into parts, of which one BatchNorm, or several, read some."""
    x = b.activation(lambda t: t.ndim in (3, 4))
    y = None if x is None else b.conv(x)
    if y is None:
        return
    value = b.values[y]
    dim = b.one_of(0, 0, 2, value.ndim - 1, 1)
    size = value.shape[dim]
    name, argument = b.one_of(("chunk", 2), ("split", 1), ("split", [1, size - 1]), ("tensor_split", 2))
    cut = b.emit(Call(f".{name}", (y, argument, dim)))
    if cut is None or len(b.values[cut]) < 2:
        return
    step: Any = None
    for index in b.one_of((0, 1), (0, 1), (0, 1), (0,), (1,)):
        part = b.emit(Call("operator.getitem", (cut, index)), view_of=y)
        if part is None:
            continue
        if b.chance(4):
            part = b.emit(_move(b, part), view_of=part) or part
        if b.chance(8):
            noise.add(b, near=part)
        if step is None or b.chance(2):
            z = b.norm(part, may_train=b.dtype == "float64")
            step = None if z is None else b.steps[z.index]
        else:
            z = b.emit(type(step)(**vars(step) | {"x": part}))
        activated(b, z)


def any_of_them(b: Builder) -> None:
    b.one_of(moved, moved, several, parts)(b)


def _again(b: Builder, z: V | None) -> V | None:
    return b.norm(z, may_train=b.dtype == "float64") or z if z is not None and b.chance(4) else z


def _move(b: Builder, y: V | P) -> Call:
    """Return a call that moves, drops or repeats elements of y. Half of these keep the channels at dim 1."""
    value: Tensor = b.values[y]
    last = value.ndim - 1
    dim, other = b.one_of(0, 1, *range(2, last + 1), last), b.one_of(0, 1, last, last)
    start = b.one_of(0, 1) if value.shape[dim] > 1 else 0
    slices = tuple(
        slice(b.one_of(0, 0, 1), None, b.one_of(1, 1, 2)) if i != 1 else slice(None) for i in range(last + 1)
    )
    order = b.one_of((0, *range(2, last + 1), 1), (0, last, *range(1, last)), tuple(range(last, -1, -1)))
    return b.one_of(
        Call(".transpose", (y, 1, last)),
        Call(".transpose", (y, dim, other)),
        Call(".permute", (y, *order)),
        Call(".movedim", (y, -1, 1)),
        Call("operator.getitem", (y, slices)),
        Call("operator.getitem", (y, (..., slice(start, None)))),
        Call(".narrow", (y, dim, start, value.shape[dim] - start)),
        Call(".flip", (y, dim)),
        Call("torch.roll", (y, 1, dim)),
        Call(".flatten", (y, 0, 1)),
        Call(".unsqueeze", (y, dim)),
        Call("F.pad", (y, b.one_of((-1, 0), (1, 0), (0, -1)))),
        Call("F.pad", (y, (1, 1)), {"mode": b.one_of("circular", "replicate")}),
    )
