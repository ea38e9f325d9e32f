"""A write to what a call returns as a view or a copy, as strides allow. Under `vmap` a fold has other strides."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from branch_cases import C, assert_same, conv, conv_bn, made, rewritten
from cases import Calls
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import vmap

from triton_convbn import fold_exported
from triton_convbn.graph.reasons import Reason

Use = Callable[[Tensor], Tensor]
WEIGHT = torch.linspace(-1, 2, 16, dtype=torch.float64).view(4, 4).requires_grad_()


def write_to_input(moved: Use) -> Use:
    def use(y: Tensor) -> Tensor:
        y = y * 1.5
        z = moved(y)
        y.add_(0.5)
        return z.mean() * y

    return use


def write_to_result(moved: Use) -> Use:
    def use(y: Tensor) -> Tensor:
        z = moved(y)
        z.mul_(2.0)
        return z.mean() * y

    return use


MATTERS: dict[str, Use] = {
    "contiguous": write_to_input(lambda y: y.contiguous()),
    "memory_format": write_to_input(lambda y: y.to(memory_format=torch.contiguous_format)),
    "reshape": write_to_input(lambda y: y.reshape(-1)),
    "torch.reshape": write_to_result(lambda y: torch.reshape(y, (-1,))),
    "flatten": write_to_result(lambda y: y.flatten()),
    "view of it": write_to_result(lambda y: y.flatten(1)[1:]),
    "reshape_as": write_to_result(lambda y: y.reshape_as(y[None])),
    "ravel": write_to_input(torch.ravel),
    "aten": write_to_input(lambda y: torch.ops.aten.reshape.default(y, [-1])),
    "packet": write_to_input(lambda y: torch.ops.aten.contiguous(y)),
}

KEEPING: dict[str, Use] = {
    "linear": lambda y: F.linear(y, WEIGHT),
    "matmul": lambda y: y @ WEIGHT,
    "method": lambda y: y.matmul(WEIGHT),
    "einsum": lambda y: torch.einsum("nchw,wv->nchv", y, WEIGHT),
    "aten": lambda y: torch.ops.aten.linear.default(y, WEIGHT),
    "conv": lambda y: F.conv2d(y, WEIGHT[:, :1].expand(-1, C)[..., None, None]),
    "pool": lambda y: F.avg_pool2d(y, 1),
    "norm": F.instance_norm,
}

HARMLESS: dict[str, Use] = {
    "written before": lambda y: y.relu_().flatten(1),
    "input not read": lambda y: y.flatten(1).relu_(),
    "result not read": lambda y: (y.flatten(1).mean() * y).sigmoid_(),
    "view": lambda y: y.view(-1).mul_(2.0).mean() * y,
    "copy": lambda y: y.clone().flatten(1).mul_(2.0).mean() * y,
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "pair": lambda: Calls(lambda m, x: m.a(x), a=conv_bn()),
    "sum": lambda: Calls(lambda m, x: m.norm(x) + m.a(x), a=conv(), norm=nn.BatchNorm2d(C)),
    "norm first": lambda: Calls(lambda m, x: m.conv(m.norm(x)), conv=nn.Conv2d(C, C, 3), norm=nn.BatchNorm2d(C)),
}


def with_use(name: str, use: Use) -> tuple[nn.Module, Tensor]:
    return made(lambda: Calls(lambda m, x: use(m.first(x)), first=MODELS[name]()))


@pytest.mark.parametrize("use", MATTERS)
@pytest.mark.parametrize("name", MODELS)
def test_declines(name: str, use: str) -> None:
    model, x = with_use(name, MATTERS[use])
    batch = torch.stack([x, 2 * x, 3 * x]).detach()
    run, findings, _ = rewritten(model, x.detach(), "modules")
    assert not findings.changes_graph
    declines = findings.sum_declines if name == "sum" else findings.declines
    assert {decline.reason for decline in declines} == {Reason.VIEW_OR_COPY}
    with torch.no_grad():
        assert_same({"y": vmap(run)(batch)}, {"y": vmap(model)(batch)})


def test_calls_of_one_norm() -> None:
    """All of them fold, or none."""

    def forward(m: Calls, x: Tensor) -> Tensor:
        first, second = m.conv(x).chunk(2, 0)
        return m.norm(first).mean() * write_to_input(lambda y: y.reshape(-1))(m.norm(second))

    model, x = made(lambda: Calls(forward, conv=conv(), norm=nn.BatchNorm2d(C)))
    run, findings, _ = rewritten(model, x.detach(), "modules")
    assert not findings.pairs
    batch = torch.stack([x, 2 * x, 3 * x]).detach()
    with torch.no_grad():
        assert_same({"y": vmap(run)(batch)}, {"y": vmap(model)(batch)})


def test_module() -> None:
    flatten = {"a": conv_bn(), "flatten": nn.Flatten()}
    model, x = made(lambda: Calls(lambda m, x: write_to_input(m.flatten)(m.a(x)), **flatten))
    findings = rewritten(model, x.detach(), "modules")[1]
    assert [decline.reason for decline in findings.declines] == [Reason.VIEW_OR_COPY]


@pytest.mark.parametrize("use", HARMLESS)
@pytest.mark.parametrize("name", MODELS)
def test_folds(name: str, use: str) -> None:
    model, x = with_use(name, HARMLESS[use])
    run, findings, _ = rewritten(model, x.detach(), "modules")
    assert findings.changes_graph
    assert not findings.declines
    with torch.no_grad():
        assert_same({"y": run(x)}, {"y": model(x)})


@pytest.mark.parametrize("call", KEEPING)
def test_kept_for_backward(call: str) -> None:
    """The call keeps a copy of what the batched BatchNorm returns, and would keep a view of what a fold does."""
    use = write_to_input(KEEPING[call])
    model, x = made(lambda: Calls(lambda m, x: use(m.norm(m.conv(x))), conv=conv(), norm=nn.BatchNorm2d(C)))
    x = x[..., :4, :4].detach()
    run, findings, _ = rewritten(model, x, "modules")
    assert [decline.reason for decline in findings.declines] == [Reason.VIEW_OR_COPY]
    batch = torch.stack([x, 2 * x, 3 * x])
    found, expected = (
        torch.autograd.grad(vmap(each)(batch).sin().sum(), list(model.parameters())) for each in (run, model)
    )
    names = [name for name, _ in model.named_parameters()]
    assert_same(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))


def test_nothing_kept() -> None:
    use = write_to_input(lambda y: y @ WEIGHT.detach())
    model, x = made(lambda: Calls(lambda m, x: use(m.a(x)), a=conv_bn()))
    x = x[..., :4, :4].detach()
    run, findings, _ = rewritten(model.requires_grad_(False), x)
    assert len(findings.pairs) == 1
    assert_same({"y": run(x)}, {"y": model(x)})


MATRIX = torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6)
LAYERS: dict[str, Callable[[], Use]] = {
    "max_pool": lambda: nn.MaxPool2d(2),
    "avg_pool": lambda: nn.AvgPool2d(2),
    "one_position": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive_avg_pool": lambda: nn.AdaptiveAvgPool2d(2),
    "adaptive_max_pool": lambda: nn.AdaptiveMaxPool2d(2),
    "lp_pool": lambda: nn.LPPool2d(2, 2),
    "layer_norm": lambda: nn.LayerNorm(6),
    "group_norm": lambda: nn.GroupNorm(2, C),
    "instance_norm": lambda: nn.InstanceNorm2d(C),
    "rms_norm": lambda: nn.RMSNorm(6),
    "local_response_norm": lambda: nn.LocalResponseNorm(2),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "matmul": lambda: lambda y: y @ MATRIX,
    "inner": lambda: lambda y: torch.inner(y, MATRIX),
    "tensordot": lambda: lambda y: torch.tensordot(y, MATRIX, 1),
    "attention": lambda: lambda y: F.scaled_dot_product_attention(y, y, y),
    "grid_sample": lambda: lambda y: F.grid_sample(y, y[:, :2].movedim(1, -1).tanh()),
}


@pytest.mark.parametrize("dialect", ["modules", "dynamo", "export", "decomposed"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_returns_no_view(name: str, dialect: str) -> None:
    """An activation in place after it does not write to its input. Its operator does not say so."""
    layer = LAYERS[name]()
    modules = {"layer": layer} if isinstance(layer, nn.Module) else {}
    model, _ = made(
        lambda: Calls(lambda m, x: getattr(m, "layer", layer)(m.a(x).sin()).relu_(), a=conv_bn(), **modules)
    )
    x = torch.randn(2, C, 6, 6, dtype=torch.float64)
    if dialect in ("export", "decomposed"):
        program = torch.export.export(model, (x,))
        folded = fold_exported(program.run_decompositions() if dialect == "decomposed" else program)
        assert counters["triton_convbn"]["folded"] == 1
        assert_same({"y": folded.module()(x)}, {"y": model(x)})
        return
    run, findings, _ = rewritten(model, x, dialect)
    assert len(findings.pairs) == 1
    assert_same({"y": run(x)}, {"y": model(x)})
