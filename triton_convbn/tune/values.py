"""Whether a configuration computes the right thing: its kernels against the algebra in fp64, on outputs full of NaN."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.codegen import KernelConfig, KernelSource
from ..kernels.inputs import DTYPES, POWER_DTYPE
from ..kernels.launch import launch
from ..kernels.spec import GradSpec, PairSpec
from ..ops import reference
from .problem import Specs

TORCH = {name: dtype for dtype, name in DTYPES.items()}
BAND = 64
SENTINEL = 7.0


def reduced(specs: Specs, config: KernelConfig) -> Specs:
    """The same call with fewer channels, which takes the same paths through the generated code.

    A pair keeps its dtypes and layouts, and what decides which paths its text takes: of a fold, which powers of two up
    to a block divide its elements; of a backward, which up to a program's rows divide its channels, and all of what a
    channel holds. Two blocks, or two programs, are left of it, or a few more. Of pairs that are then alike one is left,
    or two that share a body.
    """
    left: list[Any] = []
    for spec in specs:
        each: PairSpec | GradSpec
        if isinstance(spec, GradSpec):
            each = replace(spec, pair=_fewer_channels(spec.pair, config))
        else:
            each = _fewer_elements(spec, config)
        if left.count(each) < (2 if config.emit == "shared" else 1):
            left.append(each)
    return tuple(left)


def _fewer_elements(pair: PairSpec, config: KernelConfig) -> PairSpec:
    """Fewer rows of a weight, whole groups of them: output channels, or input channels of a transposed convolution."""
    a_row = pair.cols * pair.taps * pair.groups
    ends = math.gcd(pair.numel, config.block)
    for fewer in range(2, pair.rows // pair.groups):
        if fewer * a_row >= 2 * config.block and math.gcd(fewer * a_row, config.block) == ends:
            return replace(pair, rows=fewer * pair.groups)
    return pair


def _fewer_channels(pair: PairSpec, config: KernelConfig) -> PairSpec:
    """Fewer output channels. A program holds as many as fill its block, of a transposed convolution at least 32."""
    if not pair.numel:
        return pair
    field = "cols" if pair.transposed else "rows"
    count = getattr(pair, field)
    rows = min(config.block // (pair.numel // pair.channels), config.rows or config.block)
    rows = 1 << max(32 if pair.transposed else 1, rows).bit_length()
    for fewer in range(rows // 2 + 1, count):
        if math.gcd(fewer, rows) == math.gcd(count, rows):
            return replace(pair, **{field: fewer})
    return pair


class _Outputs:
    """Tensors full of NaN, each between bands that nothing may touch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []

    def like(self, tensor: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        shape = torch.empty_like(tensor, device="meta", memory_format=memory_format)
        buffer = torch.full((tensor.numel() + 2 * BAND,), SENTINEL, dtype=dtype, device=self._device)
        buffer[BAND : BAND + tensor.numel()] = math.nan
        self._buffers.append(buffer)
        return buffer.as_strided(shape.shape, shape.stride(), BAND)

    def written_beside(self) -> bool:
        ends = [end for buffer in self._buffers for end in (buffer[:BAND], buffer[-BAND:])]
        return not all(bool((end == SENTINEL).all()) for end in ends)


class Call:
    """Tensors for a call: random inputs, hostile statistics, and outputs that nothing has written."""

    def __init__(self, specs: Specs, device: torch.device, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._device = device
        self.outputs = _Outputs(device)
        self.specs = specs
        self.values = [self._tensors(spec) for spec in specs]

    def _random(self, *size: int, dtype: str) -> Tensor:
        return torch.randn(*size, generator=self._generator).to(self._device, TORCH[dtype])

    def _tensors(self, spec: PairSpec | GradSpec) -> dict[str, Any]:
        """Every field that a kernel of the pair may ask for."""
        pair = spec.pair if isinstance(spec, GradSpec) else spec
        n = pair.channels
        weight = self._random(pair.rows, pair.cols, pair.taps, 1, dtype=pair.weight)
        found: dict[str, Any] = {"weight": weight.contiguous(memory_format=_layout(pair.weight_last))}
        for name in ("bias", "bn_weight", "bn_bias", "running_mean"):
            dtype = getattr(pair, name)
            found[name] = None if dtype is None else self._random(n, dtype=dtype)
        spread = torch.empty(n).uniform_(-4, 4, generator=self._generator).exp()
        found["running_var"] = spread.to(self._device, TORCH[pair.running_var])
        if not isinstance(spec, GradSpec):
            out = TORCH[pair.out]
            found["out_weight"] = self.outputs.like(weight, out, _layout(pair.out_last))
            found["out_bias"] = self.outputs.like(found["running_mean"], out, torch.preserve_format)
            if pair.prescale:
                found["out_power"] = self.outputs.like(found["running_mean"], POWER_DTYPE, torch.preserve_format)
            return found
        if pair.prescale:
            exponents = torch.randint(-2, 16, (n,), generator=self._generator)
            found["power"] = torch.exp2(exponents.float()).to(self._device, POWER_DTYPE)
        if spec.grad_weight is not None:
            grad = self._random(pair.rows, pair.cols, pair.taps, 1, dtype=spec.grad_weight)
            found["grad_weight"] = grad.contiguous(memory_format=_layout(spec.grad_last))
        if spec.grad_bias is not None:
            rows = () if spec.bias_rows == 1 else (spec.bias_rows,)
            found["grad_bias"] = self._random(*rows, n, dtype=spec.grad_bias)
        for name, wanted in spec.needs._asdict().items():
            if wanted:
                like = found[name]
                found[f"d_{name}"] = self.outputs.like(like, like.dtype, torch.preserve_format)
        return found

    def run(self, sources: Sequence[tuple[slice, KernelSource]]) -> None:
        """Every launch of the call, in order."""
        for part, source in sources:
            launch(source, self.values[part], self._device)

    def wrong(self) -> str | None:
        """What is wrong with the outputs, in words; None if they are right."""
        if self.outputs.written_beside():
            return "written beside an output"
        for number, (spec, values) in enumerate(zip(self.specs, self.values, strict=True)):
            expected = _gradients(spec, values) if isinstance(spec, GradSpec) else _folded(spec, values)
            for name, (exact, allowed) in expected.items():
                off = ~((values[name].double() - exact).abs() <= allowed)  # so that a NaN is off as well
                if off.any():
                    return f"{name} of pair {number}: {int(off.sum())} of {off.numel()} elements are off"
        return None


def _layout(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


def _double(values: dict[str, Any], *names: str) -> list[Tensor | None]:
    return [None if values.get(name) is None else values[name].double() for name in names]


PARAMETERS = ("weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")
Expected = dict[str, tuple[Tensor, Tensor]]
"""By output: what it should be, in fp64, and how far off it may be."""


def _ulp(magnitude: Tensor, dtype: str) -> Tensor:
    """Two units in the last place: some roundings and a GPU's approximate rsqrt. The interpreter truncates to bf16."""
    info = torch.finfo(TORCH[dtype])
    return 2 * info.eps * magnitude.abs().clamp(min=info.tiny)


def _folded(pair: PairSpec, values: dict[str, Any]) -> Expected:
    """Over the powers of two that were written, where there is prescale; those themselves to a factor of two."""
    double: list[Any] = _double(values, *PARAMETERS)
    keywords: dict[str, Any] = {"eps": pair.eps, "transposed": pair.transposed, "groups": pair.groups}
    found: Expected = {}
    if pair.prescale:
        power = values["out_power"].double()
        ours = reference.prescale(double[2], double[3], double[5], pair.eps).double()
        found["out_power"] = ours, torch.where(power == torch.exp2(torch.log2(power).round()), ours, 0)
        double[2:4] = _over(double[2], double[3], power)
    weight, bias = reference.fold_reference(*double, **keywords)
    scale = torch.rsqrt(double[5] + pair.eps) * (1 if double[2] is None else double[2])
    centred = ((0 if double[1] is None else double[1]) - double[4]) * scale
    terms = centred.abs() + (bias - centred).abs()  # they may cancel
    return found | {
        "out_weight": (weight, _ulp(weight, pair.out) + _ulp(weight, pair.compute)),
        "out_bias": (bias, _ulp(bias, pair.out) + _ulp(terms, pair.compute)),
    }


def _over(bn_weight: Tensor | None, bn_bias: Tensor | None, power: Tensor) -> list[Tensor | None]:
    """The affine parameters over q."""
    return [reference.divided(bn_weight, power), None if bn_bias is None else reference.divided(bn_bias, power)]


def _gradients(spec: GradSpec, values: dict[str, Any]) -> Expected:
    pair = spec.pair
    grad_weight, grad_bias = _double(values, "grad_weight", "grad_bias")
    double: list[Any] = _double(values, *PARAMETERS)
    keywords: dict[str, Any] = {"eps": pair.eps, "transposed": pair.transposed, "groups": pair.groups}
    power = values["power"].double() if pair.prescale else torch.ones_like(double[5])
    double[2:4] = _over(double[2], double[3], power)

    def gradients(grad_bias: Tensor | None, *tensors: Any) -> dict[str, Tensor | None]:
        rows = None if grad_bias is None else grad_bias.reshape(-1, pair.channels).sum(0)
        dw, db, *affine = reference.fold_backward_reference(tensors[0], rows, *tensors[1:], **keywords)
        d_bn_weight, d_bn_bias = (None if each is None else each / power for each in affine)
        return {"d_weight": dw, "d_bias": db, "d_bn_weight": d_bn_weight, "d_bn_bias": d_bn_bias}

    exact = gradients(grad_bias, grad_weight, *double)
    # The same of magnitudes: every term of every sum, none cancelled. -|mean| makes |b| + |mean| of b - mean.
    sizes: list[Any] = [None if t is None else t.abs() for t in (grad_bias, grad_weight, *double)]
    sizes[6] = -sizes[6]
    if sizes[3] is None:
        sizes[3] = torch.zeros(pair.channels, dtype=torch.float64, device=sizes[6].device)
    terms = gradients(*sizes)
    # A sum of n terms is off by at most (n - 1) roundings of them all. Here a lane adds every 32nd or fewer, and a tree
    # comes last.
    chain = {"d_weight": 1, "d_bias": spec.bias_rows, "d_bn_bias": spec.bias_rows}
    chain["d_bn_weight"] = pair.numel // max(1, pair.channels) // 32 + spec.bias_rows + 32
    found: Expected = {}
    for name, wanted in spec.needs._asdict().items():
        value, size = exact[f"d_{name}"], terms[f"d_{name}"]
        if wanted and value is not None and size is not None:
            allowed = _ulp(value, getattr(pair, name)) + chain[f"d_{name}"] / 2 * _ulp(size, spec.compute)
            found[f"d_{name}"] = value, allowed
    return found
