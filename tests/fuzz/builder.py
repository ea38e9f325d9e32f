"""Build a random program step by step.

Sizes are few and small, so that they agree by chance: a batch of as many as there are channels hides a wrong dimension
from a check of shapes. A program runs while it is drawn, on real tensors, and a step that torch refuses is left out.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from programs import Call, Conv, Norm, P, Step, T, V, value_of
from spelling import perform
from torch import Tensor

EPS = (1e-5, 1e-3, 0.1, 1.0)
WIDE = {"float64": "float64", "float32": "float32", "bfloat16": "float32", "float16": "float32"}
SMOOTH = ("torch.tanh", "torch.sigmoid", "torch.cos", "F.silu")
KINKED = ("F.relu", "F.hardtanh")
"""Only in fp64: rounding moves a value to the other side of a kink, where the gradient is another."""


class Builder:
    """An unfinished program.

    Args:
        draw: hypothesis's.
        dtype: The dtype of activations and weights.
        mixed: BatchNorms have wider parameters than a 16-bit convolution.
        subclass: A name of `SUBCLASSES` for some of the tensors, or none.
        blocks: Allow functions that are called through something else.
        bias_alone: Allow a BatchNorm with a bias and no weight. Its second derivatives are wrong in torch 2.14: the
            gradient of its bias has no gradient of its own.
    """

    def __init__(
        self,
        draw: Callable[..., Any],
        dtype: str = "float64",
        mixed: bool = False,
        subclass: str = "",
        blocks: bool = False,
        bias_alone: bool = True,
    ) -> None:
        self.draw, self.dtype, self.mixed, self.subclass = draw, dtype, mixed, subclass
        self.blocks, self.bias_alone = blocks, bias_alone
        self.tensors: dict[str, T] = {}
        self.steps: list[Step] = []
        self.values: dict[V | P, Any] = {}  # from the run
        self.roots: dict[V | P, V | P] = {}  # what a view is a view of
        self.activations: list[V | P] = []
        self.open: list[Call] = []  # what closes the open regions

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def chance(self, of: int) -> bool:
        """Return True once in `of` times. Shrinks to False."""
        return bool(self.draw(st.integers(0, of - 1)) == of - 1)

    # -- tensors and steps ---------------------------------------------------------------------------------------------

    def tensor(self, kind: str, shape: tuple[int, ...], dtype: str, trains: bool = False, variance: bool = False) -> P:
        """Return a new tensor, or an existing one that looks the same."""
        subclass = self.subclass if self.subclass and self.chance(2 if kind == "w" else 3) else ""
        if subclass == "quantized" and kind != "w":
            subclass = ""
        spec = T(shape, dtype, trains and subclass != "quantized", variance, subclass)
        same = [name for name, other in self.tensors.items() if other == spec and name[0] == kind]
        if same and self.chance(5):
            return P(self.one_of(*same))
        name = f"{kind}{len(self.tensors)}"
        self.tensors[name] = spec
        value = torch.randn(shape, dtype=torch.float64)
        self.values[P(name)] = value_of(spec, value.abs() + 0.05 if variance else value)
        self.roots[P(name)] = P(name)
        return P(name)

    def emit(self, step: Step, view_of: V | P | None = None) -> V | None:
        """Add the step. Return None if torch refuses it."""
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
        """Return one of the latest activations."""
        fitting = [ref for ref in self.activations if fits(self.values[ref])]
        return self.draw(st.sampled_from(fitting[::-1][:4])) if fitting else None

    def keep(self, made: V | None) -> V | None:
        if made is not None and isinstance(self.values[made], Tensor) and 2 <= self.values[made].ndim <= 5:
            self.activations.append(made)
        return made

    # -- convolutions and BatchNorms ---------------------------------------------------------------------------------

    def conv(self, x: V | P, dims: int | None = None, keep_size: bool = False, depthwise: bool = False) -> V | None:
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
        outer = inner if depthwise else self.one_of(inner, 2, 3, 4)
        options: dict[str, Any] = {"dims": dims}
        transposed = dims > 0 and not keep_size and self.chance(4)
        if dims:
            divisors = [g for g in (2, 3, 4) if inner % g == 0 and outer % g == 0]
            groups = inner if depthwise else self.one_of(1, 1, *divisors)
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
        if self.chance(8):  # the graph computes the weight
            weight = self.emit(Call("torch.mul", (weight, 0.5))) or weight
        bias = self.tensor("b", (outer,), dtype, trains) if self.chance(2) else None
        return self.emit(Conv(x, weight, bias, **options))

    def norm(self, x: V | P, may_train: bool = True) -> V | None:
        value = self.values[x]
        if not isinstance(value, Tensor) or value.ndim < 2:
            return None
        if value.ndim > 3 and 1 in value.shape[2:] and not value.is_contiguous():
            # Torch 2.14.1 on a CPU takes it for channels_last and returns wrong gradients: `bias.grad` is no sum of the
            # output's gradient for an input of shape (3, 5, 1, 4) and strides (20, 1, 5, 5).
            return None
        dtype = str(value.dtype).removeprefix("torch.")
        own = WIDE[dtype] if self.mixed or self.open else dtype
        channels, trains = (value.shape[1],), self.chance(2)
        affine = [self.tensor("g", channels, own, trains), self.tensor("h", channels, own, trains)]
        affine = [None if self.chance(6) else each for each in affine] if self.chance(2) else affine
        if affine[0] is None and not self.bias_alone:
            affine = [None, None]
        training = may_train and self.chance(14)
        statistics: list[P | None] = [None, None]
        if not training or not self.chance(3):
            mean = self.tensor("m", channels, own)
            statistics = [mean, self.tensor("v", channels, own, variance=True)]
        step = Norm(x, *statistics, *affine, training=training, eps=self.one_of(*EPS))  # type: ignore[misc]
        spelled = {"positional": self.one_of(5, 0, 1, 3, 8), "general": self.chance(8)}
        return self.emit(Norm(**vars(step) | spelled))
