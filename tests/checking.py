"""What the tests share: hostile BatchNorms, every way to capture a graph, and comparison against eager in fp64."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm

from triton_convbn import ConvBNPass, patched
from triton_convbn.graph.findings import Findings
from triton_convbn.graph.match import find
from triton_convbn.graph.reasons import Reason

# Relative to the largest magnitude of the fp64 result. fp32: a few hundred roundings of 6e-8. 16 bit: see `check`.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def scramble(model: nn.Module, eps: float | None = None, seed: int = 1) -> nn.Module:
    """Random affine and statistics in place of fresh ones, which hide every fold error, and another eps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, _BatchNorm) and getattr(module, "running_var", None) is None:
                continue  # neither a BatchNorm nor a frozen one
            mean, weight = module.running_mean, module.weight
            if eps is not None and (eps > 0 or mean is not None):  # batch statistics refuse an eps of 0
                module.eps = eps
            if mean is not None:
                mean.copy_(torch.randn(mean.shape, generator=generator))
                module.running_var.copy_(torch.rand(mean.shape, generator=generator) * 2 + 0.05)
            if weight is not None:
                weight.copy_(torch.randn(weight.shape, generator=generator))
                module.bias.copy_(torch.randn(weight.shape, generator=generator))
    return model


def randn_like_model(shape: Sequence[int], seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- capture: model and input to a graph module in one of the dialects ------------------------------------------------


def capture_modules(model: nn.Module, x: Tensor) -> fx.GraphModule:
    gm = fx.symbolic_trace(model)
    ShapeProp(gm).propagate(x)
    return gm


def capture_aten(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(model, (x,), strict=False).module()


def capture_decomposed(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(model, (x,), strict=False).run_decompositions().module()


CAPTURES: dict[str, Callable[[nn.Module, Tensor], fx.GraphModule]] = {
    "modules": capture_modules,
    "aten": capture_aten,
    "decomposed": capture_decomposed,
}


def dynamo(model: nn.Module, found: list[Findings] | None = None, **options: Any) -> Callable[..., Any]:
    """The model captured by Dynamo, rewritten, and run without code generation."""

    def backend(gm: fx.GraphModule, _inputs: Sequence[Tensor]) -> Callable[..., Any]:
        if found is not None:
            found.append(find(gm.graph))
        ConvBNPass(**{"when": "always"} | options)(gm.graph)
        gm.graph.lint()
        gm.recompile()
        return gm.forward

    return torch.compile(model, backend=backend)


def inductor(model: nn.Module, **keywords: Any) -> Callable[..., Any]:
    """The model compiled by Inductor at its first call, with the pass patched in for the length of that call."""
    compiled = torch.compile(model, **keywords)

    def call(*inputs: Any) -> Any:
        with patched(when="always"):
            return compiled(*inputs)

    return call


def counted() -> tuple[int, dict[str, int]]:
    """How many pairs have been folded since the counters were cleared, and the declines by reason."""
    ours = counters["triton_convbn"]
    assert counters["inductor"]["efficient_conv_bn_eval"] == ours["folded"]
    prefix = "declined:"
    return ours["folded"], {key.removeprefix(prefix): n for key, n in ours.items() if key.startswith(prefix) and n}


# -- comparison -----------------------------------------------------------------------------------------------------


def results(run: Callable[..., Any], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs and every gradient, the input's included, of a loss that weighs each output differently."""
    model.zero_grad()
    leaf = x.detach().clone().requires_grad_(x.is_floating_point())
    outputs = run(leaf)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found: dict[str, Tensor] = {}
    loss = leaf.new_zeros((), dtype=torch.float64)
    for index, output in enumerate(outputs):
        found[f"output {index}"] = output.detach().double()
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
        loss = loss + (output.double() * weights).sum()
    if loss.requires_grad:
        loss.backward()
    if leaf.grad is not None:
        found["input"] = leaf.grad.double()
    found |= {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return found


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each result, relative to the largest magnitude of the exact one."""
    assert found.keys() == exact.keys(), f"gradients differ in presence: {found.keys() ^ exact.keys()}"
    worst = {}
    for name, want in exact.items():
        assert found[name].shape == want.shape, name
        if not want.numel():
            continue
        assert torch.isfinite(want).all(), f"the reference is not finite: {name}"
        worst[name] = ((found[name] - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    return worst


def check(run: Callable[..., Any], model: nn.Module, x: Tensor, params_of: nn.Module | None = None) -> None:
    """Outputs and gradients of `run` agree with the model in eager fp64. `params_of`: whose gradients `run` fills."""
    double = copy.deepcopy(model).double()
    exact = results(double, double, x.double())
    found = results(run, params_of or model, x)
    for name, error in errors(found, exact).items():
        assert error < TOLERANCES[x.dtype], f"{name}: {error:.2e}"


def reasons(findings: Findings) -> list[Reason]:
    return [decline.reason for decline in findings.declines]
