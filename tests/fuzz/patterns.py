"""Add convolutions and BatchNorms to a program, in the ways in which models write them."""

import noise
from builder import EPS, KINKED, SMOOTH, WIDE, Builder
from programs import Call, P, V

Ref = V | P


def pair(b: Builder) -> None:
    """A convolution and a BatchNorm, with or without something between them."""
    x = b.activation()
    y = None if x is None else b.conv(x)
    if y is None:
        return
    for _ in range(b.one_of(0, 0, 0, 1, 1, 2)):
        noise.add(b, near=y)
    if b.chance(10):  # a call that changes no value, or one that does
        y = (
            b.emit(
                b.one_of(
                    Call("F.dropout", (y, 0.5, False)),
                    Call("torch.clone", (y,)),
                    Call(".contiguous", (y,)),
                    Call("torch.add", (y, 1)),
                )
            )
            or y
        )
    z = b.norm(y)
    if b.chance(14):
        b.keep(y)
    activated(b, z)
    if b.chance(4):  # write to what its backward may need
        noise.write(b, through=False, near=y, only_near=True)


def activated(b: Builder, z: V | None) -> None:
    if z is not None and b.chance(2):
        z = b.emit(Call(b.one_of(*SMOOTH, *KINKED * (b.dtype == "float64")), (z,)))
    b.keep(z)


def layers(b: Builder) -> None:
    """Two or three convolutions, each with a BatchNorm and an activation whose gradient needs its input.

    Some are all depthwise with kernels of one element, which merge together.
    """
    z, alike = b.activation(), b.chance(3)
    for _ in range(b.one_of(2, 2, 3)):
        y = None if z is None else b.conv(z, keep_size=alike, depthwise=alike)
        z = None if y is None else b.norm(y)
        if z is not None:
            z = b.emit(Call(b.one_of("F.silu", "F.gelu", "F.softplus"), (z,)))
        if z is not None and b.chance(6):
            z = b.emit(Call("operator.add", (z, z))) if b.chance(2) else b.keep(z)
    b.keep(z)


def frozen(b: Builder) -> None:
    """A convolution and a BatchNorm's arithmetic, as torchvision and timm, detectron2, or decompositions write it."""
    x = b.activation(lambda t: t.ndim == 4)
    y = None if x is None else b.conv(x, dims=2)
    if y is None or b.values[y].ndim != 4:
        return
    value = b.values[y]
    dtype, channels = str(value.dtype).removeprefix("torch."), (value.shape[1],)
    own = WIDE[dtype] if b.mixed else dtype
    vectors = [b.tensor(kind, channels, own, variance=kind == "v") for kind in "ghmv"]
    late, swapped = b.chance(2), b.chance(2)
    reshape = lambda t: b.emit(Call(".reshape", (t, 1, -1, 1, 1)))  # noqa: E731
    weight, bias, mean, var = vectors if late else map(reshape, vectors)
    if b.chance(5):
        noise.add(b, near=y)
    inverse = b.emit(Call(".rsqrt", (b.emit(Call("operator.add", (var, b.one_of(*EPS)))),)))
    if b.chance(3):
        early = [reshape(each) for each in (mean, inverse, weight, bias)] if late else [mean, inverse, weight, bias]
        calls = ["operator.sub", *["operator.mul"] * 2, "operator.add"]
        for vector, call in zip(early, calls, strict=True):
            y = b.emit(Call(call, (vector, y) if swapped and call != "operator.sub" else (y, vector)))
        activated(b, y)
        return
    scale = b.emit(Call("operator.mul", (inverse, weight) if swapped else (weight, inverse)))
    shift = b.emit(Call("operator.sub", (bias, b.emit(Call("operator.mul", (mean, scale))))))
    if late:
        scale, shift = (reshape(each) for each in (scale, shift))
        scale, shift = (b.emit(Call(".to", (each, value.dtype))) for each in (scale, shift))
    product = b.emit(Call("operator.mul", (scale, y) if swapped else (y, scale)))
    activated(b, b.emit(Call("operator.add", (product, shift))))


def concatenated(b: Builder) -> None:
    """A BatchNorm after a concatenation of convolutions, along the channels or along another dimension."""
    x = b.activation(lambda t: t.ndim in (3, 4, 5))
    if x is None:
        return
    value = b.values[x]
    parts = [b.conv(x, value.ndim - 2, keep_size=True) for _ in range(b.one_of(2, 2, 3))]
    if b.chance(4):
        parts.append(x)  # type: ignore[arg-type]
    if b.chance(4):
        noise.add(b, near=x)
    cat = b.emit(Call("torch.cat", (parts,), {"dim": b.one_of(1, 1, 1, 0, 2)}))
    activated(b, None if cat is None else b.norm(cat))


def flattened(b: Builder) -> None:
    """A Linear on tokens whose output is flattened for its BatchNorm and put back after it."""
    x = b.activation(lambda t: t.ndim == 3)
    y = None if x is None else b.conv(x, dims=0)
    flat = None if y is None else b.emit(Call(".flatten", (y, *b.one_of((0, 1), (0, 1), (1, 2)))))
    z = None if flat is None else b.norm(flat)
    activated(b, None if z is None else b.emit(Call(".reshape_as", (z, y))))
