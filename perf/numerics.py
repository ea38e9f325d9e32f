"""Measure the errors of outputs and gradients against eager in fp64.

    python -m triton_convbn.perf.numerics --csv perf/results/numerics.csv

The cases are a deep network and single pairs with extreme statistics, run by eager, Inductor, Inductor's own pass and
ours. Parameters and statistics are random, as a freshly initialized BatchNorm would hide every error. The network's
statistics are those of its own activations, as after training.

An error is the norm of the difference over the norm of the exact values, and that of gradients the root mean square
over all parameters. `over_eager` is the ratio to the error of unfused eager. The CSV has the geometric mean over all
seeds under p50, and the 20th and 80th percentile.
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from triton_convbn.errors import UsageError

from .steps import Result, folded_graph, open_log, progress, relative_error, run_command, step
from .subject import DTYPES
from .table import Key, Row, environment, percentiles, processor

PROVIDERS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "folded_graph": {"backend": folded_graph},
    "inductor": {},
    "inductor_efficient_conv_bn": {"options": {"efficient_conv_bn_eval_fx_passes": True}},
    "triton_convbn": {"backend": "triton_convbn", "options": {"when": "always"}},
}
DTYPE_NAMES = ("float32", "bfloat16", "float16", "autocast_bfloat16", "autocast_float16")


class Errors(NamedTuple):
    """Relative errors of the output, and of all gradients as a root mean square."""

    output: float
    gradients: float


SMOOTH = "_with_silu"
"""Suffix of the network with SiLU for ReLU. Rounding may move a ReLU's input across zero, which changes fp32 gradients
by far more than rounding does, so they are also measured without kinks."""


def network(name: str, seed: int) -> nn.Module:
    """Return a torchvision network with random affine parameters and the statistics of its own activations."""
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
    for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.3, 1.2)
        nn.init.normal_(norm.bias, std=0.2)
    for block in model.modules():
        last = getattr(block, "bn3", None)
        if isinstance(last, _BatchNorm):  # as in a trained network, branches add little, or errors grow chaotically
            nn.init.uniform_(last.weight, 0.05, 0.2)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    return model.eval()


class Hostile(NamedTuple):
    """Factors of a single pair's variance, scale and input."""

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
    """Return Conv2d(16, 16, 3) and a BatchNorm with the statistics of the case, centred on the convolution's output."""
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


def loss_weights(output: Tensor) -> Tensor:
    return torch.linspace(-1, 2, output.shape[-1], dtype=torch.promote_types(output.dtype, torch.float32))


def errors(found: Result, exact: Result) -> Errors:
    """Return the errors of the output and of all gradients that are not zero."""
    each = [relative_error(found.gradients[name], want) for name, want in exact.gradients.items() if want.norm() > 0]
    rms = math.sqrt(sum(error * error for error in each) / len(each))
    return Errors(relative_error(found.outputs[0], exact.outputs[0]), rms)


def measure(
    build: Callable[[int], nn.Module], x: Tensor, dtype: str, providers: Iterable[str], seeds: Iterable[int]
) -> dict[str, list[Errors] | str]:
    """Return for each provider its errors for each seed, or the message of the exception that it raised.

    Each provider compiles once and loads the parameters of every seed.
    """
    own, autocast = DTYPES[dtype]
    given = x.to(own)
    torch._dynamo.reset()
    models = {provider: build(0).to(own) for provider in providers}
    runs = {name: _compiled(model, PROVIDERS[name]) for name, model in models.items()}
    found: dict[str, list[Errors] | str] = {name: [] for name in models}
    for seed in seeds:
        values = build(seed).to(own)
        double = copy.deepcopy(values).double()
        exact = step(double, double, given.double(), loss_weights)
        for name, model in models.items():
            so_far = found[name]
            if isinstance(so_far, str):
                continue
            model.load_state_dict(values.state_dict())
            try:
                so_far.append(errors(step(runs[name], model, given, loss_weights, autocast), exact))
            except Exception as error:  # Inductor's own pass does not compile every dtype
                found[name] = " ".join(str(error).split())[:200]
    return found


def _compiled(model: nn.Module, options: dict[str, Any] | None) -> Callable[[Tensor], Tensor]:
    return model if options is None else torch.compile(model, **options)


def cases(name: str, size: int) -> Iterator[tuple[str, Callable[[int], nn.Module], Tensor]]:
    """Yield each case's name, a function that builds its model for a seed, and its input."""
    for case in (name, name + SMOOTH):
        torch.manual_seed(1)
        yield case, lambda seed, case=case: network(case, seed), torch.randn(2, 3, size, size)  # type: ignore[misc]
    for case, hostile in HOSTILE.items():
        yield case, lambda seed, case=case: pair(case, seed), torch.randn(2, 16, 16, 16) * hostile.x  # type: ignore[misc]


def command(
    csv_: Annotated[Path, typer.Option("--csv", metavar="FILE", help="Append rows to this file.")],
    model: Annotated[str, typer.Option(help="A torchvision network.")] = "resnet50",
    size: Annotated[int, typer.Option(min=32, help="Height and width of its input.")] = 64,
    seeds: Annotated[int, typer.Option(min=2, help="Number of sets of random parameters.")] = 16,
    provider: Annotated[list[str] | None, typer.Option(help="Only these providers; default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only these dtypes; default: all.")] = None,
    case_: Annotated[list[str] | None, typer.Option("--case", help="Only these cases; default: all.")] = None,
) -> None:
    """Measure the errors of outputs and gradients against fp64. What is in the CSV is not measured again."""
    providers, dtypes = _chosen("provider", provider, tuple(PROVIDERS)), _chosen("dtype", dtype, DTYPE_NAMES)
    chosen = _chosen("case", case_, (model, model + SMOOTH, *HOSTILE))
    torch.set_num_threads(1)
    where, log = environment(processor()), open_log(csv_)
    done = {(row.case, row.provider, row.dtype) for row in log.earlier}
    work = [(*case, name) for case in cases(model, size) if case[0] in chosen for name in dtypes]
    work = [each for each in work if each[3] == "float32" or not each[0].endswith(SMOOTH)]
    for case, build, x, name in progress(work, "numerics"):
        missing = [each for each in providers if (case, each, name) not in done]
        found = measure(build, x, name, dict.fromkeys(("eager", *missing)), range(seeds)) if missing else {}
        for each in missing:
            key = Key(case, each, "train", name, "contiguous", x.shape[0])
            for row in rows(key, found[each], found["eager"], where):
                log.append(row)


def _chosen(what: str, asked: list[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    unknown = sorted(set(asked or ()) - set(known))
    if unknown:
        raise UsageError(f"no such {what}: {', '.join(unknown)}; choose from {', '.join(known)}")
    return tuple(asked or known)


def rows(
    key: Key, found: list[Errors] | str, eager: list[Errors] | str, where: tuple[str, str, str, str]
) -> Iterator[Row]:
    """Yield the rows of the errors and of their ratios to eager's, over all seeds."""
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
    run_command(command)
