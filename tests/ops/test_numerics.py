"""Folds in fp16 are finite where the unfolded model is, and as accurate."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from checking import CAPTURES, dynamo, errors, inductor, results, scramble
from torch import Tensor, nn

from triton_convbn import ConvBNPass, conv_bn_eval
from triton_convbn.dispatch import planned_for
from triton_convbn.ops.fp16_range import prescale


class Extreme(NamedTuple):
    """Factors of a pair's parameters and input, and an offset of the input."""

    weight: float = 1.0
    x: float = 1.0
    shift: float = 0.0
    var: float = 1.0
    gamma: float = 1.0
    beta: float = 1.0


EXTREMES = {
    "variance of 1e-8: W * s is 1e5": Extreme(weight=50, x=1e-3, var=1e-8),
    "gamma of 1e4: W * s is 1e5": Extreme(weight=50, x=1e-2, gamma=1e4),
    "mean * s is 1e6": Extreme(weight=50, shift=200, gamma=100),
    "W * s is subnormal": Extreme(weight=1e3, gamma=1e-7, beta=1e-4),
    "W * s is zero beside the bias": Extreme(weight=1e3, gamma=1e-8),
    "gamma is zero": Extreme(gamma=0),
    "ordinary": Extreme(),
}


def extreme(name: str, conv: nn.Module | None = None) -> tuple[nn.Module, Tensor]:
    """Return a pair with eps 1e-12 and its input, in fp16 and fp32. The unfolded pair is finite in fp16."""
    case = EXTREMES[name]
    torch.manual_seed(3)
    model = scramble(nn.Sequential(conv or nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval(), eps=1e-12)
    x = (torch.randn(2, 4, 7, 6) * case.x + case.shift).half()
    with torch.no_grad():
        model[0].weight.mul_(case.weight)
        if case.shift:
            model[0].weight.abs_()
        model[1].running_var.fill_(case.var)
        model[1].weight.mul_(case.gamma)
        model[1].bias.mul_(case.beta)
        model[1].running_mean.copy_(model[0](x.float()).mean((0, 2, 3)))
    return model, x


def assert_as_good(found: dict[str, Tensor], unfused: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Check that output and gradients are finite and as accurate as unfolded ones, if those are finite."""
    assert torch.isfinite(unfused["output 0"]).all(), "this case says nothing"
    if not all(torch.isfinite(value).all() for value in unfused.values()):
        found, unfused, exact = ({"output 0": each["output 0"]} for each in (found, unfused, exact))
    unfused, exact = ({name: each[name] for name in found} for each in (unfused, exact))
    for name, value in found.items():
        assert torch.isfinite(value).all(), name
    ours, theirs = errors(found, exact), errors(unfused, exact)
    for name, error in ours.items():
        assert error <= max(2 * theirs[name], 1e-2), f"{name}: {error:.1e}, unfused {theirs[name]:.1e}"


def in_half(model: nn.Module) -> nn.Module:
    """Return an fp16 convolution and an fp32 BatchNorm whose statistics exceed fp16."""
    model[0].half()
    return model


def autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.float16):
            return run(x)

    return call


def reference(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    double = copy.deepcopy(model).double()
    return results(double, double, x.double())


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("way", ["half", "autocast"])
def test_extremes_through_dynamo(name: str, way: str) -> None:
    model, x = extreme(name)
    exact = reference(model, x)
    if way == "half":
        model = in_half(model)
        assert_as_good(results(dynamo(model), model, x), results(model, model, x), exact)
        return
    x = x.float()
    compiled = autocast(dynamo(model))
    assert_as_good(results(compiled, model, x), results(autocast(model), model, x), exact)


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("dialect", CAPTURES)
@pytest.mark.parametrize("host", ["cpu", "cuda"])
def test_extremes_in_other_dialects(name: str, dialect: str, host: str) -> None:
    """host: What computes the folds, plain torch or the operator."""
    model, x = extreme(name)
    exact, model = reference(model, x), in_half(model)
    unfused = results(model, model, x)
    gm = CAPTURES[dialect](model, x)
    with planned_for(host):
        ConvBNPass()(gm.graph)
    gm.recompile()
    assert "scaled_back" in gm.code
    assert_as_good({"output 0": gm(x).detach().double()}, {"output 0": unfused["output 0"]}, exact)


@pytest.mark.parametrize("conv", [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 3, groups=2, bias=False)])
def test_extremes_of_other_convolutions(conv: nn.Module) -> None:
    model, x = extreme("gamma of 1e4: W * s is 1e5", conv)
    exact, model = reference(model, x), in_half(model)
    assert_as_good(results(dynamo(model), model, x), results(model, model, x), exact)


def test_by_hand() -> None:
    for name in EXTREMES:
        model, x = extreme(name)
        exact = reference(model, x)
        with torch.autocast("cpu", torch.float16):
            y = conv_bn_eval(model[0], model[1], x.float())
        assert torch.isfinite(y).all(), name
        model = in_half(model)
        unfused = results(model, model, x)
        found = results(lambda x, model=model: conv_bn_eval(model[0], model[1], x), model, x)
        assert_as_good(found, unfused, exact)


@pytest.mark.slow
def test_through_inductor() -> None:
    model, x = extreme("variance of 1e-8: W * s is 1e5")
    exact, unfused = reference(model, x), results(autocast(model), model, x.float())
    assert_as_good(results(autocast(inductor(model)), model, x.float()), unfused, exact)


def test_infinite_without_prescale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases above can fail: without prescale they do."""
    monkeypatch.setattr("triton_convbn.graph.grouping.needs_prescale", lambda *_: False)
    overflowing = []
    for name in EXTREMES:
        model, x = extreme(name)
        model = in_half(model)
        torch._dynamo.reset()
        overflowing.append(not bool(torch.isfinite(dynamo(model)(x)).all()))
    assert overflowing == [True, True, True, False, False, False, False]


def test_only_fp16_has_prescale() -> None:
    for dtype, expected in ((torch.float16, True), (torch.bfloat16, False), (torch.float32, False)):
        model, x = extreme("ordinary")
        gm = CAPTURES["aten"](model.to(dtype), x.to(dtype))
        ConvBNPass()(gm.graph)
        gm.recompile()
        assert ("prescale" in gm.code) is expected


def test_prescale_bounds_the_scale() -> None:
    """q is a power of two. The scale divided by q is at most 1/2, and above 1/4 unless q is clamped."""
    gamma, var = torch.randn(1000) * 10, torch.rand(1000).pow(4) + 1e-6
    q = prescale(gamma, None, var, 1e-12)
    assert q.dtype == torch.float16
    assert torch.equal(torch.frexp(q.float()).mantissa, torch.full((1000,), 0.5))
    scale = gamma.double().abs() * torch.rsqrt(var.double() + 1e-12) / q.double()
    inside = (q > 2**-14) & (q < 2**15)
    assert inside.sum() > 900
    assert scale[inside].max() <= 0.5 * (1 + 1e-6)
    assert scale[inside].min() > 0.25 * (1 - 1e-6)
    beta = torch.full((1000,), 5e4)
    assert (beta / prescale(gamma * 1e-9, beta, var, 1e-12)).max() <= 1024


class Flattened(nn.Module):
    """A Linear with 3-D input whose output is flattened for the BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.bn(y.flatten(0, 1)).reshape_as(y)


@pytest.mark.parametrize("options", [{}, {"codegen": False}])
def test_flattened_linear(options: dict[str, Any]) -> None:
    """There are as many rows as channels, so that q along the wrong dimension would broadcast."""
    torch.manual_seed(0)
    model, x = scramble(Flattened().eval(), eps=1e-12), torch.randn(6, 6, 4) * 1e-2
    model.bn.running_var.copy_(torch.logspace(-8, 2, 6))
    model.bn.running_mean.zero_()
    exact = reference(model, x)
    found: list[Any] = []
    compiled = autocast(dynamo(model, found, **options))
    assert_as_good(results(compiled, model, x), results(autocast(model), model, x), exact)
    assert [len(each.pairs) for each in found] == [1]
