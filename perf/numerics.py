"""How exact the fold is: python -m triton_convbn.perf.numerics --csv perf/results/numerics.csv

The error of the output and of the gradients against eager fp64, of a deep network and of single pairs with hostile
statistics, for eager, Inductor, Inductor's own pass and ours. Weights, affine parameters and statistics are random; a
fresh BatchNorm would hide every error. The statistics of the network are those of its activations, as after training.

An error is the root of the mean square over that of the exact values; that of gradients is the root mean square over
all parameters. `over_eager` is its ratio to unfused eager's. The CSV has the geometric mean of all seeds, under p50,
and their 20th and 80th percentile.
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from triton_convbn import ConvBNPass
from triton_convbn.errors import UsageError

from .subject import DTYPES
from .table import Key, Log, Row, environment, percentiles, processor


def folded_graph(gm: fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
    """A backend of `torch.compile`: the graph with its pairs folded, without code generation."""
    ConvBNPass(when="always")(gm.graph)
    gm.recompile()
    return gm.forward


PROVIDERS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "folded_graph": {"backend": folded_graph},
    "inductor": {},
    "inductor_efficient_conv_bn": {"options": {"efficient_conv_bn_eval_fx_passes": True}},
    "triton_convbn": {"backend": "triton_convbn", "options": {"when": "always"}},
}
DTYPE_NAMES = ("float32", "bfloat16", "float16", "autocast_bfloat16", "autocast_float16")


class Errors(NamedTuple):
    """Relative errors, root mean square: of the output, and the root mean square over every gradient."""

    output: float
    gradients: float


SMOOTH = "_with_silu"
"""A ReLU near its kink may go either way, which moves the gradients in fp32 by far more than rounding. So they are
measured in the same network without kinks as well."""


def network(name: str, seed: int) -> nn.Module:
    """A torchvision network with random affine parameters, whose statistics are those of its own activations. Its
    ReLUs are replaced where the name says so."""
    try:
        import torchvision
    except ImportError as error:
        raise UsageError("numerics needs torchvision: pip install 'triton_convbn[models]'") from error
    torch.manual_seed(seed)
    model = torchvision.models.get_model(name.removesuffix(SMOOTH), weights=None, num_classes=10)
    for module in list(model.modules()) if name.endswith(SMOOTH) else ():
        for child, layer in module.named_children():
            if isinstance(layer, nn.ReLU):
                setattr(module, child, nn.SiLU())
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.3, 1.2)
        nn.init.normal_(norm.bias, std=0.2)
    for block in model.modules():
        last = getattr(block, "bn3", None)
        if isinstance(
            last, _BatchNorm
        ):  # the branches of a trained network add little, or errors would grow chaotically
            nn.init.uniform_(last.weight, 0.05, 0.2)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    return model.eval()


class Hostile(NamedTuple):
    """Of a single pair: the variance, the factor of the scale, and that of the input."""

    var: float = 1.0
    gamma: float = 1.0
    x: float = 1.0


HOSTILE = {
    "ordinary_pair": Hostile(),
    "variance_1e-8": Hostile(var=1e-8, x=1e-4),
    "scale_1e4": Hostile(gamma=1e4),
    "subnormal_results": Hostile(gamma=1e-5),
}


def pair(case: str, seed: int) -> nn.Module:
    """Conv2d(16, 16, 3) and a BatchNorm with the statistics of this case, centred on the convolution's output."""
    torch.manual_seed(seed)
    conv, bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, eps=1e-12)
    hostile = HOSTILE[case]
    with torch.no_grad():
        assert bn.running_mean is not None
        assert bn.running_var is not None
        assert conv.bias is not None
        bn.running_mean.copy_(conv.bias)
        bn.running_var.copy_((torch.rand(16) + 0.5) * hostile.var)
        bn.weight.copy_((torch.rand(16) + 0.5) * hostile.gamma)
        bn.bias.copy_(torch.randn(16) * 0.1 * hostile.gamma)
    return nn.Sequential(conv, bn).eval()


