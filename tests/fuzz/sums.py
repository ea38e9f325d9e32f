"""Add sums of branches that read one tensor, which the pass merges, and near misses, which it must not merge."""

from dataclasses import dataclass

import noise
import patterns
from builder import Builder
from programs import Call, Conv, V

Ref = patterns.Ref


@dataclass(frozen=True)
class _Shape:
    """What the convolutions of a sum have in common.

    Attributes:
        kernels: The largest kernel size, and those that fit in the middle of it.
        margin: The padding of the largest kernel.
    """

    dims: int
    outer: int
    groups: int
    kernels: tuple[int, ...]
    margin: int
    stride: int
    dilation: int


def summed(b: Builder) -> None:
    """A sum of two to four branches, mostly with a BatchNorm each, sometimes with one after the sum."""
    x = b.activation(lambda t: t.ndim in (3, 4, 5))
    if x is None:
        return
    if b.chance(3):  # in another order of memory, which a sum that begins with x has as well
        x = b.emit(Call(".transpose", (x, -2, -1))) or x
    shape = _shape(b, x)
    total: Ref | None = _term(b, x, shape, convolved=True)
    for _ in range(b.one_of(1, 1, 2, 3)):
        source = b.activation(lambda t: t.shape == b.values[x].shape) if b.chance(12) else x
        if b.chance(14):  # a write to the input, or to a tensor of the last term
            noise.write(b, through=b.chance(3), near=total if isinstance(total, V) else None)
        nested = b.chance(6)
        term = _term(b, source or x, shape)
        if nested and term is not None:
            term = _added(b, term, _term(b, x, shape)) or term
        if total is not None and term is not None:
            first, second = (term, total) if b.chance(4) else (total, term)
            total = _added(b, first, second) or total
        if isinstance(total, V) and b.chance(14):  # the inner sum is read elsewhere
            b.keep(total)
    if isinstance(total, V) and b.chance(3):
        total = b.norm(total) or total
    if isinstance(total, V):
        patterns.activated(b, total)
        if b.chance(6):
            noise.write(b, through=False, near=total)


def _shape(b: Builder, x: Ref) -> _Shape:
    inner, dims = b.values[x].shape[1], b.values[x].ndim - 2
    outer = b.one_of(inner, inner, inner, 2, 4)
    groups = b.one_of(1, 1, inner, *(g for g in (2, 3) if inner % g == 0))
    groups = groups if outer % groups == 0 else 1
    kernels = b.one_of((3, 1), (3, 1), (3, 1, 1), (1, 1), (2, 2), (4, 2), (3, 3))
    dilation = b.one_of(1, 1, 1, 2)
    margin = dilation * (kernels[0] - 1) // 2
    margin += b.one_of(0, 0, 0, 1)
    return _Shape(dims, outer, groups, kernels, margin, b.one_of(1, 1, 1, 2), dilation)


def _term(b: Builder, x: Ref, shape: _Shape, convolved: bool = False) -> Ref | None:
    """Return a convolution, one with its BatchNorm, a BatchNorm, or x, sometimes times a factor."""
    kind = b.one_of("pair", "pair", "pair", "conv") if convolved else b.one_of("pair", "pair", "conv", "norm", "x")
    made: Ref | None = x
    if kind in ("pair", "conv"):
        made = _conv(b, x, shape, shape.kernels[0] if convolved else b.one_of(*shape.kernels))
    if kind in ("pair", "norm") and made is not None:
        made = b.norm(made)
    if made is not None and b.chance(4):
        made = _multiplied(b, made)
    if made is not None and b.chance(12):  # changes nothing
        made = b.emit(Call(b.one_of(".contiguous", ".clone"), (made,))) or made
    return made


def _conv(b: Builder, x: Ref, shape: _Shape, kernel: int) -> V | None:
    value = b.values[x]
    margin = shape.margin - shape.dilation * (shape.kernels[0] - kernel) // 2
    dilation = shape.dilation
    if b.chance(12):  # other positions of the input, mostly with a result of the same size
        margin, dilation = b.one_of((margin + 1, dilation), (margin, 3 - dilation), (margin + dilation, 2 * dilation))
    outer, groups = (1, 1) if b.chance(24) else (shape.outer, 1 if b.chance(14) else shape.groups)
    dtype = str(value.dtype).removeprefix("torch.")
    dtype = b.dtype if b.open and dtype == "bfloat16" else dtype
    trains = b.chance(2)
    weight = b.tensor("w", (outer, value.shape[1] // groups, *[kernel] * shape.dims), dtype, trains)
    bias = b.tensor("b", (outer,), dtype, trains) if b.chance(2) else None
    options = {"dims": shape.dims, "stride": shape.stride, "padding": margin, "dilation": dilation, "groups": groups}
    return b.emit(Conv(x, weight, bias, **options, positional=b.one_of(3, 0, 5), general=b.chance(8)))


def _multiplied(b: Builder, term: Ref) -> Ref:
    """Return a term times or over a number, or times a number per channel, as LayerScale."""
    value = b.values[term]
    if b.chance(6):
        return b.emit(Call(b.one_of("operator.truediv", "torch.div"), (term, b.one_of(2, -3.0)))) or term
    by: Ref | float | None = b.one_of(0.5, -2.0)
    if not b.chance(3):
        dtype = str(value.dtype).removeprefix("torch.")
        ones = (1,) * (value.ndim - 2)
        sizes = b.one_of((value.shape[1], *ones), (value.shape[1], *ones), (1, value.shape[1], *ones), (1, *ones))
        by = b.tensor("g", sizes, dtype, trains=b.chance(2))
    first, second = (by, term) if b.chance(3) else (term, by)
    return b.emit(Call(b.one_of("operator.mul", "operator.mul", "torch.mul"), (first, second))) or term


def _added(b: Builder, first: Ref, second: Ref | None) -> V | None:
    """Return a sum or difference. With alpha it is no plain one."""
    if second is None:
        return None
    spelled = b.one_of(
        *("operator.add",) * 4,
        *("operator.sub", "operator.iadd", "operator.isub", "torch.add", "torch.sub", ".add", ".add_", ".sub_"),
    )
    alpha = {"alpha": 2} if not spelled.startswith("operator") and b.chance(6) else {}
    return b.emit(Call(spelled, (first, second), alpha))
