"""Count the folded and declined BatchNorms of one model a family, and measure the errors of outputs and gradients.

    triton-convbn dev families --csv perf/results/families.csv

The folded graph runs in eager, without Inductor's code generation. Parameters and statistics are random. Errors are
relative to eager in fp64, beside eager's own errors in fp32. Gradients are also compared in fp64: in fp32, rounding may
move a ReLU's input across zero; in fp64, a wrong term shows at 1e-16.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from triton_convbn import ConvBNPass, explain, patched
from triton_convbn.errors import UsageError
from triton_convbn.models import load, randomize

from .command import Csv, Json, open_report, print_rows, progress
from .results import Key, Report
from .subject import relative_errors, training_step

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
    """Fold every pair, and count in `inductors` the pairs that Inductor's own pass would take."""

    def __init__(self) -> None:
        self.inductors = 0

    def __call__(self, gm: fx.GraphModule, _inputs: Sequence[Tensor]) -> Callable[..., Any]:
        from torch._inductor.fx_passes import pre_grad

        pre_grad.lazy_init()  # registers its patterns
        copied = fx.Graph()  # its result cannot be recompiled
        copied.output(copied.graph_copy(gm.graph, {}))
        before = counters["inductor"]["efficient_conv_bn_eval"]
        with inductor_config.patch(efficient_conv_bn_eval_fx_passes=True):
            pre_grad.efficient_conv_bn_eval_pass.apply(fx.GraphModule(gm, copied))
        self.inductors += counters["inductor"]["efficient_conv_bn_eval"] - before
        counters["inductor"]["efficient_conv_bn_eval"] = before
        ConvBNPass(when="always")(gm.graph)
        gm.graph.lint()
        gm.recompile()
        return gm.forward


def make_model(name: str) -> nn.Module:
    """Return the model in eval mode, with random parameters and statistics.

    Detector backbones have FrozenBatchNorm2d and train their last three layers, as with pretrained weights.

    Raises:
        UsageError: If there is no model of that name, or its package is missing.
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


def measure(name: str, report: Report, size: int = 64) -> None:
    """Report the figures of one model, unless they are there already.

    Raises:
        RuntimeError: If the pass folds other pairs than `explain` reports, or gradients are missing.
    """
    key = Key(name, "triton_convbn", "train", "float32", "contiguous", BATCH)
    if report.row(key._replace(dtype="float64"), "gradient_error"):
        return

    def add(key: Key, metric: str, unit: str, value: float) -> None:
        report.measured(key, metric, unit, (value, math.nan, math.nan))

    torch.manual_seed(0)
    model, x = make_model(name), torch.randn(BATCH, 3, size, size)
    with patched(when="always"):
        explanation = explain(model, x)
    # LeViT in eval mode caches what it computes from parameters, and with it the autograd graph: copy before each step.
    single, double, again = (copy.deepcopy(model).to(dtype) for dtype in (torch.float32, torch.float64, torch.float64))
    step = partial(training_step, weights=lambda output: torch.linspace(-1, 1, output.shape[-1], dtype=torch.float64))
    exact, eager = step(again, again, x.double()), step(single, single, x)
    backend = CountingBackend()
    before = counters["triton_convbn"]["folded"]
    folded = step(torch.compile(model, backend=backend), model, x)
    if counters["triton_convbn"]["folded"] - before != explanation.folded:
        raise RuntimeError(f"{name}: the pass does not fold what explain reports")
    torch._dynamo.reset()
    wide = step(torch.compile(double, backend=CountingBackend()), double, x.double())
    torch._dynamo.reset()
    add(key, "batch_norms", "batch norms", len(explanation.rows))
    add(key, "pairs_folded", "pairs", explanation.folded)
    for reason, count in sorted(Counter(row.reason for row in explanation.rows if row.reason).items()):
        add(key, f"declined_{reason}", "batch norms", count)
    add(key._replace(provider="inductor_efficient_conv_bn"), "pairs_folded", "pairs", backend.inductors)
    for metric, error in errors(folded, exact).items():
        add(key, metric, "relative", error)
        add(key._replace(provider="eager"), metric, "relative", errors(eager, exact)[metric])
    for metric, error in errors(wide, exact).items():
        add(key._replace(dtype="float64"), metric, "relative", error)


def command(
    model: Annotated[list[str] | None, typer.Option(help="Only these models; default: one of each family.")] = None,
    csv_: Csv = None,
    json_: Json = False,
) -> None:
    """Fold the BatchNorms of one model a family and compare with eager. Models that are in the CSV are skipped."""
    names, report = model or list(SIZES), open_report(csv_)
    for name in progress(names, "families"):
        measure(name, report, SIZES.get(name, 64))
    rows = [row for row in report.rows if row.case in names]
    print_rows(rows, json_, "Gradient errors are relative to the norm of the gradient.")
