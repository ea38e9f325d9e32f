"""Count the folded and declined BatchNorms of one model a family, and measure the errors of outputs and gradients.

    python -m triton_convbn.perf.families --csv perf/results/families.csv

The folded graph runs in eager, without Inductor's code generation. Parameters and statistics are random. Errors are
relative to eager in fp64, beside eager's own errors in fp32. Gradients are also compared in fp64: in fp32, rounding may
move a ReLU's input across zero; in fp64, a wrong term shows at 1e-16.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from triton_convbn import explain, patched
from triton_convbn.errors import UsageError
from triton_convbn.models import load, randomize

from . import steps
from .steps import CsvOption, JsonOption, Result, folded_graph, relative_error
from .table import Row, environment, processor

SIZES = dict.fromkeys(
    (
        *("resnet18", "resnet50", "resnext50_32x4d", "regnet_y_400mf", "efficientnet_b0", "mobilenetv3_large_100"),
        *("convnext_atto", "densenet121", "repvgg_a0", "hrnet_w18_small", "dla34", "res2net50_26w_4s", "mixnet_s"),
        *("levit_128", "fasterrcnn_resnet50_fpn.backbone", "retinanet_resnet50_fpn.backbone", "deeplabv3_resnet50"),
    ),
    64,
) | {"levit_128": 224}
"""Height and width of each model's input: small, but more than one pixel in the last layer."""

BATCH = 2


class CountingBackend:
    """Fold every pair, as `folded_graph`, and count in `inductors` the pairs that Inductor's own pass would take."""

    def __init__(self) -> None:
        self.inductors = 0

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.inductors += inductors_pairs(gm)
        return folded_graph(gm, inputs)


def inductors_pairs(gm: fx.GraphModule) -> int:
    """Return how many pairs Inductor's own pass takes. It runs on a copy, as its result cannot be recompiled."""
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


def make_model(name: str) -> nn.Module:
    """Return the model in eval mode, with random parameters and statistics.

    Detector backbones have FrozenBatchNorm2d and train their last three layers, as with pretrained weights.

    Raises: UsageError if there is no model of that name, or its package is missing.
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


def loss_weights(output: Tensor) -> Tensor:
    return torch.linspace(-1, 1, output.shape[-1], dtype=torch.float64)


def output_error(found: Result, exact: Result) -> float:
    """Return the largest error of any output, relative to the largest value of that output."""
    return max(relative_error(*pair, math.inf) for pair in zip(found.outputs, exact.outputs, strict=True))


def gradient_error(found: Result, exact: Result) -> float:
    """Return the largest relative error of any parameter's gradient.

    Gradients below 1e-12 of the largest are skipped, as they are zero but for rounding (3e-17 for some attention biases
    of LeViT).

    Raises: RuntimeError if other parameters have gradients.
    """
    if found.gradients.keys() != exact.gradients.keys():
        raise RuntimeError(f"not the same gradients: {sorted(found.gradients.keys() ^ exact.gradients.keys())}")
    lengths = {name: gradient.norm().item() for name, gradient in exact.gradients.items()}
    least = 1e-12 * max(lengths.values())
    large = (name for name, length in lengths.items() if length > least)
    return max(relative_error(found.gradients[name], exact.gradients[name]) for name in large)


def measure(name: str, size: int, where: tuple[str, str, str, str]) -> list[Row]:
    """Return the rows of one model. where: as `environment` returns it.

    Raises: RuntimeError if the pass folds other pairs than `explain` reports, or gradients are missing.
    """
    torch.manual_seed(0)
    model, x = make_model(name), torch.randn(BATCH, 3, size, size)
    with patched(when="always"):
        explanation = explain(model, x)
    # LeViT in eval mode caches what it computes from parameters, and with it the autograd graph: copy before each step.
    single, double, again = (copy.deepcopy(model).to(dtype) for dtype in (torch.float32, torch.float64, torch.float64))
    exact = steps.step(again, again, x.double(), loss_weights)
    eager = steps.step(single, single, x, loss_weights)
    backend = CountingBackend()
    before = counters["triton_convbn"]["folded"]
    folded = steps.step(torch.compile(model, backend=backend), model, x, loss_weights)
    if counters["triton_convbn"]["folded"] - before != explanation.folded:
        raise RuntimeError(f"{name}: the pass does not fold what explain reports")
    torch._dynamo.reset()
    wide = steps.step(torch.compile(double, backend=folded_graph), double, x.double(), loss_weights)
    torch._dynamo.reset()
    reasons = Counter(row.reason for row in explanation.rows if row.reason)
    figures: list[tuple[str, str, str, str, float]] = [
        ("triton_convbn", "float32", "batch_norms", "batch norms", len(explanation.rows)),
        ("triton_convbn", "float32", "pairs_folded", "pairs", explanation.folded),
        *(("triton_convbn", "float32", f"declined_{why}", "batch norms", n) for why, n in sorted(reasons.items())),
        ("inductor_efficient_conv_bn", "float32", "pairs_folded", "pairs", backend.inductors),
    ]
    single_results, double_results = {"triton_convbn": folded, "eager": eager}, {"triton_convbn": wide}
    for dtype, results in (("float32", single_results), ("float64", double_results)):
        for metric, error in (("output_error", output_error), ("gradient_error", gradient_error)):
            figures += [(who, dtype, metric, "relative", error(found, exact)) for who, found in results.items()]
    return [
        Row(name, who, "train", dtype, "contiguous", BATCH, metric, unit, value, math.nan, math.nan, "ok", "", *where)
        for who, dtype, metric, unit, value in figures
    ]


def lines(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    """Yield the table's line of each model."""
    for name in dict.fromkeys(row.case for row in rows):
        value = {(row.provider, row.dtype, row.metric): row.p50 for row in rows if row.case == name}
        ours = {metric: p50 for (who, dtype, metric), p50 in value.items() if (who, dtype) == _OURS}
        errors = {m: f"{ours[m]:.1e}, {value['eager', 'float32', m]:.1e}" for m in ("output_error", "gradient_error")}
        yield {
            "model": name,
            "BatchNorms": f"{ours['batch_norms']:.0f}",
            "fold": f"{ours['pairs_folded']:.0f}",
            "Inductor's own pass": f"{value['inductor_efficient_conv_bn', 'float32', 'pairs_folded']:.0f}",
            "declined": ", ".join(f"{m[9:]} {n:.0f}" for m, n in ours.items() if m.startswith("declined_")),
            "output error": errors["output_error"],
            "gradient error": errors["gradient_error"],
            "in fp64": f"{value['triton_convbn', 'float64', 'gradient_error']:.1e}",
        }


_OURS = ("triton_convbn", "float32")


def command(
    model: Annotated[list[str] | None, typer.Option(help="Only these models; default: one of each family.")] = None,
    csv_: CsvOption = None,
    json_: JsonOption = False,
) -> None:
    """Fold the BatchNorms of one model a family and compare with eager. Models that are in the CSV are skipped."""
    names, where = model or list(SIZES), environment(processor())
    log = None if csv_ is None else steps.open_log(csv_)
    rows = [row for row in (log.earlier if log is not None else []) if row.case in names and row.where == where]
    done = {row.case for row in rows}
    for name in steps.progress([name for name in names if name not in done], "families"):
        found = measure(name, SIZES.get(name, 64), where)
        rows += found
        for row in found if log is not None else ():
            log.append(row)  # type: ignore[union-attr]
    title = "BatchNorms, and errors relative to eager in fp64: with folds, then eager's own in fp32"
    steps.print_rows(rows, json_, title, lines(rows))


if __name__ == "__main__":
    steps.run_command(command)
