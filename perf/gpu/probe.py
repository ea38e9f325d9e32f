"""Compare cuDNN's fused operators with a convolution and the pointwise kernel that Inductor generates after it.

Each distinct convolution of a model is timed with bias and ReLU, and with bias, addition and ReLU. Only torch's own
operators are used.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..results import Key, Report
from .bench import Bench
from .models import subject_of

aten = torch.ops.aten
Layer = tuple[str, nn.Conv2d, tuple[int, ...]]


def layers_of(bench: Bench, model: str | None) -> list[Layer]:
    """Return (name, convolution, shape of the input) of each distinct layer."""
    own = subject_of(bench, model, "infer", "float32", 1)
    found: dict[str, Layer] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def remember(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, nn.Conv2d)
            shape = tuple(inputs[0].shape[1:])
            found.setdefault(f"{module} {shape}", (f"{own.key.case}/{name}", module, shape))

        return remember

    for name, module in own.model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        own.model(own.x)
    return list(found.values())


@torch.compile(dynamic=False)
def _relu(y: Tensor, bias: Tensor) -> Tensor:
    return torch.relu(y + bias.view(1, -1, 1, 1))


@torch.compile(dynamic=False)
def _add_relu(y: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    return torch.relu(y + bias.view(1, -1, 1, 1) + other)


def fused_probe(bench: Bench, report: Report, model: str | None, batch: int) -> Iterator[None]:
    """Compile the pointwise kernel after each convolution, then time the fused and the separate calls."""
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 1000
    layers = layers_of(bench, model)
    settings = [(layer, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32) for layer in layers]
    settings = settings[: 1 if bench.dry else None]
    last: Callable[[], object] = lambda: None  # noqa: E731
    with torch.no_grad():
        for layer, dtype in settings:
            for *_, last in _ways(bench, layer, dtype, batch):
                last()
        bench.free()
        yield
        for layer, dtype in settings:
            for mode, fused, separate in _ways(bench, layer, dtype, batch):
                key = Key(layer[0], "cudnn_fused", mode, str(dtype).removeprefix("torch."), "channels_last", batch)
                with report.keeping(key, "gpu_time", "ms"):
                    one, two = fused().double(), separate().double()
                    report.checked(key, "difference", "1", ((one - two).abs().max() / two.abs().max()).item(), 0.02)
                    del one, two
                    first = bench.gpu_milliseconds(fused, 20)
                    other = bench.gpu_milliseconds(separate, 20)
                    report.measured(key, "gpu_time", "ms", first)
                    report.measured(key._replace(provider="inductor_separate"), "gpu_time", "ms", other)
                    report.measured(key, "time_over_separate", "1", first[0] / other[0])


Way = tuple[str, Callable[[], Tensor], Callable[[], Tensor]]


def _ways(bench: Bench, layer: Layer, dtype: torch.dtype, batch: int) -> list[Way]:
    """Return (mode, fused call, separate call) of each fusion."""
    _, conv, shape = layer
    torch.manual_seed(0)

    def tensor(*size: int) -> Tensor:
        made = torch.randn(*size, device=bench.device, dtype=dtype)
        return made.contiguous(memory_format=torch.channels_last) if len(size) == 4 else made

    x, weight, bias = tensor(batch, *shape), tensor(*conv.weight.shape) / 10, tensor(conv.out_channels)
    geometry: Any = conv.stride, conv.padding, conv.dilation, conv.groups

    def convolved(with_bias: Tensor | None = None) -> Tensor:
        return torch.conv2d(x, weight, with_bias, *geometry)

    z = torch.randn_like(convolved())

    def fused_relu() -> Tensor:
        if bench.dry:  # the CPU has no such operator
            return torch.relu(convolved(bias))
        return aten.cudnn_convolution_relu(x, weight, bias, *geometry)

    def fused_add_relu() -> Tensor:
        if bench.dry:
            return torch.relu(convolved(bias) + z)
        return aten.cudnn_convolution_add_relu(x, weight, z, 1.0, bias, *geometry)

    return [
        ("relu", fused_relu, lambda: _relu(convolved(), bias)),
        ("add_relu", fused_add_relu, lambda: _add_relu(convolved(), bias, z)),
    ]
