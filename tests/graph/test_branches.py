"""Sums of branches: one convolution with the values and gradients of the model, or a decline with its reason."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import Calls
from checking import CAPTURES, scramble
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from triton_convbn.perf.subject import relative_error

from triton_convbn import ConvBNPass, conv_sum_eval, explain, fold_exported
from triton_convbn.graph import conv_bn_pass
from triton_convbn.graph.findings import Findings
from triton_convbn.graph.profitability import select
from triton_convbn.graph.reasons import Reason
from triton_convbn.ops.branches_autograd import conv_with_branches
from triton_convbn.ops.merge_reference import add_input
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


@pytest.mark.parametrize("codegen", [False, True])
@pytest.mark.parametrize("name", MERGED)
def test_value_and_gradients(name: str, codegen: bool) -> None:
    make, merged = MERGED[name]
    model, x = made(make)
    run, findings, graph = rewritten(model, x, codegen=codegen)
    assert [len(branch.convs) for branch in findings.sums] == [merged]
    assert convolutions(graph) == 1
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert counters["triton_convbn"]["folded"] == norms
    assert not any(key.startswith("declined:") for key in counters["triton_convbn"])
    assert_same(gradients(run, model, x), gradients(model, model, x))


@pytest.mark.parametrize("codegen", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_input_does_not_make_partial_sums_large(codegen: bool, recompute: bool) -> None:
    """Merged into the weight, an input 30 times as large as the rest makes 11 times the error of eager."""
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))
    model = scramble(Calls(lambda m, x: m.a(x) + m.g(x), a=branch, g=Factor((64, 1, 1))))
    model.g.gamma.data.mul_(30)
    x = torch.randn(2, 64, 12, 12)
    run, _, graph = rewritten(model.eval(), x, codegen=codegen, recompute=recompute)
    assert convolutions(graph) == 1
    assert counters["triton_convbn"]["folded"] == 1
    found, eager = gradients(run, model, x), gradients(model, model, x)
    double = copy.deepcopy(model).double()
    exact = gradients(double, double, x.double())
    for name in ("y", "x"):
        own, others = (relative_error(values[name], exact[name]) for values in (found, eager))
        assert own <= 1.3 * others, (name, own / others)


def test_a_compiled_weight_is_rounded_once() -> None:
    """On a CPU. Each pixel reads one element of every row. Summed in fp32, most elements would be off by an ulp."""
    torch.manual_seed(0)
    branches = {name: nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)) for name in "abcd"}
    model = scramble(Calls(lambda m, x: m.a(x) + m.b(x) + m.c(x) + m.d(x), **branches).eval())
    x = torch.eye(32)[..., None, None]
    run, _, graph = rewritten(model, x, codegen=True)
    assert convolutions(graph) == 1
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        bias = double(torch.zeros_like(x).double())
        weight = double(x.double()) - bias
        assert torch.equal(run(x), weight.float() + bias.float())


@pytest.mark.parametrize(
    ("groups", "dtype", "last"),
    [
        (1, torch.float32, 1),
        (2, torch.float64, 1),
        (C, torch.float32, 0),
        (1, torch.bfloat16, 0),
        (1, torch.float16, 0),
    ],
)
def test_where_the_input_is_added_last(groups: int, dtype: torch.dtype, last: int) -> None:
    """Not beside depthwise convolutions, where it takes a pass and gains little, nor in 16 bit, which rounds again."""
    model, x = made(lambda: Calls(lambda m, x: m.a(x) + x, a=conv_bn(groups=groups)), dtype)
    _, _, graph = rewritten(model, x, codegen=True)
    assert convolutions(graph) == 1
    assert sum(node.target is add_input for node in graph.nodes) == last


@pytest.mark.parametrize("dialect", CAPTURES)
@pytest.mark.parametrize("name", MERGED)
def test_other_dialects(name: str, dialect: str) -> None:
    make, merged = MERGED[name]
    model, x = made(make)
    with torch.no_grad():
        expected = model(x)
        run, findings, graph = rewritten(model, x, dialect)
        assert [len(branch.convs) for branch in findings.sums] == [merged]
        assert convolutions(graph) == 1
        assert_same({"y": run(x)}, {"y": expected})


def written_between(m: Calls, x: Tensor) -> Tensor:
    first = m.a(x)
    x.mul_(2)
    return first + m.b(x)


def read_elsewhere(m: Calls, x: Tensor) -> Tensor:
    first = m.a(x)
    return first + m.b(x) + first.relu()


def weight_written(m: Calls, x: Tensor) -> Tensor:
    first = m.a(x)
    with torch.no_grad():
        m.a[0].weight.mul_(2)
    return first + m.b(x)


DECLINED: dict[str, tuple[Callable[[], nn.Module], Reason]] = {
    "other_input": (lambda: Calls(lambda m, x: m.a(x) + m.b(x.relu()), a=conv_bn(), b=conv_bn()), Reason.OTHER_INPUT),
    "residual": (lambda: Calls(lambda m, x: m.a(x.relu()) + x, a=conv_bn()), Reason.OTHER_INPUT),
    "other_padding": (
        lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv(stride=2), b=conv((2, 3), stride=2)),
        Reason.OTHER_GRID,
    ),
    "other_dilation": (
        lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(3, 1), b=conv_bn(3, 2, dilation=2)),
        Reason.OTHER_GRID,
    ),
    "shifted": (  # a kernel of 4 at dilation 2 has its middle between two elements, that of 3 has not
        lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(4, 3, dilation=2), b=conv_bn(3, 2, dilation=2)),
        Reason.OTHER_GRID,
    ),
    "strided_input": (
        lambda: Calls(lambda m, x: m.a(x) + x, a=conv_bn((7, 8), 0)),
        Reason.OTHER_GRID,
    ),
    "dense_and_depthwise": (
        lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(groups=C), b=conv_bn(1, 0)),
        Reason.OTHER_GROUPS,
    ),
    "kernel_grows": (
        lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn((1, 7), (0, 3)), b=conv_bn((7, 1), (3, 0))),
        Reason.KERNEL_GROWS,
    ),
    "read_elsewhere": (lambda: Calls(read_elsewhere, a=conv_bn(), b=conv_bn()), Reason.BRANCH_SHARED),
    "twice": (lambda: Calls(lambda m, x: (y := m.a(x)) + y, a=conv_bn()), Reason.BRANCH_SHARED),
    "alpha": (lambda: Calls(lambda m, x: torch.add(m.a(x), m.b(x), alpha=2), a=conv_bn(), b=conv_bn()), Reason.ALPHA),
    "broadcast_channels": (
        lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(outputs=C), b=conv(outputs=1)),
        Reason.BROADCAST,
    ),
    "broadcast_input": (lambda: Calls(lambda m, x: m.a(x) + x, a=nn.Conv2d(1, C, 3, padding=1)), Reason.BROADCAST),
    "input_written": (lambda: Calls(written_between, a=conv_bn(), b=conv_bn()), Reason.MUTATED),
    "weight_written": (lambda: Calls(weight_written, a=conv_bn(), b=conv_bn()), Reason.MUTATED),
}


@pytest.mark.parametrize("codegen", [False, True])
@pytest.mark.parametrize("name", DECLINED)
def test_declines(name: str, codegen: bool) -> None:
    make, reason = DECLINED[name]
    model, x = made(make)
    x = x[:, :1] if name == "broadcast_input" else x
    with torch.no_grad():
        expected = copy.deepcopy(model)(x.clone())
        run, findings, _ = rewritten(copied := copy.deepcopy(model), x.clone(), codegen=codegen)
        assert not findings.sums
        assert reason in [decline.reason for decline in findings.sum_declines]
        copied.load_state_dict(model.state_dict())  # its forward may have written to it
        assert_same({"y": run(x.clone())}, {"y": expected})


NOT_LINEAR: dict[str, Callable[[], nn.Module]] = {
    "gate": lambda: Calls(lambda m, x: m.a(x) * x.mean((2, 3), keepdim=True) + m.b(x), a=conv_bn(), b=conv_bn()),
    "map_of_factors": lambda: Calls(lambda m, x: m.g(m.a(x)) + m.b(x), a=conv_bn(), b=conv_bn(), g=Factor((C, 7, 8))),
    "factor_along_width": lambda: Calls(lambda m, x: m.g(m.a(x)) + m.b(x), a=conv_bn(), b=conv_bn(), g=Factor((8,))),
    "constant": lambda: Calls(lambda m, x: m.a(x) + 1.0 + m.b(x), a=conv_bn(), b=conv_bn()),
    "reflected": lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(padding_mode="reflect"), b=conv_bn(1, 0)),
    "transposed": lambda: Calls(
        lambda m, x: m.a(x) + m.b(x), a=nn.ConvTranspose2d(C, C, 3, padding=1), b=conv_bn(1, 0)
    ),
    "training": lambda: Calls(lambda m, x: m.a(x) + m.norm(x), a=conv_bn(), norm=nn.BatchNorm2d(C).train()),
    "instance_norm": lambda: Calls(lambda m, x: m.a(x) + m.norm(x), a=conv_bn(), norm=nn.InstanceNorm2d(C)),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_no_branch_stays(name: str) -> None:
    model, x = made(NOT_LINEAR[name])
    for module in model.modules():
        if name == "training" and isinstance(module, nn.BatchNorm2d) and module is model.norm:
            module.train()
    expected = copy.deepcopy(model)(x)
    run, findings, _ = rewritten(model, x)
    assert not findings.sums
    if name != "training":
        assert_same({"y": run(x).detach()}, {"y": expected.detach()})


def test_part_of_a_sum() -> None:
    """The terms of one input merge where they are a sum by themselves. The rest of the sum stays."""
    model, x = made(lambda: Calls(lambda m, x: (m.a(x) + m.b(x)) + x.relu(), a=conv_bn(), b=conv_bn(1, 0)))
    run, findings, graph = rewritten(model, x)
    assert len(findings.sums) == 1
    assert [decline.reason for decline in findings.sum_declines] == [Reason.OTHER_INPUT]
    assert convolutions(graph) == 1
    assert_same(gradients(run, model, x), gradients(model, model, x))


def test_chain_of_blocks() -> None:
    """A block that reads another block's output."""
    block = MERGED["repvgg"][0]
    model, x = made(lambda: nn.Sequential(block(), nn.ReLU(), block(), block()))
    for codegen in (False, True):
        torch._dynamo.reset()
        run, findings, graph = rewritten(model, x, codegen=codegen)
        assert len(findings.sums) == 3
        assert convolutions(graph) == 3
        assert_same(gradients(run, model, x), gradients(model, model, x))


