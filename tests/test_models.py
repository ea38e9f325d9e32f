"""Whole models: as many pairs as Inductor's own pass finds in them, and the numbers of eager."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from checking import counted
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from triton_convbn.perf.subject import relative_error

from triton_convbn import ConvBNPass, patched
from triton_convbn.models import load, randomize

pytest.importorskip("torchvision")

# Model, pairs, height and width of the input: as small as the model lets it be with more than one pixel at its end.
MODELS = [
    ("resnet18", 20, 64),
    ("resnet50", 53, 64),
    ("vgg16_bn", 13, 32),
    ("mobilenet_v2", 52, 64),
    ("mobilenet_v3_large", 46, 64),
    ("efficientnet_b0", 49, 64),
    ("regnet_y_400mf", 53, 64),
    ("shufflenet_v2_x1_0", 56, 64),
    ("mnasnet1_0", 52, 64),
    ("densenet121", 59, 64),
    ("googlenet", 57, 64),
    ("inception_v3", 94, 75),
]

FOLDED = {"backend": "triton_convbn_eager", "options": {"when": "always"}}

# Folding rounds W * s once and saves the rounding of the BatchNorm: the same number of operations in another order. Its
# error is therefore about that of eager; two roundings of the largest value are left to luck.
FACTOR, FLOOR = 3, 2 * torch.finfo(torch.float32).eps


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


def made(name: str) -> nn.Module:
    model = randomize(load(name))
    if name == "vgg16_bn":
        model.classifier = nn.Identity()  # 120 million parameters behind the last BatchNorm
    return model


def error(result: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest value."""
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


def assert_as_good_as_eager(result: Tensor, eager: Tensor, exact: Tensor) -> None:
    assert result.isfinite().all()
    assert exact.isfinite().all()
    assert error(result, exact) <= FACTOR * error(eager, exact) + FLOOR


