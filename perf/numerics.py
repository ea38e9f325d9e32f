"""Measure the errors of outputs and gradients against eager in fp64.

    triton-convbn dev numerics --csv perf/results/numerics.csv

The cases are a deep network, single pairs with extreme statistics, and BatchNorms before a Linear, run by eager,
Inductor, Inductor's own pass and ours. Parameters and statistics are random, as a freshly initialized BatchNorm would
hide every error. The network's statistics are those of its own activations, as after training.

An error is the norm of the difference over the norm of the exact values, and that of gradients the root mean square
over all parameters. `over_eager` is the ratio to the error of unfused eager. The CSV has the geometric mean over all
seeds under p50, and the 20th and 80th percentile.
"""

import copy
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from triton_convbn.errors import choose
from triton_convbn.models import DTYPES, load

from .command import Csv, Json, print_rows, progress
from .environment import processor
from .masks import copy_masks, with_masks
from .providers import PROVIDERS, Compiled, Provider
from .results import Key, Report, percentiles
from .subject import Subject, relative_errors

COMPARED: dict[str, Provider] = {
    "eager": PROVIDERS["eager"],
    "folded_graph": Compiled("folded_graph", "triton_convbn_eager", when="always"),
    "inductor": PROVIDERS["inductor"],
    "inductor_efficient_conv_bn": PROVIDERS["inductor_efficient_conv_bn"],
    "triton_convbn": PROVIDERS["triton_convbn_always"],
    "triton_convbn_channels_last": Compiled(
        "triton_convbn_channels_last", "triton_convbn", when="always", force_layout_optimization=True
    ),
}
"""The providers by their names in the CSV. The last one runs all convolutions channels_last."""

DTYPE_NAMES = ("float32", "bfloat16", "float16", "autocast_bfloat16", "autocast_float16")

MASKED = "_with_masks"
"""Suffix of the network whose ReLUs take their masks from eager in fp64, see `masks`. For fp32 alone."""


def network(name: str, seed: int) -> nn.Module:
    """Return a network with random affine parameters and the statistics of its own activations."""
    torch.manual_seed(seed)
    model = load(name.removesuffix(MASKED))
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
    return with_masks(model.eval()) if name.endswith(MASKED) else model.eval()


HOSTILE = {
    "ordinary_pair": (1.0, 1.0, 1.0),
    "variance_1e-8": (1e-8, 1.0, 1e-4),
    "scale_1e4": (1.0, 1e4, 1.0),
    "subnormal_results": (1.0, 1e-5, 1.0),
}
"""Factors of a single pair's variance, scale and input."""


def pair(case: str, seed: int) -> nn.Module:
    """Return Conv2d(16, 16, 3) and a BatchNorm with the statistics of the case, centred on the convolution's output."""
    torch.manual_seed(seed)
    conv, bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, eps=1e-12)
    var, gamma, _ = HOSTILE[case]
    values = {"running_mean": conv.bias, "running_var": (torch.rand(16) + 0.5) * var}
    values |= {"weight": (torch.rand(16) + 0.5) * gamma, "bias": torch.randn(16) * 0.1 * gamma}
    bn.load_state_dict(values, strict=False)
    return nn.Sequential(conv, bn).eval()


HEADS = {"norm_before_linear": 0.0, "norm_before_linear_mean_3": 3.0, "norm_before_linear_mean_10": 10.0}
"""A BatchNorm before a Linear: the mean of its input, in standard deviations. The last folds under Inductor alone."""


