"""Networks whose sums and pairs are computed together in eager graphs, and how to count these."""

from collections.abc import Callable
from typing import Any

import torch
from cases import Calls
from checking import scramble
from torch import Tensor, fx, nn

from triton_convbn import ConvBNPass
from triton_convbn.ops.branch_norms import scales_of_sums
from triton_convbn.ops.merge_together import merge_together

C = 6


def block(bias: bool = False, eps: float = 1e-5, affine: bool = True) -> nn.Module:
    def branch(size: int) -> nn.Module:
        conv = nn.Conv2d(C, C, size, padding=size // 2, bias=bias)
        return nn.Sequential(conv, nn.BatchNorm2d(C, eps=eps, affine=affine))

    return Calls(lambda m, x: m.a(x) + m.b(x) + m.c(x), a=branch(3), b=branch(1), c=nn.BatchNorm2d(C, eps=eps))


def run(model: nn.Module, together: list[int] | None = None, **options: Any) -> tuple[Callable[..., Tensor], list[int]]:
    """Return the rewritten model, and how many sums each call of `scales_of_sums` serves.

    together: How many each call of `merge_together` serves.
    """
    served: list[int] = []
    together = [] if together is None else together

    def rewrite(gm: fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        ConvBNPass(codegen=False, when="always", **options)(gm.graph)
        gm.graph.lint()
        gm.recompile()
        calls = gm.graph.find_nodes(op="call_function", target=scales_of_sums)
        served.extend(len(node.args[3]) for node in calls)
        together.extend(len(node.args[2]) for node in gm.graph.find_nodes(op="call_function", target=merge_together))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=rewrite)
    return compiled, served


def made(model: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return scramble(model.eval(), 1e-3).to(dtype), torch.randn(2, C, 7, 8, dtype=dtype)


def gradients(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> list[Tensor | None]:
    x = x.detach().requires_grad_()
    output = call(x)
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)]


def check(model: nn.Module, x: Tensor, expected: list[int], together: list[int] | None = None, **options: Any) -> None:
    """Compare with the unmodified model, and the calls with those that are expected."""
    merged: list[int] = []
    compiled, served = run(model, merged, **options)
    found, right = gradients(compiled, model, x), gradients(model, model, x)
    assert served == expected
    assert together is None or merged == together
    for one, other in zip(found, right, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def pair(bias: bool = False, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(C, C, kernel, padding=kernel // 2, bias=bias, **options), nn.BatchNorm2d(C))


class Mixer(nn.Module):
    """FastViT's RepMixer: ``x + factor * (mix(x) - norm(x))``."""

    def __init__(self, groups: int = C) -> None:
        super().__init__()
        self.mix, self.point = pair(groups=groups), pair(kernel=1, groups=groups)
        self.same, self.norm = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.factor = nn.Parameter(torch.rand(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * (self.mix(x) + self.point(x) + self.same(x) - self.norm(x))
