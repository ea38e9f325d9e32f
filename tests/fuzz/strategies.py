"""Random programs: pairs and what stands around and between them.

Sizes are few and small, so that they agree by chance: a batch of as many as there are channels is what hides a wrong
dimension from a check of shapes. A program is run while it is drawn, on real tensors, and a step that torch refuses is
left out: what is drawn is valid.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from programs import Call, Conv, Norm, P, Program, Step, T, V, perform, used
from torch import Tensor

HOSTS = ("by hand", "compiling", "kernels")
"""How the pass finds itself: called by hand, by a compiler, or for a device on which the generated kernels run."""

EPS = (1e-5, 1e-3, 0.1, 1.0)
WIDE = {"float64": "float64", "float32": "float32", "bfloat16": "float32", "float16": "float32"}
SMOOTH = ("torch.tanh", "torch.sigmoid", "torch.cos", "F.silu")
KINKED = ("F.relu", "F.hardtanh")
"""Only in fp64: a value that another rounding puts on the other side of the kink has another gradient."""


class Builder:
    """A program in the making. `draw` is hypothesis's."""

    def __init__(self, draw: Callable[..., Any], dtype: str, mixed: bool) -> None:
        self.draw, self.dtype, self.mixed = draw, dtype, mixed
        self.tensors: dict[str, T] = {}
        self.steps: list[Step] = []
        self.values: dict[V | P, Any] = {}  # what each is, from the run
        self.roots: dict[V | P, V | P] = {}  # whose memory a view is, as far as writes to it are allowed
        self.activations: list[V | P] = []
        self.open: list[Call] = []  # what closes the regions that are open

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def chance(self, of: int) -> bool:
        """True once in `of` times; shrinks to False."""
        return bool(self.draw(st.integers(0, of - 1)) == of - 1)

    # -- tensors and steps ---------------------------------------------------------------------------------------------

    def tensor(self, kind: str, shape: tuple[int, ...], dtype: str, trains: bool = False, variance: bool = False) -> P:
        """A new tensor, or one that is there already and looks the same."""
        spec = T(shape, dtype, trains, variance)
        same = [name for name, other in self.tensors.items() if other == spec and name[0] == kind]
        if same and self.chance(5):
            return P(self.one_of(*same))
        name = f"{kind}{len(self.tensors)}"
        self.tensors[name] = spec
        value = torch.randn(shape, dtype=torch.float64)
        value = (value.abs() + 0.05 if variance else value).to(getattr(torch, dtype))
        self.values[P(name)] = value.requires_grad_(trains)
        self.roots[P(name)] = P(name)
        return P(name)

    def emit(self, step: Step, view_of: V | P | None = None) -> V | None:
        """Add the step; None where torch refuses it."""
        try:
            value = perform(step, self.values.__getitem__)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
        made = V(len(self.steps))
        self.steps.append(step)
        self.values[made] = value
        self.roots[made] = made if view_of is None else self.roots[view_of]
        return made

    def activation(self, fits: Callable[[Tensor], bool] = lambda _: True) -> V | P | None:
        """One of the latest activations."""
        fitting = [ref for ref in self.activations if fits(self.values[ref])]
        return self.draw(st.sampled_from(fitting[::-1][:4])) if fitting else None

    def keep(self, made: V | None) -> V | None:
        if made is not None and isinstance(self.values[made], Tensor) and 2 <= self.values[made].ndim <= 5:
            self.activations.append(made)
        return made

    # -- convolutions and BatchNorms ---------------------------------------------------------------------------------

    def conv(self, x: V | P, dims: int | None = None, keep_size: bool = False) -> V | None:
        value = self.values[x]
        choices = [value.ndim - 2] * 8 + [value.ndim - 1] if value.ndim > 2 else [0] * 6 + [1]
        choices = [n for n in choices if 0 <= n <= 3] + ([0] if value.ndim > 2 else [])
        dims = self.one_of(*choices) if dims is None else dims
        if dims == 0:
            inner, spatial = value.shape[-1], ()
        elif dims == value.ndim - 1:
            inner, spatial = value.shape[0], value.shape[1:]
        else:
            inner, spatial = value.shape[1], value.shape[2:]
        dtype = str(value.dtype).removeprefix("torch.")
        dtype = self.dtype if self.open and dtype == "bfloat16" else dtype  # under autocast parameters are wide
        outer = self.one_of(inner, 2, 3, 4)
        options: dict[str, Any] = {"dims": dims}
        transposed = dims > 0 and not keep_size and self.chance(4)
        if dims:
            groups = self.one_of(1, 1, *(g for g in (2, 3, 4) if inner % g == 0 and outer % g == 0))
            kernel = 1 if keep_size else self.one_of(1, min(2, *spatial), min(3, *spatial))
            options |= {"groups": groups, "transposed": transposed}
            if not keep_size and self.chance(2):
                options["stride"] = self.one_of(1, 2)
                options["padding"] = self.one_of(0, 1)
                options["dilation"] = self.one_of(1, 2)
                if transposed and self.chance(3):
                    options["output_padding"] = 1
                elif not transposed and self.chance(4):
                    options |= {"padding": "same", "stride": 1}
                elif not transposed and self.chance(4):
                    options |= {"padding_mode": "circular", "padding": 1}
            shape = (inner, outer // groups) if transposed else (outer, inner // groups)
            shape = (*shape, *[kernel] * dims)
        else:
            shape = (outer, inner)
        options["positional"] = self.one_of(3, 0, 1, 2, 5)
        options["general"] = dims > 0 and options.get("padding") != "same" and self.chance(8)
        trains = self.chance(2)
        weight: V | P = self.tensor("w", shape, dtype, trains)
        if self.chance(8):  # a weight that the graph computes
            weight = self.emit(Call("torch.mul", (weight, 0.5))) or weight
        bias = self.tensor("b", (outer,), dtype, trains) if self.chance(2) else None
        return self.emit(Conv(x, weight, bias, **options))

    def norm(self, x: V) -> V | None:
        value = self.values[x]
        if not isinstance(value, Tensor) or value.ndim < 2:
            return None
        dtype = str(value.dtype).removeprefix("torch.")
        own = WIDE[dtype] if self.mixed or self.open else dtype
        channels, trains = (value.shape[1],), self.chance(2)
        affine = [self.tensor("g", channels, own, trains), self.tensor("h", channels, own, trains)]
        affine = [None if self.chance(6) else each for each in affine] if self.chance(2) else affine
        training = self.chance(14)
        statistics: list[P | None] = [None, None]
        if not training or not self.chance(3):
            mean = self.tensor("m", channels, own)
            statistics = [mean, self.tensor("v", channels, own, variance=True)]
        step = Norm(x, *statistics, *affine, training=training, eps=self.one_of(*EPS))  # type: ignore[misc]
        spelled = {"positional": self.one_of(5, 0, 1, 3, 8), "general": self.chance(8)}
        return self.emit(Norm(**vars(step) | spelled))

    def pair(self) -> None:
        x = self.activation()
        y = None if x is None else self.conv(x)
        if y is None:
            return
        for _ in range(self.one_of(0, 0, 0, 1, 1, 2)):
            self.noise(near=y)
        if self.chance(10):  # what stands between and changes nothing, or does
            y = (
                self.emit(
                    self.one_of(
                        Call("F.dropout", (y, 0.5, False)),
                        Call("torch.clone", (y,)),
                        Call(".contiguous", (y,)),
                        Call("torch.add", (y, 1)),
                    )
                )
                or y
            )
        z = self.norm(y)
        if self.chance(14):
            self.keep(y)
        self.activated(z)
        if self.chance(4):  # to what its backward may need
            self.write(through=False, near=y, only_near=True)

    def activated(self, z: V | None) -> None:
        if z is not None and self.chance(2):
            z = self.emit(Call(self.one_of(*SMOOTH, *KINKED * (self.dtype == "float64")), (z,)))
        self.keep(z)

    # -- patterns ------------------------------------------------------------------------------------------------------

    def frozen(self) -> None:
        """A convolution and FrozenBatchNorm2d's arithmetic, as torchvision and timm, or as detectron2 write it."""
        x = self.activation(lambda t: t.ndim == 4)
        y = None if x is None else self.conv(x, dims=2)
        if y is None or self.values[y].ndim != 4:
            return
        value = self.values[y]
        dtype, channels = str(value.dtype).removeprefix("torch."), (value.shape[1],)
        own = WIDE[dtype] if self.mixed else dtype
        vectors = [self.tensor(kind, channels, own, variance=kind == "v") for kind in "ghmv"]
        late, swapped = self.chance(2), self.chance(2)
        reshape = lambda t: self.emit(Call(".reshape", (t, 1, -1, 1, 1)))  # noqa: E731
        weight, bias, mean, var = vectors if late else map(reshape, vectors)
        if self.chance(5):
            self.noise(near=y)
        inverse = self.emit(Call(".rsqrt", (self.emit(Call("operator.add", (var, self.one_of(*EPS)))),)))
        scale = self.emit(Call("operator.mul", (inverse, weight) if swapped else (weight, inverse)))
        shift = self.emit(Call("operator.sub", (bias, self.emit(Call("operator.mul", (mean, scale))))))
        if late:
            scale, shift = (reshape(each) for each in (scale, shift))
            scale, shift = (self.emit(Call(".to", (each, value.dtype))) for each in (scale, shift))
        product = self.emit(Call("operator.mul", (scale, y) if swapped else (y, scale)))
        self.activated(self.emit(Call("operator.add", (product, shift))))

    def concatenated(self) -> None:
        """A BatchNorm after a concatenation of convolutions, along the channels or along another dimension."""
        x = self.activation(lambda t: t.ndim in (3, 4, 5))
        if x is None:
            return
        value = self.values[x]
        parts = [self.conv(x, value.ndim - 2, keep_size=True) for _ in range(self.one_of(2, 2, 3))]
        if self.chance(4):
            parts.append(x)  # type: ignore[arg-type]
        if self.chance(4):
            self.noise(near=x)
        cat = self.emit(Call("torch.cat", (parts,), {"dim": self.one_of(1, 1, 1, 0, 2)}))
        self.activated(None if cat is None else self.norm(cat))

    def flattened(self) -> None:
        """A Linear on tokens whose output is flattened for its BatchNorm and put back after it."""
        x = self.activation(lambda t: t.ndim == 3)
        y = None if x is None else self.conv(x, dims=0)
        flat = None if y is None else self.emit(Call(".flatten", (y, *self.one_of((0, 1), (0, 1), (1, 2)))))
        z = None if flat is None else self.norm(flat)
        self.activated(None if z is None else self.emit(Call(".reshape_as", (z, y))))

    # -- what stands between and around -------------------------------------------------------------------------------

    def noise(self, near: V | P | None = None) -> None:
        kind = self.one_of("harmless", "write", "write", "write through", "use", "region")
        if kind == "harmless":
            ref = self.activation()
            if ref is not None:
                self.keep(self.emit(self.harmless(ref)))
        elif kind == "use" and near is not None:
            self.keep(self.emit(Call(self.one_of(*SMOOTH), (near,))))
        elif kind == "region":
            self.region()
        else:
            self.write(through=kind == "write through", near=near)

    def harmless(self, ref: V | P) -> Call:
        other = self.activation(lambda t: t.shape == self.values[ref].shape) or ref
        return self.one_of(
            Call("torch.tanh", (ref,)),
            Call("operator.add", (ref, other)),
            Call("torch.mul", (), {"input": ref, "other": 0.5}),
            Call("torch.cat", ([ref, other],)),
            Call(".transpose", (ref, 0, 1)),
            Call(".flatten", (ref, 0, 1)),
            Call("F.dropout", (ref, 0.5)),
            Call(".float" if self.dtype != "float64" else ".double", (ref,)),
        )

    def writable(self, ref: V | P) -> bool:
        """In-place writes are refused for what trains itself, and for a view of it."""
        root, value = self.roots[ref], self.values[ref]
        trains = isinstance(root, P) and self.tensors[root.name].trains
        return isinstance(value, Tensor) and value.is_floating_point() and not trains

    def write(self, through: bool, near: V | P | None, only_near: bool = False) -> None:
        """A write to a tensor, which may be one that a pair reads, or to a view of it. near: the convolution of a pair.
        only_near: to what it reads."""
        recent = list(used(self.steps[near.index])) if isinstance(near, V) else []
        candidates = recent if only_near else [*recent, *self.values]
        ref: V | P | None = self.draw(st.sampled_from(candidates)) if candidates else None
        if ref is None or not isinstance(self.values[ref], Tensor):
            return
        if through:
            seen = self.one_of(
                Call(".view", (ref, -1)),
                Call(".detach", (ref,)),
                Call("operator.getitem", (ref, 0)),
                Call("torch.flatten", (ref,)),
                Call(".transpose", (ref, 0, -1)),
                Call("getattr", (ref, "data")),
                Call(".unsqueeze", (ref, 0)),
                Call(".contiguous", (ref,)),
            )
            free = seen.function in (".detach", "getattr")
            view = self.emit(seen, None if free else ref)
            if view is None:
                return
            ref = view
        if not self.writable(ref):
            if not self.chance(3):
                return
            self.emit(Call("torch._C._set_grad_enabled", (False,)))
            self.emit(self.writing(ref))
            self.emit(Call("torch._C._set_grad_enabled", (True,)))
            return
        self.emit(self.writing(ref))

    def writing(self, ref: V | P) -> Call:
        return self.one_of(
            Call(".add_", (ref, 0.5)),
            Call(".mul_", (ref, 1.5)),
            Call("operator.iadd", (ref, 0.5)),
            Call("operator.imul", (ref, 1.5)),
            Call("operator.setitem", (ref, 0, 0.25)),
            Call("torch.add", (ref, 0.5), {"out": ref}),
            Call("torch._foreach_add_", ([ref], 0.5)),
            Call("torch.relu_", (ref,)) if self.dtype == "float64" else Call(".tanh_", (ref,)),
            Call(".fill_", (ref, 0.25)),
            Call("nn.init.constant_", (ref, 0.25)),
            Call("nn.init.normal_", (ref,)),
            Call("torch.Tensor.add_", (ref, 0.5)),
            Call("torch.Tensor.renorm_", (ref, 2, 0, 0.5)),
            Call("torch.Tensor.normal_", (ref,)),
            Call("torch.Tensor.__setitem__", (ref, 0, 0.25)),
            Call("torch.Tensor.__iadd__", (ref, 0.5)),
        )

    def region(self) -> None:
        """Enter autocast or leave grad mode, or put an end to that."""
        if self.open:
            self.emit(self.open.pop())
        elif self.dtype == "float32" and self.chance(2):
            self.autocast()
        elif self.chance(2):
            self.emit(Call("torch._C._set_grad_enabled", (False,)))
            self.open.append(Call("torch._C._set_grad_enabled", (True,)))

    def autocast(self) -> None:
        entered = self.emit(Call("torch.amp.autocast_mode._enter_autocast", ("cpu", torch.bfloat16, True, None)))
        self.open.append(Call("torch.amp.autocast_mode._exit_autocast", (entered,)))


DIALECTS = (
    *("functions",) * 10,
    *("functions without examples", "modules without shapes"),
    *("modules",) * 6,
    *("aten", "aten of fakes", "aten after dispatch") * 2,
    *("decomposed", "decomposed, functional"),
)
"""As often as each is drawn: where an example costs 30 ms instead of 10, less often."""

OPTIONS = (
    {},
    {"recompute": False},
    {"when": "always"},
    {"pairs_per_launch": 2},
)


@st.composite
def examples(draw: Callable[..., Any]) -> tuple[Program, str, str, dict[str, Any]]:
    """A program, the dialect that it is written in, who calls the pass, and with which options."""
    choose = lambda choices: draw(st.sampled_from(choices))  # noqa: E731
    return draw(programs()), choose(DIALECTS), choose(HOSTS), choose(OPTIONS)


@st.composite
def programs(draw: Callable[..., Any]) -> Program:
    dtype = draw(st.sampled_from(("float64",) * 6 + ("float32", "float32", "bfloat16", "float16")))
    mixed = dtype in ("bfloat16", "float16") and draw(st.booleans())
    builder = Builder(draw, dtype, mixed)
    try:
        return _program(builder)
    finally:
        while builder.open:
            perform(builder.open.pop(), builder.values.__getitem__)


def _program(b: Builder) -> Program:
    size = lambda: b.one_of(2, 3, 4)  # noqa: E731
    rank = b.one_of(4, 4, 4, 2, 3, 3, 5)
    shape = tuple(size() for _ in range(rank))
    b.activations.append(b.tensor("x", shape, b.dtype, trains=b.chance(2)))
    if not b.chance(2):  # an input that is one of the graph's own, and can be written to
        b.keep(b.emit(Call("torch.mul", (b.activations[0], 1.5))))
    if b.dtype == "float32" and b.chance(2):
        b.autocast()
    for _ in range(b.one_of(1, 2, 3, 4)):
        block = b.one_of(b.pair, b.pair, b.pair, b.pair, b.frozen, b.concatenated, b.flattened, b.noise)
        block()
    while b.open:
        b.emit(b.open.pop())
    floating = [
        made
        for made, value in b.values.items()
        if isinstance(made, V) and isinstance(value, Tensor) and value.is_floating_point()
    ]
    if not floating:
        floating = [b.emit(Call("torch.tanh", (b.activations[0],)))]  # type: ignore[list-item]
    last = floating[-1]
    others = [made for made in floating[:-1] if b.chance(6)][:3]
    return Program(dict(b.tensors), tuple(b.steps), (*others, last), b.draw(st.integers(0, 99)))