def head(case: str, seed: int) -> nn.Module:
    """Return BatchNorm1d(64) and Linear(64, 32), with statistics close to those of the case's input."""
    torch.manual_seed(seed)
    norm, linear = nn.BatchNorm1d(64), nn.Linear(64, 32)
    values = {"running_mean": HEADS[case] + 0.1 * torch.randn(64), "running_var": torch.rand(64) + 0.5}
    values |= {"weight": torch.rand(64) + 0.5, "bias": torch.randn(64)}
    norm.load_state_dict(values, strict=False)
    return nn.Sequential(norm, linear).eval()


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the error of the output, and the root mean square of those of all gradients that are not zero, if any."""
    outputs, gradients = relative_errors(found, exact)
    squares = [error * error for name, error in gradients.items() if exact[name].norm() > 0]
    result = {"output": outputs[""]}
    return result | {"gradients": math.sqrt(sum(squares) / len(squares))} if squares else result


def measure(
    build: Callable[[int], nn.Module], x: Tensor, keys: dict[str, Key], seeds: Iterable[int], report: Report
) -> None:
    """Report the errors of each provider in `keys` over all seeds, and their ratios to eager's, or a failed row.

    Each provider compiles once and loads the parameters of every seed.
    """
    key = next(iter(keys.values()))
    own, autocast = DTYPES[key.dtype]
    torch._dynamo.reset()

    def of_seed(seed: int) -> tuple[Subject, dict[str, Tensor]]:
        subject = Subject(key, build(seed).to(own), x.to(own), autocast)
        double = subject.double()
        exact = double.step(double.model)
        copy_masks(double.model, subject.model)
        return subject, exact

    first, _ = of_seed(0)
    copies = {name: replace(first, model=copy.deepcopy(first.model)) for name in ("eager", *keys)}
    runs = {name: COMPARED[name].prepare(own_copy) for name, own_copy in copies.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for seed in seeds:
        subject, exact = of_seed(seed)
        for name, (run, copied, _) in list(runs.items()):
            copied.load_state_dict(subject.model.state_dict())
            try:
                found[name].append(errors(subject.step(run, copied), exact))
            except Exception as error:  # Inductor's own pass does not compile every dtype
                if name == "eager":
                    raise
                report.failed(keys[name], "output_rms", "1", error)
                del runs[name]
    for name in runs.keys() & keys.keys():
        for metric in ("output",) if key.mode == "infer" else ("output", "gradients"):
            ours, theirs = ([each[metric] for each in found[which]] for which in (name, "eager"))
            ratios = [a / b if 0 < b < math.inf else math.nan for a, b in zip(ours, theirs, strict=True)]
            for suffix, values in (("rms", ours), ("over_eager", ratios)):
                if all(map(math.isfinite, values)):
                    figures = statistics.geometric_mean(values), *percentiles(values)[1:]
                    report.measured(keys[name], f"{metric}_{suffix}", "1", figures)
                else:
                    report.failed(keys[name], f"{metric}_{suffix}", "1", "not finite")


def command(
    model: Annotated[str, typer.Option(help="A network of torchvision or timm.")] = "resnet50",
    size: Annotated[int, typer.Option(min=32, help="Height and width of its input.")] = 64,
    mode: Annotated[
        Literal["train", "infer"], typer.Option(help="A training step, or the output without gradients.")
    ] = "train",
    seeds: Annotated[int, typer.Option(min=2, help="Number of sets of random parameters.")] = 16,
    provider: Annotated[list[str] | None, typer.Option(help="Only these providers; default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only these dtypes; default: all.")] = None,
    case_: Annotated[list[str] | None, typer.Option("--case", help="Only these cases; default: all.")] = None,
    csv_: Csv = None,
    json_: Json = False,
) -> None:
    """Measure the errors of outputs and gradients against fp64. What is in the CSV is not measured again."""
    cases: dict[str, tuple[Callable[[int], nn.Module], Tensor]] = {}
    for case in (model, model + MASKED):
        torch.manual_seed(1)
        cases[case] = partial(network, case), torch.randn(2, 3, size, size)
    for case, (*_, factor) in HOSTILE.items():
        cases[case] = partial(pair, case), torch.randn(2, 16, 16, 16) * factor
    for case, mean in HEADS.items():
        cases[case] = partial(head, case), torch.randn(64, 64) + mean
    providers = choose("provider", provider or list(COMPARED), COMPARED)
    dtypes = choose("dtype", dtype or DTYPE_NAMES, DTYPE_NAMES)
    chosen = choose("case", case_ or list(cases), cases)
    torch.set_num_threads(1)
    report = Report(csv_, processor(), resume=True)
    asked: set[Key] = set()
    try:
        for case, name in progress(list(product(chosen, dtypes)), "numerics"):
            if case.endswith(MASKED) and name != "float32":
                continue
            build, x = cases[case]
            keys = {each: Key(case, each, mode, name, "contiguous", x.shape[0]) for each in providers}
            asked |= set(keys.values())
            keys = {each: key for each, key in keys.items() if not report.row(key, "output_rms")}
            if keys:
                measure(build, x, keys, range(seeds), report)
    finally:  # also after Ctrl-C, which would lose them without a file
        rows = [row for row in report.rows if row.key in asked]
        if rows or json_:
            print_rows(rows, json_)
