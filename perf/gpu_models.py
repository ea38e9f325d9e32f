"""The part of the GPU check that runs a model: a training step and an inference, in every way to run them.

Training here is a forward and a backward with frozen statistics and trainable affine parameters; no optimizer. TF32 and
cuDNN are left as torch sets them, for all alike: the errors of eager are what the others' compare with.
"""

import copy
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from triton_convbn.errors import UsageError
from triton_convbn.measure import rounds, saved_for_backward
from triton_convbn.models import example_input, load, randomize

from .gpu_bench import Bench, Case, Report
from .table import percentiles

# What torch.compile is given; None: not compiled.
PROVIDERS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {},
    "inductor_efficient_conv_bn": {"options": {"efficient_conv_bn_eval_fx_passes": True}},
    "triton_convbn": {"backend": "triton_convbn"},
    "triton_convbn_no_recompute": {"backend": "triton_convbn", "options": {"recompute": False}},
}
FOLDING = ("inductor_efficient_conv_bn", "triton_convbn", "triton_convbn_no_recompute")


def allowed(metric: str, eager: float) -> float:
    """The relative error that others may have where eager has this one. A wrong fold is off by about 1. Rounding
    differs from way to way, and in a gradient a ReLU that decides otherwise on the last bit makes far more of that."""
    loose = max(0.5, 2 * eager)
    return loose if metric == "gradient_error" else max(1e-4, min(10 * eager, loose))


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions (arXiv 1512.03385), the stride at the second."""

    def __init__(self, inputs: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Sequential(*shortcut) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.shortcut(x))


def resnet(blocks: tuple[int, ...], width: int, classes: int) -> nn.Module:
    """A ResNet of bottlenecks, for machines without torchvision: (3, 4, 6, 3) of width 64 has ResNet-50's shapes."""
    stem = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    layers: list[nn.Module] = list(stem)
    inputs = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(inputs, width << stage, 2 if stage and not block else 1, project=not block))
            inputs = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)).eval()


def tiny() -> nn.Module:
    """Two pairs, for a dry run: Inductor compiles it sixteen times. No ReLU, see `allowed`."""
    first = nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.Tanh()
    return nn.Sequential(*first, nn.Conv2d(4, 8, 3, 2), nn.BatchNorm2d(8), nn.Flatten()).eval()


class Subject(NamedTuple):
    """A model with random statistics, and its input."""

    name: str
    model: nn.Module
    x: Tensor


def subject(bench: Bench, name: str | None, batch: int, say: Callable[[str], None]) -> Subject:
    """The model of that name; by default ResNet-50, in a dry run a tiny one.

    Raises: UsageError for a name that is not known here.
    """
    torch.manual_seed(0)
    size = None
    if bench.dry:
        torch.set_num_threads(1)  # nothing here is large enough for two
        size = 16 if name is None else 64
    if name is None and bench.dry:
        name, model = "tiny", tiny()
    else:
        try:
            model = load(name or "resnet50")
        except UsageError as error:
            if name is not None:
                raise
            say(f"a ResNet of its own in the place of torchvision's: {error}")
            name, model = "own_resnet50", resnet((3, 4, 6, 3), 64, 1000)
    x = example_input(model, batch, size)
    return Subject(name or "resnet50", randomize(model).to(bench.device), x.to(bench.device))


def run(way: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, train: bool, autocast: bool) -> dict[str, Tensor]:
    """One step: the output, under "", and every gradient. The loss weighs the outputs differently."""
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(train):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            output = way(x)
        if train:
            wide = torch.float64 if output.dtype == torch.float64 else torch.float32
            (output.to(wide) * torch.linspace(-1, 1, output.shape[-1], dtype=wide, device=x.device)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"": output.detach(), **found}


def models(bench: Bench, report: Report, subject: Subject, rounds_: int) -> None:
    """Training and inference, fp32 and autocast, in every way."""
    report.say(f"{subject.name}: eager in fp64")
    double = copy.deepcopy(subject.model).double()
    exact = {name: t.cpu() for name, t in run(double, double, subject.x.double(), True, False).items()}
    del double
    bench.free()
    for train in (True, False):
        for autocast in (False, True):
            _compare(bench, report, subject, exact, train, autocast, rounds_)


