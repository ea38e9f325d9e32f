"""Sums of branches whose BatchNorms are computed together in eager graphs: which ones, and the same gradients."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Calls
from checking import scramble
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from triton_convbn import ConvBNPass
from triton_convbn.ops import merge_in_place
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


CHAINS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "three": (lambda: nn.Sequential(block(), nn.SiLU(), block(), block()), [3]),
    # A bias is no vector of a BatchNorm, and the BatchNorms of a sum have the same vectors.
    "a_bias": (lambda: nn.Sequential(block(), block(bias=True), nn.SiLU(), block()), [2]),
    "no_affine": (lambda: nn.Sequential(block(), block(affine=False), nn.SiLU(), block()), [2]),
    "other_widths": (
        lambda: nn.Sequential(
            block(), nn.SiLU(), Calls(lambda m, x: m.a(x) + m.b(x), a=block().a, b=block().b), block()
        ),
        [3],
    ),
    "one_alone": (lambda: nn.Sequential(block(), nn.SiLU()), []),
    "a_convolution_that_no_norm_follows": (
        lambda: nn.Sequential(
            block(), block(), nn.SiLU(), Calls(lambda m, x: m.a(x) + m.b(x), a=block().a, b=nn.Conv2d(C, C, 1))
        ),
        [2],
    ),
    # The scale of a BatchNorm that follows the sum is in all of its products.
    "a_product": (
        lambda: nn.Sequential(
            block(), nn.SiLU(), block(), Calls(lambda m, x: m.a(x) * 2.0 + m.b(x), a=block().a, b=block().b)
        ),
        [3],
    ),
    "a_norm_of_the_sum": (
        lambda: nn.Sequential(
            block(), Calls(lambda m, x: m.norm(m.a(x) + m.b(x)), a=block().a, b=block().b, norm=nn.BatchNorm2d(C))
        ),
        [],
    ),
}


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


CHAINS |= {
    "pairs": (lambda: nn.Sequential(pair(), nn.SiLU(), pair(), nn.SiLU(), pair()), [3]),
    "pairs_and_sums": (lambda: nn.Sequential(pair(), nn.SiLU(), block(), nn.SiLU(), pair()), [3]),
    "pairs_with_bias": (lambda: nn.Sequential(pair(True), nn.SiLU(), pair(), nn.SiLU(), pair(True)), [2]),
    "factors": (lambda: nn.Sequential(Mixer(), pair(), nn.SiLU(), Mixer(), block(), Mixer()), [5]),
    "dense_factors": (lambda: nn.Sequential(Mixer(groups=1), nn.SiLU(), Mixer(groups=1)), [2]),
    "residual": (
        lambda: nn.Sequential(*(Calls(lambda m, x: x + m.a(x), a=pair()) for _ in range(2))),
        [2],
    ),
    "differences": (
        lambda: nn.Sequential(*(Calls(lambda m, x: m.a(x) - m.b(x) / 2, a=pair(), b=pair()) for _ in range(2))),
        [2],
    ),
    "linear": (
        lambda: nn.Sequential(
            *(nn.Conv2d(C, C, 7), nn.Flatten(2), nn.Flatten(1)),
            *(nn.Linear(2 * C, C), nn.BatchNorm1d(C), nn.Tanh(), nn.Linear(C, 3), nn.BatchNorm1d(3)),
        ),
        [2],
    ),
    "transposed": (
        lambda: nn.Sequential(pair(), nn.ConvTranspose2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.SiLU(), pair()),
        [2],
    ),
    "two_pairs_of_a_norm": (
        lambda: Calls(
            lambda m, x: m.norm(torch.cat([m.a(x), m.b(x)])), a=pair()[0], b=pair(True)[0], norm=nn.BatchNorm2d(C)
        ),
        [],
    ),
    "four_pairs_of_a_norm": (
        lambda: Calls(
            lambda m, x: m.norm(torch.cat([m.a(x), m.b(x), m.c(x), m.d(x)])),
            **{name: pair(name in "cd")[0] for name in "abcd"},
            norm=nn.BatchNorm2d(C),
        ),
        [2, 2],
    ),
    "two_norms": (lambda: nn.Sequential(pair(), nn.BatchNorm2d(C), nn.SiLU(), pair(), nn.SiLU(), pair()), [2]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str) -> None:
    make, expected = CHAINS[name]
    check(*made(make()), expected)


def test_other_eps_other_group() -> None:
    model, x = made(nn.Sequential(*(block() for _ in range(5))))
    for each in model[::2]:
        each.a[1].eps = each.b[1].eps = each.c.eps = 0.1
    model[1].c.eps = 0.2  # not alike
    check(model, x, [3])


def test_a_group_is_as_large_as_a_launch() -> None:
    check(*made(nn.Sequential(*(block() for _ in range(5)))), [2, 2], pairs_per_launch=2)


def test_frozen_and_trained_sums_are_apart() -> None:
    """Else what reads the frozen scales would be saved, and their gradients computed."""
    model, x = made(nn.Sequential(*(block() for _ in range(4))))
    for each in model[::2]:
        each.requires_grad_(False)
    check(model, x, [2, 2])


@pytest.mark.parametrize("groups", [1, C])
def test_outputs_with_backward_calls_of_their_own(groups: int) -> None:
    """Else the second call raises, and the first gives zeros to what it does not reach."""
    two = lambda: nn.Sequential(pair(groups=groups), nn.SiLU(), pair(groups=groups))  # noqa: E731
    model, x = made(Calls(lambda m, x: (m.a(x), m.b(x)), a=two(), b=two()))
    compiled, served = run(model)
    one, other = compiled(x)
    one.sum().backward()
    assert all(parameter.grad is None for parameter in model.b.parameters())
    other.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert served == [2, 2]


def test_one_gradient_of_a_group() -> None:
    model, x = made(nn.Sequential(block(), nn.SiLU(), block()))
    model.requires_grad_(False)
    model[1 + 1].b[1].weight.requires_grad_()
    model[0].c.weight.requires_grad_()
    check(model, x, [2])


def test_biases_that_train_alone_are_apart() -> None:
    """Else their scales would have gradients, and each convolution would compute that of its weight."""
    model, x = made(nn.Sequential(block(), nn.SiLU(), block(), block(), nn.SiLU(), block()))
    for each in (model[0], model[2]):
        for module in each.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad_(False)
    check(model, x, [2, 2])


def test_no_group_across_grad_mode() -> None:
    """Scales that are computed without gradients have none later."""

    def forward(m: Calls, x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = m.first(x)
        return m.third(frozen + m.second(x))

    check(*made(Calls(forward, first=block(), second=block(), third=block())), [2])


def test_no_group_across_autocast() -> None:
    def forward(m: Calls, x: Tensor) -> Tensor:
        x = m.first(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = m.third(m.second(x))
        return x.float()

    model, x = made(Calls(forward, first=block(), second=block(), third=block()), torch.float32)
    compiled, served = run(model)
    found, right = gradients(compiled, model, x), gradients(model, model, x)
    assert served == [2]
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1 * float(other.detach().abs().max()))


def test_no_group_across_a_write() -> None:
    def forward(m: Calls, x: Tensor) -> Tensor:
        x = m.first(x)
        m.second.c.running_mean.add_(1.0)
        return m.second(x)

    model, x = made(Calls(forward, first=block(), second=block()))
    before = model.second.c.running_mean.clone()
    compiled, served = run(model)
    found = compiled(x)
    model.second.c.running_mean.copy_(before)
    torch.testing.assert_close(found, model(x))
    assert served == []


def test_fp16_is_scaled() -> None:
    """A scale of 1e4 does not overflow."""
    model, x = made(nn.Sequential(block(), nn.Tanh(), block()), torch.float32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, std=1e4)
    exact = gradients(model.double(), model, 1e-3 * x.double())
    model.half()
    compiled, served = run(model)
    found = compiled((1e-3 * x).half())
    assert served == [2]
    assert found.isfinite().all()
    assert (found - exact[0]).norm() <= 0.1 * exact[0].norm()


TOGETHER: dict[str, tuple[Callable[[], nn.Module], list[int], list[int]]] = {
    "depthwise": (lambda: nn.Sequential(*(pair(groups=C) for _ in range(3))), [3], [3]),
    "other_kernels": (lambda: nn.Sequential(pair(groups=C), pair(groups=C, kernel=5), pair(groups=C)), [3], [2]),
    "mixers": (
        lambda: nn.Sequential(Mixer(), nn.SiLU(), Mixer(), nn.SiLU(), pair(groups=C), nn.SiLU(), pair(groups=C)),
        [4],
        [2, 2],
    ),
    # Their input is added after the convolution.
    "dense_with_the_input": (lambda: nn.Sequential(Mixer(groups=1), nn.SiLU(), Mixer(groups=1)), [2], []),
    # A weight of 324 elements, and an input of 672.
    "not_small": (lambda: nn.Sequential(pair(), nn.SiLU(), pair()), [2], []),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_merged_together(name: str) -> None:
    make, expected, together = TOGETHER[name]
    check(*made(make()), expected, together)


def test_frozen_weights_merge_apart() -> None:
    """Else their convolutions would save their inputs."""
    model, x = made(nn.Sequential(*(pair(groups=C) for _ in range(4))))
    for each in model[::2]:
        each[0].requires_grad_(False)
    check(model, x, [4], [2, 2])


def test_a_weight_is_read_where_it_was() -> None:
    def forward(m: Calls, x: Tensor) -> Tensor:
        x = m.first(x)
        m.second[0].weight.add_(1.0)
        return m.third(m.second(x))

    model, x = made(Calls(forward, **{name: pair(groups=C) for name in ("first", "second", "third")}))
    model.requires_grad_(False)
    before = model.second[0].weight.clone()
    merged: list[int] = []
    compiled, served = run(model, merged)
    found = compiled(x)
    model.second[0].weight.copy_(before)
    torch.testing.assert_close(found, model(x))
    assert (served, merged) == ([3], [2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    model, x = made(nn.Sequential(*(pair(groups=C) for _ in range(2))), torch.float32)
    exact = gradients(model.double(), model, x.double())
    merged: list[int] = []
    model.to(dtype)
    compiled, _ = run(model, merged)
    for one, other in zip(gradients(compiled, model, x.to(dtype)), exact, strict=True):
        assert one is not None
        assert other is not None
        assert (one.double() - other).norm() <= 0.05 * other.norm()
    assert merged == ([2] if dtype == torch.bfloat16 else []), "fp16 is scaled, each sum by itself"


def test_a_write_to_a_view_of_a_linear() -> None:
    """Autograd forbids writes to a view that a custom function returns, as that of a Linear on three dimensions is."""
    linear = lambda: Calls(  # noqa: E731
        lambda m, x: torch.relu_(m.norm(m.linear(x).flatten(0, 1))).view_as(x),
        linear=nn.Linear(C, C),
        norm=nn.BatchNorm1d(C),
    )
    model, _ = made(nn.Sequential(linear(), linear()))
    check(model, torch.randn(4, 5, C, dtype=torch.float64), [2])


def test_no_kernel_merges_where_none_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, x = made(nn.Sequential(pair(), nn.SiLU(), pair()), torch.float32)
    monkeypatch.setattr(merge_in_place, "merge_op", lambda *_: pytest.fail("a kernel merged the weights"))
    check(model, x, [2], [], kernel="torch")


def test_a_kernel_merges_where_one_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """And plain torch does not merge small weights together in its place."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, x = made(nn.Sequential(Mixer(), nn.SiLU(), Mixer()), torch.float32)
    calls: list[int] = []
    merge_op = merge_in_place.merge_op
    monkeypatch.setattr(merge_in_place, "merge_op", lambda *own: calls.append(1) or merge_op(*own))
    merged: list[int] = []
    found = run(model, merged)[0](x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
    assert (len(calls), merged) == (2, [])


def test_autocast() -> None:
    model, x = made(nn.Sequential(*(pair(groups=C) for _ in range(2))), torch.float32)
    merged: list[int] = []
    compiled, _ = run(model, merged)
    with torch.autocast("cpu", torch.bfloat16):
        found, right = compiled(x), model(x)
    assert merged == [2]
    assert found.dtype == right.dtype == torch.bfloat16
    torch.testing.assert_close(found, right, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("signs", [False, True])
def test_a_rewritten_graph_is_captured_again(signs: bool) -> None:
    """By Dynamo, which traces what the calls do, and with symbolic sizes."""

    def forward(m: Calls, x: Tensor) -> Tensor:
        return m.third(m.second(m.first(x)))

    def differ(m: Calls, x: Tensor) -> Tensor:
        for each in (m.first, m.second):
            x = each(x) - m.norm(x)
        return m.third(x)

    parts = {name: pair() for name in ("first", "second", "third")}
    model, x = made(Calls(differ if signs else forward, **parts, norm=nn.BatchNorm2d(C)))
    rewritten = fx.symbolic_trace(model)
    ConvBNPass(codegen=False, when="always")(rewritten.graph)
    rewritten.recompile()
    assert rewritten.graph.find_nodes(op="call_function", target=scales_of_sums)
    torch._dynamo.reset()
    right = model(x)
    torch.testing.assert_close(torch.compile(rewritten, backend="eager", fullgraph=True)(x), right)
    torch.testing.assert_close(torch.export.export(rewritten, (x,), strict=True).module()(x), right)
    tensors = {name: each.detach() for name, each in rewritten.state_dict().items()}
    program = make_fx(lambda own, x: torch.func.functional_call(rewritten, own, (x,)), tracing_mode="symbolic")
    torch.testing.assert_close(program(tensors, x)(tensors, x), right)


@pytest.mark.parametrize("options", [{}, {"groups": C, "bias": True}], ids=["scales", "merged"])
def test_a_part_without_a_gradient_has_none(options: dict[str, Any]) -> None:
    """And no zeros, which an optimizer with weight decay or momentum takes for a gradient."""
    parts = {name: pair(**options) for name in ("first", "second", "third")}
    forward = lambda m, x: m.first(x) + m.second(x).detach() * m.third(x)  # noqa: E731
    check(*made(Calls(forward, **parts)), expected=[3], together=[3] if options else [])


def test_weights_of_several_memory_formats() -> None:
    """They decide the strides of what a convolution returns."""
    model, x = made(nn.Sequential(*(pair() for _ in range(3))))
    x = x.repeat(1, 1, 3, 3)
    last = model[2][0]
    last.weight = nn.Parameter(last.weight.detach().contiguous(memory_format=torch.channels_last))
    merged: list[int] = []
    compiled, served = run(model, merged)
    assert compiled(x).stride() == model(x).stride() != x.stride()
    assert (served, merged) == ([3], [2])


@pytest.mark.parametrize("groups", [1, C])
def test_gradients_can_be_written_to(groups: int) -> None:
    model, x = made(nn.Sequential(pair(groups=groups), nn.SiLU(), Mixer(groups), nn.SiLU(), pair(groups=groups)))
    compiled, _ = run(model)
    parameters = list(model.parameters())
    for grad, parameter in zip(torch.autograd.grad(compiled(x).sum(), parameters), parameters, strict=True):
        grad.add_(parameter)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_after_the_rewrite(dtype: torch.dtype) -> None:
    model, x = made(nn.Sequential(pair(groups=C), nn.SiLU(), pair(groups=C), nn.SiLU(), pair()), torch.float32)
    results: list[Tensor] = []

    def rewrite(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        original = copy.deepcopy(gm)
        ConvBNPass(codegen=False, when="always")(gm.graph)
        gm.recompile()
        assert len(gm.graph.find_nodes(op="call_function", target=merge_together)) == 1
        for own in (gm, original):
            results.extend(own(*(each.detach().to(dtype) for each in inputs)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=rewrite)(x)
    found, right = results
    assert found.dtype == right.dtype == dtype
    assert (found - right).norm() <= (1e-12 if dtype == torch.float64 else 0.05) * right.norm()
