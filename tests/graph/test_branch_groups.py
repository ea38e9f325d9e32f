"""Sums and pairs whose BatchNorms are computed together in eager graphs: which ones, and the same gradients."""

from collections.abc import Callable

import pytest
import torch
from cases import Calls
from grouped import C, Mixer, block, check, gradients, made, pair, run
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from triton_convbn import ConvBNPass
from triton_convbn.ops.branch_norms import scales_of_sums

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


def test_a_write_to_a_view_of_a_linear() -> None:
    """Autograd forbids writes to a view that a custom function returns, as that of a Linear on three dimensions is."""
    linear = lambda: Calls(  # noqa: E731
        lambda m, x: torch.relu_(m.norm(m.linear(x).flatten(0, 1))).view_as(x),
        linear=nn.Linear(C, C),
        norm=nn.BatchNorm1d(C),
    )
    model, _ = made(nn.Sequential(linear(), linear()))
    check(model, torch.randn(4, 5, C, dtype=torch.float64), [2])


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
