"""Measure small models of other packages: what folds, what a training step keeps for backward, and its errors.

    triton-convbn dev applications --csv perf/results/applications.csv

Models are built from their configurations, small, with random weights and statistics. They train with frozen
statistics, in fp32 on the CPU. The graphs are those that Inductor would generate code for, and run without it. Each
model has a process of its own with a time limit, so that one which hangs or crashes leaves a failed row.
"""

import math
import subprocess
import sys
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, fx
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx

from triton_convbn import ConvBNPass
from triton_convbn.errors import UsageError
from triton_convbn.explanation import explain
from triton_convbn.measure import saved_for_backward
from triton_convbn.progress import errors as console

from .command import Json, print_rows, progress
from .environment import processor
from .providers import PROVIDERS, Compiled
from .results import Key, Report
from .runner import first_step
from .subject import relative_errors, subject
from .workloads import APPLICATIONS, Case, Setting, whole


def _partitioned(name: str, **patches: Any) -> Compiled:
    """Return Inductor up to the partitioned graphs, which ATen runs.

    C++ for the same graphs takes minutes to compile. What backward keeps is decided before it, but for one thing: on a
    CPU plain Inductor also keeps its channels_last copies of weights, 0.21 MB beside 0.95 for transformers.resnet.

    Args:
        patches: Inductor's configuration.
    """

    def without_code(gm: fx.GraphModule, _inputs: Any, **_more: Any) -> Any:
        return make_boxed_func(gm.forward)

    return Compiled(name, partial(compile_fx, inner_compile=without_code, config_patches=patches))


COMPARED = (
    PROVIDERS["eager"],
    _partitioned("inductor"),
    _partitioned("inductor_efficient_conv_bn", efficient_conv_bn_eval_fx_passes=True),
    _partitioned("triton_convbn", pre_grad_custom_pass=ConvBNPass()),
)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest errors of a training step's results.

    The error of an output is relative to its largest value, that of a gradient is relative to its norm. Gradients below
    1e-12 of the largest are skipped, as they are zero but for rounding (3e-17 for some attention biases of LeViT).

    Raises:
        RuntimeError: If other parameters have gradients.
    """
    (outputs, _), (_, gradients) = relative_errors(found, exact, math.inf), relative_errors(found, exact)
    norms = {name: exact[name].norm().item() for name in gradients}
    large = [name for name, norm in norms.items() if norm > 1e-12 * max(norms.values())]
    return {"output_error": max(outputs.values()), "gradient_error": max(gradients[name] for name in large)}


def measure(name: str, case: Case, report: Report) -> None:
    """Report what the pass plans for one model, then what each provider folds and keeps, and its errors.

    The last row says how far ours is from eager in fp64, where a wrong term of a gradient shows, and a ReLU whose input
    rounding moves across zero does not.
    """
    own = subject(case, Setting("train", "float32", "contiguous", 2), torch.device("cpu"))
    explanation = explain(own.model, own.x)
    counts = {"batch_norms": explanation.calls, "planned": explanation.folded}
    counts |= Counter(f"declined_{row.reason}" for row in explanation.rows if row.reason)
    for metric, count in counts.items():
        report.measured(_key(name), metric, "1", count)
    exact = own.exact()
    kept: dict[str, int] = {}
    eager: dict[str, float] = {}
    for provider in COMPARED:
        key = _key(name, provider.name)
        torch._dynamo.reset()
        with report.keeping(key, "run"):
            prepared, found, folded = first_step(own, provider)
            worst = errors(found, exact)
            del found
            own.clear()
            with saved_for_backward(prepared.model) as saved:
                own.forward(prepared.call)
            report.measured(key, "folded", "1", folded)
            report.measured(key, "saved_for_backward", "bytes", saved.total)
            ratios = {f"saved_over_{baseline}": saved.total / size for baseline, size in kept.items()}
            ratios |= {f"{metric}_over_eager": worst[metric] / error for metric, error in eager.items() if error}
            for metric, value in (worst | ratios).items():
                report.measured(key, metric, "1", value)
            kept[provider.name] = saved.total
            if provider.name == "eager":
                eager = worst
    key = _key(name, dtype="float64")
    with report.keeping(key, "run"):
        torch._dynamo.reset()
        _, found, _ = first_step(own.double(), COMPARED[-1])
        for metric, value in errors(found, exact).items():
            report.measured(key, metric, "1", value)


def _key(name: str, provider: str = "triton_convbn", dtype: str = "float32") -> Key:
    return Key(name, provider, "train", dtype)


def _run(name: str, csv: Path, limit: int) -> str:
    """Measure one model in a new process. Return why that failed, or an empty string."""
    command = [sys.executable, "-m", "triton_convbn", "dev", "applications", "--in-process"]
    command += ["--model", name, "--csv", str(csv)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"not done after {limit} seconds"
    last = done.stderr.strip().rpartition("\n")[2]
    if done.returncode == 2:
        raise UsageError(last.removeprefix("triton-convbn: "))
    return f"exit code {done.returncode} {last}".strip() if done.returncode else ""


def command(
    csv_: Annotated[Path, typer.Option("--csv", metavar="FILE", help="Append rows to this file.")],
    model: Annotated[list[str] | None, typer.Option(help="Only these models; default: all.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Seconds that the process of one model may take.")] = 900,
    in_process: Annotated[bool, typer.Option("--in-process", help="Use this process, without a limit.")] = False,
    json_: Json = False,
) -> None:
    """Measure models of other packages. What is in the CSV is not measured again."""
    names, report = model or list(APPLICATIONS), Report(csv_, processor(), resume=True)
    for name in progress(names, "applications"):
        wide = _key(name, dtype="float64")
        done = (_key(name, "all"), "run"), (_key(name), "run"), (wide, "run"), (wide, "gradient_error")
        if any(report.row(*each) for each in done):
            continue
        package = APPLICATIONS[name]["call"].partition(":")[0].partition(".")[0] if name in APPLICATIONS else ""
        if package and find_spec(package) is None:
            console.print(f"{name} is left out: {package} is not installed")
        elif in_process:
            case = whole(name)
            with report.keeping(_key(name, "all"), "run"):
                measure(name, case, report)
        elif why := _run(name, csv_, limit):
            report.failed(_key(name, "all"), "run", "", why)
    rows = [row for row in Report(csv_, processor(), resume=True).rows if row.case in names]
    print_rows(rows, json_, "Errors of gradients are relative to the norm of the gradient.")
