"""How far the pass reaches: the BatchNorms of one model a family, folded or declined and why, and the errors of both.

    python -m triton_convbn.perf.families --csv perf/results/families.csv

Dynamo captures each model, the pass rewrites the graph under ``when="always"``, and the graph then runs in eager, since
what Inductor generates is not in question here. Statistics and affine are random; the loss weighs every output
differently. The errors are against eager in fp64. Those of eager in fp32 stand beside them, for an error that eager
has, too, is none of the fold. Gradients are compared in fp64 as well: in fp32 a ReLU near its kink may go either way,
whoever decides, but in fp64 none is that near, and a wrong term shows at 1e-16.
"""

import copy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.utils._pytree import tree_leaves

from triton_convbn import ConvBNPass, explain, patched
from triton_convbn.errors import UsageError
from triton_convbn.models import load, randomize

from .table import Key, Log, Row, environment, processor, to_json

SIZES = {
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "regnet_y_400mf": 64,
    "efficientnet_b0": 64,
    "mobilenetv3_large_100": 64,
    "convnext_atto": 64,
    "densenet121": 64,
    "repvgg_a0": 64,
    "hrnet_w18_small": 64,
    "dla34": 64,
    "res2net50_26w_4s": 64,
    "mixnet_s": 64,
    "levit_128": 224,
    "fasterrcnn_resnet50_fpn.backbone": 64,
    "retinanet_resnet50_fpn.backbone": 64,
    "deeplabv3_resnet50": 64,
}
"""Height and width of the image for each model: small, but more than one pixel at the end."""

BATCH = 2


class Rewritten:
    """A backend for `torch.compile` that runs the pass and then the graph as it stands, without compiling it.

    inductors: how many pairs Inductor's own pass would have taken of the same graphs.
    """

    def __init__(self) -> None:
        self.inductors = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.inductors += inductors_pairs(gm)
        ConvBNPass(when="always")(gm.graph)
        gm.graph.lint()
        gm.recompile()
        return gm.forward


def inductors_pairs(gm: fx.GraphModule) -> int:
    """How many pairs Inductor's own pass takes. On a copy, for its result is a graph that cannot be recompiled."""
    from torch._inductor.fx_passes import pre_grad

    pre_grad.lazy_init()  # registers its patterns
    copied = fx.Graph()
    copied.output(copied.graph_copy(gm.graph, {}))
    before = counters["inductor"]["efficient_conv_bn_eval"]
    with inductor_config.patch(efficient_conv_bn_eval_fx_passes=True):
        pre_grad.efficient_conv_bn_eval_pass.apply(fx.GraphModule(gm, copied))
    taken = counters["inductor"]["efficient_conv_bn_eval"] - before
    counters["inductor"]["efficient_conv_bn_eval"] = before
    return taken


def made(name: str) -> nn.Module:
    """The model in eval mode, random in all that it has. The backbones of the detectors have a FrozenBatchNorm2d, as
    with pretrained weights, and train their last three layers.

    Raises: UsageError, where there is none of that name or no package that has it.
    """
    if not name.endswith(".backbone"):
        return randomize(load(name))
    try:
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7
    except ImportError as error:
        raise UsageError(f"{name} needs torchvision: {error}") from error
    options: dict[str, Any] = {}
    if name.startswith("retinanet"):
        options = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    model: nn.Module = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3, **options)
    return randomize(model.eval())


