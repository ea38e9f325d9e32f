"""Sums of branches, and what their tests share: build a model, rewrite it, compare its gradients."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import Calls
from checking import CAPTURES, scramble
from torch import Tensor, fx, nn

from triton_convbn import ConvBNPass
from triton_convbn.graph.findings import Findings
from triton_convbn.graph.profitability import select
from triton_convbn.options import Options

C = 6


def conv(size: Any = 3, padding: Any = 1, bias: bool = False, outputs: int = C, **options: Any) -> nn.Module:
    return nn.Conv2d(C, outputs, size, padding=padding, bias=bias, **options)


def conv_bn(*args: Any, **options: Any) -> nn.Module:
    layer = conv(*args, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels))


class Factor(nn.Module):
    """Times a trained number per channel, as LayerScale."""

    def __init__(self, shape: tuple[int, ...] = (C, 1, 1)) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def in_place(m: Calls, x: Tensor) -> Tensor:
    out = 0
    out += m.a(x)
    out += m.b(x)
    return F.relu(out)


# Each with the number of convolutions that are merged.
MERGED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "repvgg": (
        lambda: Calls(lambda m, x: m.a(x) + m.b(x) + m.c(x), a=conv_bn(), b=conv_bn(1, 0), c=nn.BatchNorm2d(C)),
        2,
    ),
    "in_place": (lambda: Calls(in_place, a=conv_bn(), b=conv_bn(1, 0)), 2),
    "python_sum": (
        lambda: Calls(lambda m, x: sum([m.a(x), m.b(x), x]), a=conv_bn(), b=conv_bn()),
        2,
    ),
    "torch_functions": (
        lambda: Calls(lambda m, x: torch.add(torch.sub(m.a(x), other=m.b(x)), x), a=conv_bn(), b=conv_bn(bias=True)),
        2,
    ),
    "methods": (lambda: Calls(lambda m, x: m.a(x).add_(m.b(x)).sub(x), a=conv_bn(), b=conv_bn(1, 0)), 2),
    "keywords_in_another_order": (
        lambda: Calls(lambda m, x: torch.sub(other=m.a(x), input=m.b(x)), a=conv_bn(), b=conv_bn(1, 0)),
        2,
    ),
    "convolutions_alone": (lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv(bias=True), b=conv(1, 0)), 2),
    "norm_after": (
        lambda: Calls(
            lambda m, x: m.norm(m.a(x) + m.b(x) + x),
            a=conv_bn(groups=C),
            b=conv(1, 0, groups=C),
            norm=nn.BatchNorm2d(C),
        ),
        2,
    ),
    "repmixer": (
        lambda: Calls(
            lambda m, x: x + m.g(m.a(x) + m.b(x) - m.norm(x)),
            a=conv_bn(groups=C),
            b=conv_bn(1, 0, groups=C),
            norm=nn.BatchNorm2d(C),
            g=Factor(),
        ),
        2,
    ),
    "factors": (
        lambda: Calls(
            lambda m, x: 2 * m.g(m.a(x)) - m.h(m.b(x)) + (-x),
            a=conv_bn(),
            b=conv_bn(1, 0),
            g=Factor((1, C, 1, 1)),
            h=Factor(()),
        ),
        2,
    ),
    "quotients": (
        lambda: Calls(lambda m, x: torch.div(m.a(x), 3) + m.b(x) / 2 - x.div(4.0), a=conv_bn(), b=conv_bn(1, 0)),
        2,
    ),
    "what_changes_nothing": (
        lambda: Calls(
            lambda m, x: (F.dropout(m.a(x), 0.5, m.training).clone() + m.b(x).contiguous()).contiguous() - x,
            a=conv_bn(),
            b=conv_bn(1, 0),
        ),
        2,
    ),
    "scaled_input": (
        lambda: Calls(lambda m, x: m.a(x) + m.g(x) - 0.5 * x, a=conv_bn(), g=Factor()),
        1,
    ),
    "nested": (
        lambda: Calls(
            lambda m, x: m.norm(m.a(x) + (m.b(x) - (m.c(x) + x))) + m.d(x),
            a=conv_bn(),
            b=conv_bn(),
            c=conv(1, 0),
            d=conv_bn(bias=True),
            norm=nn.BatchNorm2d(C),
        ),
        4,
    ),
    "groups": (
        lambda: Calls(
            lambda m, x: m.a(x) + m.b(x) + m.c(x), a=conv_bn(groups=2), b=conv_bn(1, 0, groups=2), c=nn.BatchNorm2d(C)
        ),
        2,
    ),
    "strided": (
        lambda: Calls(
            lambda m, x: m.a(x) + m.b(x),
            a=conv_bn(3, 1, stride=2, outputs=8),
            b=conv_bn(1, 0, stride=2, outputs=8, bias=True),
        ),
        2,
    ),
    "dilated": (
        lambda: Calls(lambda m, x: m.a(x) + m.b(x) + x, a=conv_bn(5, 4, dilation=2), b=conv_bn(3, 2, dilation=2)),
        2,
    ),
    "square_last": (
        lambda: Calls(
            lambda m, x: m.a(x) + m.b(x) + (x + m.c(x)),
            a=conv_bn((1, 3), (0, 1)),
            b=conv_bn((3, 1), (1, 0)),
            c=conv_bn(),
        ),
        3,
    ),
    "acnet": (  # the square kernel holds the others
        lambda: Calls(
            lambda m, x: m.a(x) + m.b(x) + m.c(x), a=conv_bn(), b=conv_bn((1, 3), (0, 1)), c=conv_bn((3, 1), (1, 0))
        ),
        3,
    ),
    "same_padding": (lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(5, "same"), b=conv_bn(3, "same")), 2),
    "valid_padding": (lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(3, "valid"), b=conv_bn(3, 0)), 2),
    "even_kernels": (lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(4, 2), b=conv_bn(2, 1)), 2),
    "one_convolution_and_the_input": (lambda: Calls(lambda m, x: m.a(x) + x, a=conv_bn()), 1),
    "one_convolution_and_a_norm": (
        lambda: Calls(lambda m, x: m.norm(x) - m.a(x), a=conv(bias=True), norm=nn.BatchNorm2d(C, affine=False)),
        1,
    ),
    "shared_weight": (lambda: Calls(lambda m, x: m.a(x) + m.norm(m.a[0](x)), a=conv_bn(), norm=nn.BatchNorm2d(C)), 2),
    "different_eps": (
        lambda: Calls(lambda m, x: m.a(x) + m.norm(m.b(x)), a=conv_bn(), b=conv(1, 0), norm=nn.BatchNorm2d(C, eps=0.3)),
        2,
    ),
}


def made(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = scramble(make().eval(), 1e-3)
    return model.to(dtype), torch.randn(2, C, 7, 8, dtype=dtype)


def rewritten(
    model: nn.Module, x: Tensor, dialect: str = "dynamo", **options: Any
) -> tuple[Callable[..., Any], Findings, fx.Graph]:
    """Return the rewritten model, what was found in it, and its graph."""
    kept: list[Any] = []
    options = {"codegen": False, "when": "always"} | options

    def rewrite(gm: fx.GraphModule, _inputs: Any = None) -> Callable[..., Any]:
        kept.append(select(gm.graph, Options(**options)))
        ConvBNPass(**options)(gm.graph)
        gm.graph.lint()
        gm.recompile()
        kept.append(gm.graph)
        return gm.forward

    if dialect == "dynamo":
        run = torch.compile(model, backend=rewrite)
        run(x)
        return run, *kept
    return rewrite(CAPTURES[dialect](model, x)), *kept


def convolutions(graph: fx.Graph) -> int:
    """Return how many convolutions a graph calls."""
    names = ("conv1d", "conv2d", "conv3d", "convolution", "conv_with_fold", "conv_with_branches", "conv_with_scales")
    called = [getattr(node.target, "__name__", str(node.target)).split(".")[0] for node in graph.nodes]
    modules = dict(graph.owning_module.named_modules())
    called += [
        "conv2d" for node in graph.nodes if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d)
    ]
    return sum(name in names for name in called)


def gradients(run: Callable[..., Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output and every gradient of a loss that weighs each output differently."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sin().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] is not None, name
        assert found[name].isfinite().all(), name
        error = (found[name].double() - value).abs().max() / value.abs().max()
        assert error <= tolerance, (name, error)


def blocks() -> nn.Module:
    return nn.Sequential(
        MERGED["repvgg"][0](), nn.ReLU(), MERGED["repmixer"][0](), nn.SiLU(), MERGED["norm_after"][0]()
    )