def test_convolution_of_a_convolution() -> None:
    """y is linear in x as well, but it is the input of the other term."""
    model, x = made(lambda: Calls(lambda m, x: m.b(y := m.a(x)) + y, a=conv_bn(), b=conv_bn()))
    run, findings, graph = rewritten(model, x)
    assert [len(branch.convs) for branch in findings.sums] == [1]
    assert convolutions(graph) == 2
    assert_same(gradients(run, model, x), gradients(model, model, x))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    layer, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv3d, nn.BatchNorm3d)
    torch.manual_seed(0)
    model = Calls(
        lambda m, x: m.a(x) + m.b(x) + m.c(x),
        a=nn.Sequential(layer(C, C, 3, padding=1), norm(C)),
        b=nn.Sequential(layer(C, C, 1, bias=False), norm(C)),
        c=norm(C),
    )
    model = scramble(model.eval(), 1e-3).double()
    x = torch.randn(2, C, *(4,) * dims, dtype=torch.float64)
    run, findings, _ = rewritten(model, x)
    assert len(findings.sums) == 1
    assert_same(gradients(run, model, x), gradients(model, model, x))


@pytest.mark.parametrize("codegen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["repvgg", "repmixer", "nested"])
def test_low_precision(name: str, dtype: torch.dtype, codegen: bool) -> None:
    """Not worse than the unmerged model by more than two roundings."""
    model, x = made(MERGED[name][0], torch.float32)
    low = copy.deepcopy(model).to(dtype)
    exact = copy.deepcopy(low).double()(x.to(dtype).double())
    run, findings, _ = rewritten(low, x.to(dtype), codegen=codegen)
    assert findings.sums
    error = (run(x.to(dtype)).double() - exact).abs().max()
    eager = (low(x.to(dtype)).double() - exact).abs().max()
    assert error <= eager + 2 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("codegen", [False, True])
def test_fp16_stays_in_range(codegen: bool) -> None:
    """A scale of 1e5 overflows the weight, though neither the convolution nor the output does."""
    model, x = made(MERGED["repvgg"][0], torch.float32)
    with torch.no_grad():
        model.a[1].running_var.fill_(1e-8)
        model.a[1].running_mean.zero_()
        model.a[1].weight.fill_(3.0)
        model.a[1].eps = 1e-10
        model.a[0].weight.mul_(1e-1)
    model, x = model.half(), (x * 1e-2).half()
    model.a[1].running_var.fill_(1.2e-7)
    exact = copy.deepcopy(model).double()(x.double())
    run, findings, _ = rewritten(model, x, codegen=codegen)
    assert findings.sums
    result = run(x)
    assert result.isfinite().all()
    assert (result.double() - exact).abs().max() <= 4e-3 * exact.abs().max()


@pytest.mark.parametrize("codegen", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, codegen: bool) -> None:
    """The convolutions run in 16 bit. The input is one, so that it may be added."""
    model, x = made(lambda: nn.Sequential(conv(), MERGED["repvgg"][0]()), torch.float32)

    def run(model: Callable[..., Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x)

    with torch.autocast("cpu", dtype):
        compiled, findings, _ = rewritten(model, x, codegen=codegen)
    assert findings.sums
    exact = copy.deepcopy(model).double()(x.double())
    result, eager = run(compiled, x), run(model, x)
    assert result.dtype == eager.dtype == dtype
    scale = exact.abs().max()
    assert (result - exact).abs().max() <= (eager - exact).abs().max() + 2 * torch.finfo(dtype).eps * scale


def test_autocast_of_a_wider_input_declines() -> None:
    """The unmerged sum of an fp32 input and a bf16 convolution is fp32."""
    model, x = made(lambda: Calls(lambda m, x: m.a(x) + x, a=conv_bn()), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, findings, _ = rewritten(model, x)
    assert [decline.reason for decline in findings.sum_declines] == [Reason.DTYPE]


@pytest.mark.parametrize("frozen", ["weights", "norms", "one_norm", "all_but_the_factor"])
def test_frozen_parameters(frozen: str) -> None:
    model, x = made(MERGED["repmixer"][0])
    for name, parameter in model.named_parameters():
        is_norm = parameter.ndim == 1
        parameter.requires_grad_(
            {
                "weights": is_norm or parameter.ndim == 3,
                "norms": not is_norm,
                "one_norm": not name.startswith("norm"),
                "all_but_the_factor": name.startswith("g"),
            }[frozen]
        )
    run, findings, _ = rewritten(model, x)
    assert findings.sums
    found, expected = gradients(run, model, x), gradients(model, model, x)
    assert {name for name in found if found[name] is None} == {name for name in expected if expected[name] is None}
    known = {name for name in expected if expected[name] is not None}
    assert_same({name: found[name] for name in known}, {name: expected[name] for name in known})


def test_backward_keeps_the_input_alone() -> None:
    """Autograd saves x, parameters that exist anyway, and little else. Not one output of a branch."""
    model, x = made(MERGED["nested"][0])
    run, _, _ = rewritten(model, x)
    kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    new = 0

    def save(tensor: Tensor) -> Tensor:
        nonlocal new
        storage = tensor.untyped_storage()
        new += storage.nbytes() * (storage.data_ptr() not in kept)
        kept.add(storage.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        output = run(x)
    assert new < output.untyped_storage().nbytes() / 4


def test_no_gradients_share_memory() -> None:
    """A write to one gradient, as clipping does, changes no other."""
    model, x = made(MERGED["repvgg"][0])
    run, _, _ = rewritten(model, x)
    run(x).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    before = [grad.clone() for grad in grads]
    for grad in grads:
        grad.add_(1)
    for grad, old in zip(grads, before, strict=True):
        assert grad.equal(old + 1)


def block_as_function(model: nn.Module) -> Callable[..., Tensor]:
    """Return the "repvgg" block as a function of x and its tensors."""
    first, second, third = model.a[1], model.b[1], model.c
    expression = (
        "sum",
        (1, ("norm", ("conv", 0, None), 2, 3, 4, 5, first.eps)),
        (1, ("norm", ("conv", 1, None), 6, 7, 8, 9, second.eps)),
        (1, ("norm", ("input",), 10, 11, 12, 13, third.eps)),
    )
    return lambda x, *tensors: conv_with_branches(x, tensors, expression, padding=1)


def tensors_of(model: nn.Module) -> list[Tensor]:
    norms = [(bn.weight, bn.bias, bn.running_mean, bn.running_var) for bn in (model.a[1], model.b[1], model.c)]
    return [model.a[0].weight, model.b[0].weight, *(each.detach() for norm in norms for each in norm)]


def test_second_derivatives() -> None:
    model, x = made(MERGED["repvgg"][0])
    run = block_as_function(model)
    tensors = [
        each.detach()[:3, :3].clone().requires_grad_() if each.ndim > 1 else each[:3].clone()
        for each in tensors_of(model)
    ]
    inputs = [x[:1, :3, :3, :3].clone().requires_grad_(), *tensors]
    for index in (2, 3, 6, 10, 11):
        inputs[1 + index].requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_transforms() -> None:
    model, x = made(MERGED["repvgg"][0])
    run, tensors = block_as_function(model), [each.detach() for each in tensors_of(model)]
    assert_same({"y": run(x, *tensors)}, {"y": model(x).detach()})
    each = torch.func.vmap(lambda x, w: run(x, w, *tensors[1:]))(
        torch.stack([x, 2 * x]), torch.stack([tensors[0], -tensors[0]])
    )
    assert_same({"y": each[1]}, {"y": run(2 * x, -tensors[0], *tensors[1:])})
    tangents = (torch.ones_like(x), *map(torch.ones_like, tensors))
    _, forward = torch.func.jvp(run, (x, *tensors), tangents)
    _, pull = torch.func.vjp(run, x, *tensors)
    reverse = sum((one * other).sum() for one, other in zip(pull(torch.ones_like(forward)), tangents, strict=True))
    assert_same({"sum": forward.sum()}, {"sum": reverse})
    leaves = [each.clone().requires_grad_() for each in tensors[:2]]
    y = run(x, *leaves, *tensors[2:])
    grads = torch.stack([torch.ones_like(y), y.detach()])
    found = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(y, leaves, grad, retain_graph=True) for grad in grads]
    for index, value in enumerate(found):
        assert_same({"g": value[1]}, {"g": expected[1][index]})


def blocks() -> nn.Module:
    return nn.Sequential(
        MERGED["repvgg"][0](), nn.ReLU(), MERGED["repmixer"][0](), nn.SiLU(), MERGED["norm_after"][0]()
    )


def test_explain_has_a_row_for_each_block() -> None:
    model, x = made(blocks)
    explanation = explain(model, x)
    assert [(row.batch_norm, row.conv) for row in explanation.rows] == [
        ("0.a.1, 0.b.1, 0.c", "0.a.0, 0.b.0"),
        ("2.a.1, 2.b.1, 2.norm", "2.a.0, 2.b.0"),
        ("4.a.1, 4.norm", "4.a.0, 4.b"),
    ]
    assert explanation.rows[1].detail == "4 branches become one convolution"
    assert (explanation.folded, explanation.calls) == (8, 8)
    assert "8 of 8 fold" in str(explanation)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fold_exported_merges_once(dtype: torch.dtype, decomposed: bool) -> None:
    model, x = made(blocks, torch.float32)
    model, x = model.to(dtype), x.to(dtype)
    program = torch.export.export(model, (x,))
    program = program.run_decompositions() if decomposed else program
    folded = fold_exported(program)
    assert convolutions(folded.graph_module.graph) == 3
    assert set(folded.state_dict) == {
        f"{path}.folded_{kind}" for path in ("0", "2", "4.norm") for kind in ("weight", "bias")
    }
    exact = copy.deepcopy(model).double()(x.double())
    error, eager = ((run(x).double() - exact).abs().max() for run in (folded.module(), model))
    assert error <= eager + 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert explain(program).folded == 8


def test_fold_exported_leaves_a_sum_of_computed_weights() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(), conv(1, 0)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + F.conv2d(x, self.b.weight * x.mean())

    model, x = made(Computed)
    folded = fold_exported(torch.export.export(model, (x,)))
    assert convolutions(folded.graph_module.graph) == 2
    assert_same({"y": folded.module()(x).detach()}, {"y": model(x).detach()})


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["every_parameter", "frozen_norms"])
def test_one_convolution_and_its_input_under_inductor(trained: str) -> None:
    """Merged where the convolution's own fold gains: if the BatchNorm's scale trains. Not in inference."""
    model, x = made(MERGED["one_convolution_and_the_input"][0], torch.float32)
    model.a[1].requires_grad_(trained == "every_parameter")
    found = []
    with patched_merge(found):
        torch.compile(model, backend="triton_convbn")(x).sum().backward()
    with patched_merge(found), torch.no_grad():
        torch._dynamo.reset()
        torch.compile(model, backend="triton_convbn")(x)
    assert found == [int(trained == "every_parameter"), 0]


def patched_merge(found: list[int]) -> Any:
    """Append how many sums merge in each graph."""
    return mock.patch.object(conv_bn_pass, "count_folds", lambda findings: found.append(len(findings.sums)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_under_inductor(layout: torch.memory_format) -> None:
    """Three convolutions forward, three backward, and no merged weight kept."""
    model, x = made(blocks, torch.float32)
    model, x = model.to(memory_format=layout), x.to(memory_format=layout)
    double = copy.deepcopy(model).double()
    exact = gradients(double, double, x.double())
    run = torch.compile(model, backend="triton_convbn")
    found, code = run_and_get_code(lambda: gradients(run, model, x))
    assert_same(found, exact, 5e-6)
    assert counters["triton_convbn"]["merged"] == 3
    forward, backward = code
    assert forward.count("= extern_kernels.convolution(") == 3
    assert backward.count("= torch.ops.aten.convolution_backward.default(") == 3
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), x)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(x)
    assert {tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in own} == {tuple(x.shape)}


def test_write_through_data_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CONVBN_CHECK_DATA", "1")
    model, x = made(MERGED["repvgg"][0])
    run, _, _ = rewritten(model, x)
    run(x).sum().backward()
    y = run(x)
    model.b[0].weight.data.mul_(2)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        y.sum().backward()


class Doubled(Tensor):
    """Multiplies what it is a part of by two, which no convolution knows."""


def test_subclasses_decline() -> None:
    model, x = made(MERGED["repvgg"][0])
    model.b[0].weight = nn.Parameter(model.b[0].weight.detach().as_subclass(Doubled))
    _, findings, _ = rewritten(model, x, "modules")
    assert not findings.sums


EAGER: dict[str, Callable[[], list[nn.Module]]] = {
    "repvgg": lambda: [conv_bn(), conv_bn(1, 0, bias=True), nn.BatchNorm2d(C)],
    "depthwise": lambda: [conv_bn(5, 2, groups=C), conv_bn(3, 1, groups=C), nn.Identity()],
    "convolution_alone": lambda: [conv(bias=True), nn.Sequential(nn.Identity(), conv(1, 0))],
    "two_norms": lambda: [nn.Sequential(conv(), nn.BatchNorm2d(C), nn.BatchNorm2d(C)), conv_bn(1, 0)],
    "reads_nothing_else": lambda: [conv_bn(3, "same", dilation=2), conv_bn(1, "same")],
}


@pytest.mark.parametrize("name", EAGER)
def test_conv_sum_eval(name: str) -> None:
    model, x = made(lambda: nn.ModuleList(EAGER[name]()))
    expected = gradients(lambda x: sum(branch(x) for branch in model), model, x)
    assert_same(gradients(lambda x: conv_sum_eval(list(model), x), model, x), expected)


NOT_EAGER: dict[str, tuple[Callable[[], list[nn.Module]], type[Exception], str]] = {
    "training": (
        lambda: [conv_bn(), nn.Sequential(conv(1, 0), nn.BatchNorm2d(C).train())],
        ValueError,
        "training mode",
    ),
    "no_convolution": (lambda: [nn.BatchNorm2d(C), nn.Identity()], ValueError, "no branch has a convolution"),
    "relu": (lambda: [conv_bn(), nn.Sequential(conv(1, 0), nn.ReLU())], TypeError, "ReLU"),
    "two_convolutions": (lambda: [nn.Sequential(conv(), conv())], TypeError, "follows another layer"),
    "grid": (lambda: [conv(), conv(3, 0)], ValueError, "positions"),
    "groups": (lambda: [conv(groups=C), conv(1, 0)], ValueError, "groups"),
    "kernel_grows": (lambda: [conv((1, 3), (0, 1)), conv((3, 1), (1, 0))], ValueError, "holds all"),
    "channels": (lambda: [conv(outputs=8), nn.Identity()], ValueError, "shapes"),
    "norm_of_other_channels": (lambda: [conv(), nn.Sequential(conv(1, 0), nn.BatchNorm2d(8))], ValueError, "channels"),
    "reflected": (lambda: [conv(padding_mode="reflect"), conv(1, 0)], ValueError, "positions"),
    "no_statistics": (
        lambda: [conv(), nn.BatchNorm2d(C, track_running_stats=False).eval()],
        ValueError,
        "no running statistics",
    ),
}


@pytest.mark.parametrize("name", NOT_EAGER)
def test_conv_sum_eval_declines(name: str) -> None:
    branches, error, words = NOT_EAGER[name]
    made_branches = branches()
    for branch in made_branches:
        for module in branch.modules():
            if isinstance(module, nn.BatchNorm2d) and name != "training":
                module.eval()
    with pytest.raises(error, match=words):
        conv_sum_eval(made_branches, torch.randn(2, C, 7, 8))


def test_conv_sum_eval_declines_hooks() -> None:
    branches = [conv_bn().eval(), conv_bn(1, 0).eval()]
    branches[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="hooks"):
        conv_sum_eval(branches, torch.randn(2, C, 7, 8))


def test_conv_sum_eval_under_autocast() -> None:
    """The unmerged sum of an fp32 input and a bf16 convolution is fp32."""
    model, x = made(lambda: nn.ModuleList(EAGER["repvgg"]()), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="dtypes"):
            conv_sum_eval(list(model), x)
        assert conv_sum_eval(list(model), x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_a_bias_of_a_1d_sum_trains(dtype: torch.dtype) -> None:
    """The convolution's backward returns a gradient of the weight, in another shape, although it is masked out."""
    x, large, small = (torch.randn(size, dtype=dtype) for size in ((2, 3, 5), (2, 3, 3), (2, 3, 1)))
    bias = torch.randn(2, dtype=dtype, requires_grad=True)
    expression = ("sum", (1, ("conv", 0, 1)), (1, ("conv", 2, None)))
    output = conv_with_branches(x, [large, bias, small], expression, padding=1)
    output.sum().backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.full((2,), 10.0, dtype=dtype))


def test_long_chains() -> None:
    """Nothing recurses once for each operation of a chain."""

    def chain(m: Calls, x: Tensor) -> Tensor:
        y = m.a(x)
        for _ in range(600):
            y = y * 1.0001
        for _ in range(600):
            y = 1.0001 * y + 0.001 * x
        for _ in range(600):
            y = y + x
        return y

    model, x = made(lambda: Calls(chain, a=conv_bn()))
    with torch.no_grad():
        run, _, _ = rewritten(model, x, "modules")
        assert_same({"y": run(x)}, {"y": model(x)})