def folded() -> tuple[int, int]:
    """What both counters say: ours and Inductor's."""
    return counters["triton_convbn"]["folded"], counters["inductor"]["efficient_conv_bn_eval"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight initialization of")  # googlenet and inception_v3 announce it
@pytest.mark.parametrize(("name", "pairs", "size"), MODELS, ids=[name for name, _, _ in MODELS])
def test_pairs_and_outputs(name: str, pairs: int, size: int) -> None:
    model, x = made(name), torch.randn(2, 3, size, size)
    backend = CountingBackend()
    with torch.no_grad():
        eager, exact = model(x), copy.deepcopy(model).double()(x.double())
        result = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert backend.inductors == pairs
    assert folded() == (pairs, pairs)
    declined = sum(n for key, n in counters["triton_convbn"].items() if key.startswith("declined:"))
    # Every BatchNorm of these models is called once, the auxiliary classifiers' aside, which eval mode skips.
    called = [
        key for key, module in model.named_modules() if isinstance(module, _BatchNorm) and "aux" not in key.lower()
    ]
    assert pairs + declined == len(called)
    assert_as_good_as_eager(result, eager, exact)


# Of timm, and a detector. mixnet_s has BatchNorms after concatenations. levit_128 has them after Linears with flattened
# outputs, and two before a Linear, which fold into it. Torchvision's detectors have FrozenBatchNorm2d.
OTHERS = [("mixnet_s", 49, 32), ("levit_128", 64, 224), ("resnet_fpn_backbone", 53, 32), ("deeplabv3_resnet50", 60, 32)]


def other(name: str) -> nn.Module:
    if name != "resnet_fpn_backbone":
        return randomize(load(name))
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return randomize(resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3).eval())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pairs", "size"), OTHERS, ids=[name for name, *_ in OTHERS])
def test_all_fold(name: str, pairs: int, size: int) -> None:
    pytest.importorskip("timm")
    model, x = other(name), torch.randn(2, 3, size, size)
    with torch.no_grad():
        exact, eager, found = (
            [each.double() for each in tree_leaves(run(x)) if isinstance(each, Tensor)]
            for run, x in ((copy.deepcopy(model).double(), x.double()), (model, x), (torch.compile(model, **FOLDED), x))
        )
    assert counted() == (pairs, {})
    own, ours = (
        max(relative_error(*pair, math.inf) for pair in zip(each, exact, strict=True)) for each in (eager, found)
    )
    assert ours <= FACTOR * own + FLOOR


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient of one step whose loss weighs every output differently."""
    model.zero_grad()
    output = run(x)
    (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).sum().backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenet_v3_large", marks=pytest.mark.slow)])
def test_gradients(name: str) -> None:
    """The rewritten graph runs once in fp64 and once in fp32, against eager in fp64.

    In fp64 the tolerance is that of rounding: no activation lies within 1e-15 of the kink of a ReLU or hardswish, so
    that the derivative is the same function everywhere, and a term missing in any gradient shows. In fp32 some of the
    hundred thousand activations can lie within 1e-7 of a kink, where folded, eager and fp64 may each decide otherwise.
    One such decision moves the gradients of the layers near it by up to a hundredth of their length, whoever takes it:
    so there the length of the error is what is bounded, and not by eager's, which may have been luckier.
    """
    model, x = made(name), torch.randn(2, 3, 32, 32)
    double = copy.deepcopy(model).double()
    exact = gradients(double, double, x.double())
    assert exact.keys() == dict(model.named_parameters()).keys()
    for module, inputs, tolerance in ((double, x.double(), 1e-12), (model, x, 5e-2)):
        found = gradients(torch.compile(module, **FOLDED, fullgraph=True), module, inputs)
        assert found.keys() == exact.keys()
        wrong = {
            key: off
            for key, gradient in exact.items()
            if not (off := ((found[key] - gradient).norm() / gradient.norm()).item()) <= tolerance
        }
        assert not wrong
    assert counters["triton_convbn"]["folded"] == 2 * {name: pairs for name, pairs, _ in MODELS}[name]


@pytest.mark.parametrize("depth", [2, 3])
def test_pairs_without_anything_between(depth: int) -> None:
    """What a pair returns is what the next convolution reads, with no activation between them."""
    blocks = [part for _ in range(depth) for part in (nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))]
    model = randomize(nn.Sequential(*blocks)).eval()
    x = torch.randn(2, 4, 12, 12)
    with torch.no_grad():
        eager, exact = model(x), copy.deepcopy(model).double()(x.double())
        result = torch.compile(model, **FOLDED, fullgraph=True)(x)
        traced = fx.symbolic_trace(model)
        ConvBNPass()(traced.graph)
        traced.graph.lint()
        traced.recompile()
        assert_as_good_as_eager(traced(x), eager, exact)
    assert_as_good_as_eager(result, eager, exact)
    assert folded() == (2 * depth, 2 * depth)


@pytest.mark.parametrize("size", [64, 96])
def test_symbolically_traced(size: int) -> None:
    """A traced module knows no shapes and calls modules; the graph serves inputs of every size."""
    model = made("resnet18")
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        eager, exact = model(x), copy.deepcopy(model).double()(x.double())
    traced = fx.symbolic_trace(model)
    ConvBNPass()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    assert folded() == (20, 20)
    assert not [
        m
        for n in traced.graph.nodes
        if n.op == "call_module" and isinstance(m := traced.get_submodule(n.target), _BatchNorm)
    ]
    with torch.no_grad():
        assert_as_good_as_eager(traced(x), eager, exact)
        # Folded on every call: what changes in the module afterwards changes the result.
        randomize(model, seed=1)
        again, exact = model(x), copy.deepcopy(model).double()(x.double())
        assert error(again, eager.double()) > 1e-2
        assert_as_good_as_eager(traced(x), again, exact)


@pytest.mark.slow
def test_through_inductor() -> None:
    pairs = 20
    model, x = made("resnet18"), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        eager, exact = model(x), copy.deepcopy(model).double()(x.double())
        with patched(when="always"):
            compiled = torch.compile(model, fullgraph=True)
            assert_as_good_as_eager(compiled(x), eager, exact)
        assert folded() == (pairs, pairs)
        randomize(model, seed=1)
        again, exact = model(x), copy.deepcopy(model).double()(x.double())
        assert error(again, eager.double()) > 1e-2
        assert_as_good_as_eager(compiled(x), again, exact)
    assert folded() == (pairs, pairs)  # no second compile: the folded weights are computed in the graph