def _compare(
    bench: Bench, report: Report, subject: Subject, exact: dict[str, Tensor], train: bool, autocast: bool, rounds_: int
) -> None:
    name, model, x = subject
    torch._dynamo.reset()
    dtype = "autocast_bfloat16" if autocast else "float32"
    base = Case(name, mode="train" if train else "infer", dtype=dtype, batch=len(x))
    steps: dict[str, Callable[[], object]] = {}
    limits: dict[str, float] = {}
    for provider, keywords in PROVIDERS.items():
        case = base._replace(provider=provider)
        report.say(f"{name} {case.mode} {dtype}: {provider}")
        with report.keeping(case, "run"):
            way = model if keywords is None else torch.compile(model, **keywords)

            def step(way: Callable[[Tensor], Tensor] = way) -> dict[str, Tensor]:
                return run(way, model, x, train, autocast)

            # A graph out of a cache skips the pass, and with it the count of its pairs.
            with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
                before, start = counters["inductor"]["efficient_conv_bn_eval"], time.perf_counter()
                found = step()
                bench.synchronize()
            report.measured(case, "first_call", "s", time.perf_counter() - start)
            pairs = counters["inductor"]["efficient_conv_bn_eval"] - before
            if provider in FOLDING and not pairs:
                raise RuntimeError("no pair was folded")
            report.measured(case, "pairs_folded", "pairs", pairs)
            _errors(report, case, found, exact, train, limits)
            del found
            if train:
                _memory_kept(report, case, model, x, way, autocast)
            if bench.dry:
                report.skipped(case, "peak_memory", "bytes", "counted by CUDA's allocator, not in a dry run")
            else:
                bench.free()
                report.measured(case, "peak_memory", "bytes", bench.peak_bytes(step))
            steps[provider] = step
        model.zero_grad(set_to_none=True)
        bench.free()
    report.say(f"{name} {base.mode} {dtype}: {rounds_} rounds")
    with report.keeping(base._replace(provider="all"), "time", "ms"):
        seconds = rounds(steps, rounds_, clock=bench.clock)
        for provider, found_ in seconds.items():
            case = base._replace(provider=provider)
            report.measured(case, "time", "ms", percentiles([1e3 * s for s in found_]))
            if "inductor" in seconds:
                ratios = [a / b for a, b in zip(found_, seconds["inductor"], strict=True)]
                report.measured(case, "time_over_inductor", "1", percentiles(ratios))
    model.zero_grad(set_to_none=True)


def _errors(
    report: Report,
    case: Case,
    found: dict[str, Tensor],
    exact: dict[str, Tensor],
    train: bool,
    limits: dict[str, float],
) -> None:
    """The largest error of the output and of any gradient, relative to the largest magnitude of the exact tensor."""
    if train and found.keys() != exact.keys():
        raise RuntimeError(f"gradients differ in presence: {', '.join(sorted(found.keys() ^ exact.keys()))}")
    errors = {
        name: ((t.cpu().double() - exact[name]).abs().max() / exact[name].abs().max().clamp_min(1e-300)).item()
        for name, t in found.items()
    }
    worst = {"output_error": ("output", errors.pop(""))}
    if errors:
        name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        worst["gradient_error"] = (name, errors[name])
    for metric, (name, error) in worst.items():
        if case.provider == "eager":
            limits[metric] = allowed(metric, error)
        report.checked(case, metric, "1", error, limits.get(metric, 1.0), name)


def _memory_kept(
    report: Report, case: Case, model: nn.Module, x: Tensor, way: Callable[[Tensor], Tensor], autocast: bool
) -> None:
    with (
        saved_for_backward(model) as saved,
        torch.autocast(x.device.type, torch.bfloat16, enabled=autocast),
    ):
        way(x)
    report.measured(case, "saved_for_backward", "bytes", saved.total)