class Result(NamedTuple):
    """The outputs of a model and the gradients of its parameters by name, in fp64."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def step(run: Callable[[Tensor], Any], model: nn.Module, x: Tensor) -> Result:
    """Forward and backward once."""
    model.zero_grad()
    outputs = [each for each in tree_leaves(run(x)) if isinstance(each, Tensor)]
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        loss = loss + (output.double() * torch.linspace(-1, 1, output.shape[-1], dtype=torch.float64)).sum()
    loss.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Result([output.detach().double() for output in outputs], gradients)


def output_error(found: Result, exact: Result) -> float:
    """The largest, relative to the largest value of that output."""
    pairs = zip(found.outputs, exact.outputs, strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def gradient_error(found: Result, exact: Result) -> float:
    """The largest of any parameter: the length of the difference, relative to that of the gradient.

    A gradient that is zero but for rounding is left out: 3e-17 for some of LeViT's attention biases.

    Raises: RuntimeError, where not the same parameters have one.
    """
    if found.gradients.keys() != exact.gradients.keys():
        raise RuntimeError(f"not the same gradients: {sorted(found.gradients.keys() ^ exact.gradients.keys())}")
    lengths = {name: gradient.norm().item() for name, gradient in exact.gradients.items()}
    least = 1e-12 * max(lengths.values())
    differences = {name: (found.gradients[name] - exact.gradients[name]).norm().item() for name in lengths}
    return max(differences[name] / length for name, length in lengths.items() if length > least)


def measure(name: str, size: int, where: tuple[str, str, str, str]) -> list[Row]:
    """Everything about one model: what `explain` says of its BatchNorms, and the errors. where: as `environment` says.

    Raises: RuntimeError, where the pass does something else than what `explain` says, or gradients are missing.
    """
    torch.manual_seed(0)
    model, x = made(name), torch.randn(BATCH, 3, size, size)
    with patched(when="always"):
        explanation = explain(model, x)
    # A new copy each: LeViT in eval mode keeps what it computes from parameters, and with it the graph of one step.
    single, double, again = (copy.deepcopy(model).to(dtype) for dtype in (torch.float32, torch.float64, torch.float64))
    exact = step(again, again, x.double())
    eager = step(single, single, x)
    backend = Rewritten()
    before = counters["triton_convbn"]["folded"]
    folded = step(torch.compile(model, backend=backend), model, x)
    if counters["triton_convbn"]["folded"] - before != explanation.folded:
        raise RuntimeError(f"{name}: the pass does not fold what explain says")
    torch._dynamo.reset()
    folded_double = step(torch.compile(double, backend=Rewritten()), double, x.double())
    torch._dynamo.reset()
    reasons = Counter(row.reason for row in explanation.rows if row.reason)
    ours: dict[str, Any]
    ours, eagers, inductors = ({"provider": name} for name in ("triton_convbn", "eager", "inductor_efficient_conv_bn"))
    figures: list[tuple[dict[str, Any], str, str, float]] = [
        (ours, "batch_norms", "batch norms", len(explanation.rows)),
        (ours, "pairs_folded", "pairs", explanation.folded),
        *((ours, f"declined_{reason}", "batch norms", count) for reason, count in sorted(reasons.items())),
        (inductors, "pairs_folded", "pairs", backend.inductors),
        (ours, "output_error", "relative", output_error(folded, exact)),
        (eagers, "output_error", "relative", output_error(eager, exact)),
        (ours, "gradient_error", "relative", gradient_error(folded, exact)),
        (eagers, "gradient_error", "relative", gradient_error(eager, exact)),
        (ours | {"dtype": "float64"}, "output_error", "relative", output_error(folded_double, exact)),
        (ours | {"dtype": "float64"}, "gradient_error", "relative", gradient_error(folded_double, exact)),
    ]
    nan = float("nan")
    key = Key(name, mode="train", dtype="float32", batch=BATCH)
    return [
        Row(
            *key._replace(**changes),
            metric,
            unit,
            value,
            nan,
            nan,
            "ok",
            "",
            *where,
        )
        for changes, metric, unit, value in figures
    ]


COLUMNS = (
    "model",
    "BatchNorms",
    "fold",
    "Inductor's own pass",
    "declined",
    "output error",
    "gradient error",
    "in fp64",
)


def table(rows: Sequence[Row]) -> Table:
    """A line a model. "Inductor's": the pairs of its own pass. The errors are ours, then eager's in fp32; the last
    column is that of our gradients in fp64."""
    shown = Table(title="BatchNorms, and errors relative to eager in fp64: ours, eager's in fp32")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column in ("model", "declined") else "right", overflow="fold")
    for name in dict.fromkeys(row.case for row in rows):
        value = {(row.provider, row.dtype, row.metric): row.p50 for row in rows if row.case == name}
        ours = {metric: p50 for (provider, dtype, metric), p50 in value.items() if (provider, dtype) == _OURS}
        declined = [f"{m.removeprefix('declined_')} {n:.0f}" for m, n in ours.items() if m.startswith("declined_")]
        inductors = value["inductor_efficient_conv_bn", "float32", "pairs_folded"]
        counts = [f"{count:.0f}" for count in (ours["batch_norms"], ours["pairs_folded"], inductors)]
        errors = [f"{ours[m]:.1e}, {value['eager', 'float32', m]:.1e}" for m in ("output_error", "gradient_error")]
        exact = f"{value['triton_convbn', 'float64', 'gradient_error']:.1e}"
        shown.add_row(name, *counts, ", ".join(declined), *errors, exact)
    return shown


_OURS = ("triton_convbn", "float32")


def main(
    model: Annotated[list[str] | None, typer.Option(help="Only these; default: one of each family.")] = None,
    csv_: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Add the rows there, too.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of a table.")] = False,
) -> None:
    """Fold the BatchNorms of one model a family, and compare with eager. Models that the CSV has are not run again."""
    names, where = model or list(SIZES), environment(processor())
    try:
        log = None if csv_ is None else Log(csv_)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    rows = [row for row in (log.earlier if log is not None else []) if row.case in names and row.where == where]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(names))
        for name in names:
            bar.update(task, description=name)
            found = [] if any(row.case == name for row in rows) else measure(name, SIZES.get(name, 64), where)
            rows += found
            for row in found if log is not None else ():
                log.append(row)  # type: ignore[union-attr]
            bar.advance(task)
    if json_:
        print(to_json(rows))
    else:
        Console().print(table(rows))


if __name__ == "__main__":
    try:
        typer.run(main)
    except UsageError as error:
        print(f"families: {error}", file=sys.stderr)
        sys.exit(2)
