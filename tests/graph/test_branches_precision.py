"""Sums of branches in each dtype and under autocast: as exact as eager, and rounded once."""

import copy
from collections.abc import Callable

import pytest
import torch
from branch_cases import (
    MERGED,
    C,
    Factor,
    conv,
    conv_bn,
    convolutions,
    gradients,
    made,
    rewritten,
)
from cases import Calls
from checking import scramble
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from triton_convbn.perf.subject import relative_error

from triton_convbn import ConvBNPass
from triton_convbn.graph.profitability import select
from triton_convbn.graph.reasons import Reason
from triton_convbn.ops.merge_reference import add_input


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


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("codegen", [True, False])
def test_autocast_in_a_graph_that_is_traced_again(enabled: bool, codegen: bool) -> None:
    """Tracing records that autocast is entered and does not enter it, so that its examples are wider than a run's."""
    model, x = made(lambda: Calls(lambda m, x: m.a(x) + m.b(x), a=conv_bn(), b=nn.BatchNorm2d(C)), torch.float32)
    tensors = {name: each.detach() for name, each in model.state_dict().items()}

    def run(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled):
            return torch.func.functional_call(model, tensors, (x,))

    traced = make_fx(make_fx(run, pre_dispatch=True)(tensors, x), pre_dispatch=True)(tensors, x)
    sum_of_branches = next(node for node in traced.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    assert sum_of_branches.meta["val"].dtype == torch.float32
    right = traced(tensors, x)
    findings = select(traced.graph, ConvBNPass(codegen=codegen, when="always").options)
    assert bool(findings.sums) != enabled
    ConvBNPass(codegen=codegen, when="always")(traced.graph)
    traced.recompile()
    result = traced(tensors, x)
    assert result.dtype == right.dtype == torch.float32
    torch.testing.assert_close(result, right, rtol=1e-2, atol=1e-2)
