"""Small weights that are merged together in eager graphs: which ones, and the same gradients."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Calls
from grouped import C, Mixer, check, gradients, made, pair, run
from torch import Tensor, fx, nn

from triton_convbn import ConvBNPass
from triton_convbn.ops import merge_in_place
from triton_convbn.ops.merge_together import merge_together

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
    compiled, served = run(model)
    parameters = list(model.parameters())
    right = torch.autograd.grad(model(x).sum(), parameters)
    grads = torch.autograd.grad(compiled(x).sum(), parameters)
    assert served
    for grad, parameter, each in zip(grads, parameters, right, strict=True):
        torch.testing.assert_close(grad.add_(parameter), each + parameter)


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