def results(
    run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, autocast: torch.dtype | None
) -> dict[str, Tensor]:
    """The output, and every gradient of the sum of its squares."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = run(x)
    wide = output.to(torch.promote_types(output.dtype, torch.float32))
    (wide * torch.linspace(-1, 2, wide.shape[-1], dtype=wide.dtype)).sum().backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"": output.detach().double(), **gradients}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> Errors:
    each = {name: ((found[name] - want).norm() / want.norm()).item() for name, want in exact.items() if want.norm() > 0}
    gradients = [error for name, error in each.items() if name]
    return Errors(each[""], math.sqrt(sum(error * error for error in gradients) / len(gradients)))


def measure(
    build: Callable[[int], nn.Module], x: Tensor, dtype: str, providers: Iterable[str], seeds: Iterable[int]
) -> dict[str, list[Errors] | str]:
    """Of each provider its errors, one for each seed, or the first line of the exception that it raised.

    Only the parameters' values differ between seeds, so that a compiled network is compiled once.
    """
    own, autocast = DTYPES[dtype]
    given = x.to(own)
    torch._dynamo.reset()
    models = {provider: build(0).to(own) for provider in providers}
    runs = {name: model if PROVIDERS[name] is None else _compiled(model, name) for name, model in models.items()}
    found: dict[str, list[Errors] | str] = {name: [] for name in models}
    for seed in seeds:
        values = build(seed).to(own)
        double = copy.deepcopy(values).double()
        exact = results(double, double, given.double(), None)
        for name, model in models.items():
            so_far = found[name]
            if isinstance(so_far, str):
                continue
            model.load_state_dict(values.state_dict())
            try:
                so_far.append(errors(results(runs[name], model, given, autocast), exact))
            except Exception as error:  # Inductor's own pass does not compile every dtype
                found[name] = " ".join(str(error).split())[:200]
    return found


def _compiled(model: nn.Module, provider: str) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, **PROVIDERS[provider] or {})


def cases(name: str, size: int) -> Iterator[tuple[str, Callable[[int], nn.Module], Tensor]]:
    for case in (name, name + SMOOTH):
        torch.manual_seed(1)
        yield case, lambda seed, case=case: network(case, seed), torch.randn(2, 3, size, size)  # type: ignore[misc]
    for case, hostile in HOSTILE.items():
        yield case, lambda seed, case=case: pair(case, seed), torch.randn(2, 16, 16, 16) * hostile.x  # type: ignore[misc]


def main(
    csv_: Annotated[Path, typer.Option("--csv", metavar="FILE", help="Where the rows go; what it holds stays.")],
    model: Annotated[str, typer.Option(help="A torchvision network.")] = "resnet50",
    size: Annotated[int, typer.Option(min=32, help="Height and width of its input.")] = 64,
    seeds: Annotated[int, typer.Option(min=2, help="How many sets of random parameters.")] = 16,
    provider: Annotated[list[str] | None, typer.Option(help="Which of them; default all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Which dtypes; default all.")] = None,
    case_: Annotated[list[str] | None, typer.Option("--case", help="Which of the cases; default all.")] = None,
) -> None:
    """Measure the errors of outputs and gradients against fp64."""
    wanted = _chosen("provider", provider, tuple(PROVIDERS)), _chosen("dtype", dtype, DTYPE_NAMES)
    chosen = _chosen("case", case_, (model, model + SMOOTH, *HOSTILE))
    torch.set_num_threads(1)
    where = environment(processor())
    try:
        log = Log(csv_)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    done = {(row.case, row.provider, row.dtype) for row in log.earlier}
    work = [(*case, name) for case in cases(model, size) if case[0] in chosen for name in wanted[1]]
    work = [each for each in work if each[3] == "float32" or not each[0].endswith(SMOOTH)]
    for case, build, x, name in track(work, "numerics", console=Console(stderr=True)):
        missing = [each for each in wanted[0] if (case, each, name) not in done]
        found = measure(build, x, name, dict.fromkeys(("eager", *missing)), range(seeds)) if missing else {}
        for each in missing:
            for row in rows(
                Key(case, each, "train", name, "contiguous", x.shape[0]), found[each], found["eager"], where
            ):
                log.append(row)


def _chosen(what: str, asked: list[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    unknown = sorted(set(asked or ()) - set(known))
    if unknown:
        raise UsageError(f"no such {what}: {', '.join(unknown)}; choose from {', '.join(known)}")
    return tuple(asked or known)


def rows(
    key: Key, found: list[Errors] | str, eager: list[Errors] | str, where: tuple[str, str, str, str]
) -> Iterator[Row]:
    """The errors and their ratios to unfused eager's: geometric mean, 20th and 80th percentile over the seeds."""
    if isinstance(found, str) or isinstance(eager, str):
        error = found if isinstance(found, str) else eager
        yield Row(*key, "output_rms", "1", math.nan, math.nan, math.nan, "failed", str(error), *where)
        return
    for metric in Errors._fields:
        ours, theirs = ([getattr(each, metric) for each in which] for which in (found, eager))
        ratios = [a / b if math.isfinite(b) else math.nan for a, b in zip(ours, theirs, strict=True)]
        for name, values in ((f"{metric}_rms", ours), (f"{metric}_over_eager", ratios)):
            if all(map(math.isfinite, values)):
                figures = (statistics.geometric_mean(values), *percentiles(values)[1:])
                yield Row(*key, name, "1", *figures, "ok", "", *where)
            else:
                error = "not finite" if not all(map(math.isfinite, ours)) else "not finite in eager"
                yield Row(*key, name, "1", math.nan, math.nan, math.nan, "failed", error, *where)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        Console(stderr=True).print(f"numerics: {error}")
        raise SystemExit(2) from None
