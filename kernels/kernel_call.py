"""One call of generated kernels on random inputs, checked against the oracle in `testing`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .inputs import POWER_DTYPE, FoldInputs
from .kernel_source import KernelSource
from .launch import launch
from .spec import GradSpec, PairSpec
from .testing import MAX_ULPS, TORCH_DTYPES, Guarded, errors_in_ulps, exact_fold, exact_gradients, wrong_powers


def random_pair(pair: PairSpec, device: torch.device, generator: torch.Generator) -> FoldInputs:
    """Return tensors of a spec: normal values, and variances over three and a half decades."""

    def normal(*shape: int, dtype: str | None) -> Any:
        return None if dtype is None else torch.randn(*shape, generator=generator).to(device, TORCH_DTYPES[dtype])

    n = pair.channels
    weight = normal(pair.rows, pair.cols, pair.taps, 1, dtype=pair.weight)
    var = torch.empty(n).uniform_(-4, 4, generator=generator).exp()
    return FoldInputs(
        weight=weight.contiguous(memory_format=_layout(pair.weight_last)),
        bias=normal(n, dtype=pair.bias),
        bn_weight=normal(n, dtype=pair.bn_weight),
        bn_bias=normal(n, dtype=pair.bn_bias),
        running_mean=normal(n, dtype=pair.running_mean),
        running_var=var.to(device, TORCH_DTYPES[pair.running_var]),
        eps=pair.eps,
        transposed=pair.transposed,
        groups=pair.groups,
        out_dtype=TORCH_DTYPES[pair.out],
        memory_format=None if pair.out_last == pair.weight_last else _layout(pair.out_last),
        prescale=pair.prescale,
    )


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


class KernelCall:
    """Random inputs and guarded outputs of one call of the generated kernels, forward or backward."""

    def __init__(self, specs: Sequence[PairSpec | GradSpec], device: torch.device, seed: int = 0) -> None:
        self.specs, self.device = specs, device
        self._generator = torch.Generator().manual_seed(seed)
        self._guarded: list[Guarded] = []
        self.pairs = [
            random_pair(spec.pair if isinstance(spec, GradSpec) else spec, device, self._generator) for spec in specs
        ]
        self.values = [self._arguments(spec, pair) for spec, pair in zip(specs, self.pairs, strict=True)]

    def _output(self, like: Tensor, dtype: torch.dtype, layout: torch.memory_format | None = None) -> Tensor:
        self._guarded.append(Guarded.like(like, dtype, layout))
        return self._guarded[-1].tensor

    def _normal(self, *shape: int, dtype: str) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, TORCH_DTYPES[dtype])

    def _arguments(self, spec: PairSpec | GradSpec, pair: FoldInputs) -> dict[str, Any]:
        """Return every argument that a kernel of the pair may have, by field."""
        values: dict[str, Any] = dict(zip(FoldInputs._fields[:6], pair[:6], strict=True))
        if isinstance(spec, PairSpec):
            out = TORCH_DTYPES[spec.out]
            values["out_weight"] = self._output(pair.weight, out, pair.memory_format)
            values["out_bias"] = self._output(pair.running_mean, out)
            values["out_power"] = self._output(pair.running_mean, POWER_DTYPE) if spec.prescale else None
            return values
        n = spec.pair.channels
        if spec.pair.prescale:
            exponents = torch.randint(-2, 16, (n,), generator=self._generator)
            values["power"] = torch.exp2(exponents.float()).to(self.device, POWER_DTYPE)
        if spec.grad_weight is not None:
            grad = self._normal(*pair.weight.shape, dtype=spec.grad_weight)
            values["grad_weight"] = grad.contiguous(memory_format=_layout(spec.grad_last))
        if spec.grad_bias is not None:
            rows = () if spec.bias_rows == 1 else (spec.bias_rows,)
            values["grad_bias"] = self._normal(*rows, n, dtype=spec.grad_bias)
        for name in (name for name, needed in spec.needs._asdict().items() if needed):
            values[f"d_{name}"] = self._output(values[name], values[name].dtype)
        return values

    def run(self, sources: Sequence[tuple[slice, KernelSource]]) -> None:
        """Launch each kernel on its part of the pairs, in order."""
        for part, source in sources:
            launch(source, self.values[part], self.device)

    def errors(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yield the name of each output, the errors of its elements in ulps, and the allowed error.

        q is a power of two, so it is right or wrong: its error is 0 or 1, and 0 is allowed.
        """
        for number, (spec, pair, values) in enumerate(zip(self.specs, self.pairs, self.values, strict=True)):
            if isinstance(spec, PairSpec):
                q = values["out_power"]
                if q is not None:
                    yield f"out_power of pair {number}", wrong_powers(pair, q).double(), 0.0
                exact = dict(zip(("out_weight", "out_bias"), exact_fold(pair, q), strict=True))
            else:
                grads = values.get("grad_weight"), values.get("grad_bias"), values.get("power")
                every = exact_gradients(pair, *grads)
                exact = {f"d_{name}": value for name, value in every.items() if getattr(spec.needs, name)}
            for name, value in exact.items():
                found = values[name]
                yield f"{name} of pair {number}", errors_in_ulps(found, value), MAX_ULPS[found.dtype]

    def wrong(self) -> str | None:
        """Return what is wrong with the outputs, in words; None if they are right."""
        if not all(each.intact() for each in self._guarded):
            return "written outside an output"
        for name, errors, allowed in self.errors():
            mask = ~(errors <= allowed)  # NaN is wrong
            if mask.any():
                return f"{name}: {int(mask.sum())} of {mask.numel()} elements are wrong"
        return None
