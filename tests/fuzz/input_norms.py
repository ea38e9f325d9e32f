"""Add BatchNorms before a convolution or Linear, which the pass folds forward, and near misses."""

import noise
import patterns
from builder import SMOOTH, Builder
from programs import Call, Conv, V


def normed(b: Builder) -> None:
    """A BatchNorm of no convolution's output and the convolution or Linear that reads it."""
    x = b.activation()
    start = None if x is None else b.emit(Call(b.one_of(*SMOOTH), (x,)))
    z = None if start is None else b.norm(start)
    if start is None or z is None:
        return
    for _ in range(b.one_of(0, 0, 0, 0, 1)):
        noise.add(b, near=start)
    if b.chance(8):  # a call that changes no value, or one that does
        calls = Call("F.dropout", (z, 0.5, False)), Call("torch.clone", (z,)), Call("torch.add", (z, 1))
        z = b.emit(b.one_of(*calls)) or z
    tokens = False
    if b.chance(3):
        z, tokens = _moved(b, z)
    y = b.conv(z) if b.chance(3) else _conv(b, z, tokens)
    if b.chance(10):
        b.keep(z)  # a later step may read it
    if y is not None and b.chance(3):
        # In training mode its input's shift has a gradient of 0, of which 16 bits leave noise: 0.13 of 0.
        y = b.norm(y, may_train=b.dtype == "float64") or y
    patterns.activated(b, y)
    if b.chance(6):  # write to what its backward may need
        noise.write(b, through=False, near=start, only_near=True)


def _moved(b: Builder, z: V) -> tuple[V, bool]:
    """Return z with elements moved, mostly with the channels whole, and whether these are in the last dimension."""
    rank = b.values[z].ndim
    if rank == 2:
        return z, False
    kind = b.one_of("swap", "swap", "flip", "crop", "tokens", "tokens", "channels", "space")
    if kind == "space":  # a Linear over another dimension than the BatchNorm's
        return z, True
    if kind == "tokens":
        flat = b.emit(Call(".flatten", (z, 2))) or z
        return b.emit(Call(".transpose", (flat, *b.one_of((1, 2), (-2, -1))))) or flat, True
    calls = {
        "swap": Call(".transpose", (z, rank - 2, rank - 1)),  # of three dimensions it moves the channels
        "flip": Call(".flip", (z, rank - 1)),
        "crop": Call("operator.getitem", (z, (..., slice(0, 2)))),
        "channels": Call(".flip", (z, 1)),
    }
    return b.emit(calls[kind]) or z, False


def _conv(b: Builder, z: V, tokens: bool = False) -> V | None:
    """Return a convolution of the same rank, mostly without padding, or a Linear, always of tokens."""
    value = b.values[z]
    dims, inner = (0, value.shape[-1]) if tokens else (value.ndim - 2, value.shape[1])
    dtype = str(value.dtype).removeprefix("torch.")
    dtype = b.dtype if b.open and dtype == "bfloat16" else dtype
    outer = b.one_of(inner, 2, 3, 4)
    groups = b.one_of(1, 1, *(g for g in (2, 3, 4) if inner % g == 0 and outer % g == 0)) if dims else 1
    kernel = b.one_of(1, min(2, *value.shape[2:], 2), min(3, *value.shape[2:], 3)) if dims else 1
    options = {"dims": dims, "positional": b.one_of(3, 0, 5)}
    if dims:
        options |= {"groups": groups, "stride": b.one_of(1, 1, 2), "general": b.chance(8)}
        if b.chance(4):
            options |= {"padding": 1} if b.chance(2) else {"padding": 1, "padding_mode": "circular"}
    trains = b.chance(2)
    weight = b.tensor("w", (outer, inner // groups, *[kernel] * dims), dtype, trains)
    bias = b.tensor("b", (outer,), dtype, trains) if b.chance(2) else None
    return b.emit(Conv(z, weight, bias, **options))
