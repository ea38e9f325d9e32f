"""ResNet-18 with frozen statistics, through everything: what the pass changes in results, memory and time."""

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import UsageError
from .measure import ratio, rounds, saved_for_backward
from .models import load, randomize

COMPILED: dict[str, dict[str, Any]] = {
    "Inductor": {},
    "Inductor + its own pass": {"options": {"efficient_conv_bn_eval_fx_passes": True}},
    "triton_convbn": {"backend": "triton_convbn"},
}


@dataclass(frozen=True)
class Line:
    """One way to run the model. Errors are relative to the largest magnitude of the fp64 reference, time to eager."""

    provider: str
    pairs: int
    output_error: float
    gradient_error: float
    worst_gradient: str
    saved_mb: float
    time_ratio: float


@dataclass(frozen=True)
class Demo:
    model: str
    batch: int
    batch_norms: int
    device: str
    torch: str
    rounds: int
    lines: tuple[Line, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def run(
    model_name: str = "resnet18",
    batch: int = 4,
    size: int = 224,
    count: int = 7,
    seed: int = 0,
    step: Callable[[str], None] = lambda _text: None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Demo:
    """Run one training step of a model in every way, on the CPU, and compare.

    Args:
        batch, size: the input is random, ``(batch, 3, size, size)``, fp32.
        count: timed rounds.
        step: told what is being done.
        progress: wraps the timed rounds.
    """
    torch.manual_seed(seed)
    model = randomize(load(model_name), seed)
    x = torch.randn(batch, 3, size, size)
    step("eager in fp64")
    _try(model, x)
    double = copy.deepcopy(model).double()
    reference = _results(double, x.double(), double)
    torch._dynamo.reset()
    ways: dict[str, Callable[[Tensor], Tensor]] = {"eager": model}
    ways |= {name: torch.compile(model, **keywords) for name, keywords in COMPILED.items()}
    lines: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        step(f"{name}: compile, forward, backward" if way is not model else f"{name}: forward, backward")
        # A graph out of a cache skips the pass, and with it the count of its pairs.
        with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
            before = counters["inductor"]["efficient_conv_bn_eval"]
            results = _results(way, x, model)
            pairs = counters["inductor"]["efficient_conv_bn_eval"] - before
        with saved_for_backward(model) as saved:
            way(x)
        output, gradient, worst = _errors(results, reference)
        lines[name] = {
            "pairs": pairs,
            "output_error": output,
            "gradient_error": gradient,
            "worst_gradient": worst,
            "saved_mb": saved.total / 1e6,
        }
    step("step times, in turn")
    seconds = rounds({name: lambda way=way: way(x).sum().backward() for name, way in ways.items()}, count, progress)  # type: ignore[misc]
    model.zero_grad()
    return Demo(
        model_name,
        batch,
        sum(isinstance(module, _BatchNorm) for module in model.modules()),
        "cpu",
        torch.__version__,
        count,
        tuple(
            Line(provider=name, time_ratio=ratio(seconds[name], seconds["eager"]), **line)
            for name, line in lines.items()
        ),
    )


def _try(model: nn.Module, x: Tensor) -> None:
    """One line instead of a traceback for a model that is not what the demonstration can run."""
    try:
        output = model(x)
    except Exception as error:
        raise UsageError(f"the model does not run on an input of shape {tuple(x.shape)}: {error}") from error
    if not isinstance(output, Tensor):
        raise UsageError(f"the model returns {type(output).__name__}; the demonstration compares a single tensor")
    if not output.requires_grad:
        raise UsageError("the model has nothing to train: no parameter of it requires a gradient")


def _results(way: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """The output and every parameter's gradient of one step; the loss weighs the outputs differently."""
    model.zero_grad()
    output = way(x)
    (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).sum().backward()
    results = {"": output.detach().double()}
    results |= {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return results


def _errors(results: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, float, str]:
    """The error of the output, and the largest of the gradients with the name of its parameter."""
    if results.keys() != reference.keys():
        missing = sorted(results.keys() ^ reference.keys())
        raise RuntimeError(f"gradients differ in presence: {', '.join(missing)}")
    relative = {
        name: ((results[name] - exact).abs().max() / exact.abs().max().clamp_min(1e-300)).item()
        for name, exact in reference.items()
    }
    output = relative.pop("")
    worst = max(relative, key=relative.__getitem__)
    return output, relative[worst], worst
