"""Random sums of branches in fp64: the value of the expression, and gradients by formula as autograd has them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from triton_convbn.ops.branch_form import form_of
from triton_convbn.ops.branches_autograd import conv_with_branches

C, GROUPS = 4, 2
SETTINGS = settings(
    max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

# An expression with the shape of each tensor in place of its position. "var" marks what has to be positive.
VECTOR = st.just((C,))
MAYBE = st.none() | VECTOR
KERNEL = st.sampled_from([(C, C // GROUPS, 3, 3), (C, C // GROUPS, 1, 3), (C, C // GROUPS, 1, 1)])
FACTORS = st.sampled_from([(2.0,), (-0.5,), (C, 1, 1), (1,), (1, 1, 1)])
EXPRESSIONS: st.SearchStrategy[Any] = st.recursive(
    st.tuples(st.just("conv"), KERNEL, MAYBE) | st.just(("input",)),
    lambda inner: (
        st.tuples(st.just("norm"), inner, MAYBE, MAYBE, VECTOR, st.just("var"), st.sampled_from([1e-5, 0.1]))
        | st.tuples(st.just("factor"), inner, FACTORS)
        | st.lists(st.tuples(st.sampled_from([1, -1]), inner), min_size=1, max_size=4).map(lambda each: ("sum", *each))
    ),
    max_leaves=6,
)


def numbered(expression: Any, tensors: list[Tensor], trains: Any) -> Any:
    """Return the expression with positions in `tensors`, which gets a tensor for each shape."""

    def tensor(shape: Any) -> int | None:
        if shape is None:
            return None
        new = torch.rand(C) + 0.5 if shape == "var" else torch.randn(shape)
        tensors.append(new.double().requires_grad_(shape != "var" and trains()))
        return len(tensors) - 1

    kind, *rest = expression
    if kind == "conv":
        return (kind, *map(tensor, rest))
    if kind == "norm":
        inner, weight, bias, mean, var, eps = rest
        made = numbered(inner, tensors, trains)
        statistics = tensor(mean), tensor(var)
        for position in statistics:
            tensors[position or 0].requires_grad_(False)
        return (kind, made, tensor(weight), tensor(bias), *statistics, eps)
    if kind == "factor":
        inner, factor = rest
        by = factor if isinstance(factor[0], float) else tensor(factor)
        return (kind, numbered(inner, tensors, trains), by)
    if kind == "sum":
        return (kind, *((sign, numbered(inner, tensors, trains)) for sign, inner in rest))
    return expression


def value(expression: Any, x: Tensor, tensors: list[Tensor]) -> Tensor:
    """Return what the expression says, term by term."""
    kind, *rest = expression
    if kind == "conv":
        weight, bias = (None if position is None else tensors[position] for position in rest)
        return F.conv2d(x, weight, bias, padding=[size // 2 for size in weight.shape[2:]], groups=GROUPS)
    if kind == "input":
        return x
    if kind == "norm":
        inner, weight, bias, mean, var, eps = rest
        gamma, beta = (None if position is None else tensors[position] for position in (weight, bias))
        return F.batch_norm(value(inner, x, tensors), tensors[mean], tensors[var], gamma, beta, eps=eps)
    if kind == "factor":
        inner, factor = rest
        by = factor[0] if isinstance(factor, tuple) else tensors[factor]
        return value(inner, x, tensors) * by
    return sum((sign * value(inner, x, tensors) for sign, inner in rest), torch.zeros_like(x))


@SETTINGS
@given(EXPRESSIONS, st.data())
def test_gradients(expression: Any, data: st.DataObject) -> None:
    torch.manual_seed(0)
    tensors: list[Tensor] = [torch.randn(C, C // GROUPS, 3, 3, dtype=torch.float64).requires_grad_()]
    trains = lambda: data.draw(st.booleans())  # noqa: E731
    # The first branch has the largest kernel.
    sum_of_branches = ("sum", (1, ("conv", 0, None)), (1, numbered(expression, tensors, trains)))
    x = torch.randn(2, C, 5, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(tensor for tensor in tensors if tensor.requires_grad)]
    want = value(sum_of_branches, x, tensors)
    found = conv_with_branches(x, tensors, sum_of_branches, padding=1, groups=GROUPS)
    torch.testing.assert_close(found, want)
    grad = torch.randn_like(want)
    right = torch.autograd.grad(want, leaves, grad, allow_unused=True)
    for create_graph in (False, True):  # by formula, and by autograd for second derivatives
        ours = torch.autograd.grad(found, leaves, grad, allow_unused=True, create_graph=create_graph, retain_graph=True)
        for one, other in zip(ours, right, strict=True):
            torch.testing.assert_close(one, other)
    several = torch.stack([grad, torch.zeros_like(grad), -2 * grad])
    batched = torch.autograd.grad(found, leaves, several, allow_unused=True, is_grads_batched=True, retain_graph=True)
    for one, other in zip(batched, right, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, torch.stack([other, torch.zeros_like(other), -2 * other]))
    found.backward(grad)
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    for number, each in enumerate(grads):
        each.fill_(number)
    assert all(bool((each == number).all()) for number, each in enumerate(grads)), "two gradients share memory"


def test_factors_of_the_input_have_gradients_of_their_own() -> None:
    tensors = [torch.randn(C, C // GROUPS, 3, 3), torch.randn(C, 1, 1), torch.randn(C, 1, 1)]
    tensors = [tensor.double().requires_grad_() for tensor in tensors]
    factors = [(1, ("factor", ("input",), position)) for position in (1, 2)]
    x = torch.randn(2, C, 5, 5, dtype=torch.float64)
    expression = ("sum", (1, ("conv", 0, None)), *factors)
    conv_with_branches(x, tensors, expression, padding=1, groups=GROUPS).sum().backward()
    _, one, other = tensors
    assert one.grad is not None
    torch.testing.assert_close(one.grad, other.grad)
    one.grad.zero_()
    assert other.grad is not None
    assert other.grad.any()


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_fp16_is_scaled_exactly(interpreted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of 1e4 does not overflow, and dividing by powers of two changes no digit."""
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    weight, other = (torch.randn(C, C // GROUPS, k, k).half().requires_grad_() for k in (3, 1))
    gamma, beta = ((1e4 * torch.randn(C)).requires_grad_() for _ in range(2))
    norm = ("norm", ("conv", 0, None), 2, 3, 4, 5, 1e-5)
    tensors = [weight, other, gamma, beta, torch.randn(C), torch.rand(C) + 0.5]
    expression = ("sum", (1, norm), (-1, ("factor", ("conv", 1, None), (2.0,))))
    x = (1e-2 * torch.randn(2, C, 5, 5)).half()
    leaves = tensors[:4]
    found = conv_with_branches(x, tensors, expression, padding=1, groups=GROUPS)
    exact = value(expression, x.double(), [tensor.double() for tensor in tensors])
    grad = 1e-4 * torch.randn(found.shape)
    for ours, right in zip(
        (found, *torch.autograd.grad(found, leaves, grad.half())),
        (exact, *torch.autograd.grad(exact, leaves, grad.double())),
        strict=True,
    ):
        assert (ours - right).abs().max() <= 4e-3 * right.abs().max()


def test_weights_in_order() -> None:
    """The kernel takes the scales in the order of the weights, that of the input last."""
    form = form_of(("sum", (1, ("input",)), (-1, ("conv", 3, None)), (1, ("factor", ("conv", 1, 2), (2.0,)))))
    assert form.weights == (3, 1)
    assert [product.number for _, product in form.terms] == [1, -1, 2]


def test_two_norms_of_a_branch_and_none_of_another() -> None:
    """As many BatchNorms as branches, but not one each."""
    torch.manual_seed(0)
    twice = ("norm", ("norm", ("conv", 1, None), 2, 3, 4, 5, 1e-5), 6, 7, 8, 9, 1e-5)
    expression = ("sum", (1, ("conv", 0, None)), (1, twice))
    weights = [torch.randn(C, C // GROUPS, 3, 3) for _ in range(2)]
    tensors = [each.double() for each in (*weights, *(torch.rand(C) + 0.5 for _ in range(8)))]
    x = torch.randn(2, C, 5, 5, dtype=torch.float64)
    found = conv_with_branches(x, tensors, expression, padding=1, groups=GROUPS)
    torch.testing.assert_close(found, value(expression, x, tensors))


def test_scales_are_rounded_once() -> None:
    """In fp32 arithmetic half of them are a unit off, each for its whole channel."""
    channels, eps = 1000, 1e-5
    weight = torch.ones(channels, 1, 1, 1)
    gamma, zero, var = torch.randn(channels), torch.zeros(channels), torch.rand(channels)
    norm = ("norm", ("conv", 0, None), 1, 2, 2, 3, eps)
    x = torch.ones(1, channels, 1, 1)
    found = conv_with_branches(x, [weight, gamma, zero, var], ("sum", (1, norm)), groups=channels)
    exact = gamma.double() * torch.rsqrt(var.double() + eps)
    assert torch.equal(found.flatten(), exact.float())


def test_the_bias_is_rounded_once() -> None:
    """Of what convolutions and BatchNorms add: a mean near the bias cancels in fp64."""
    channels, eps = 1000, 1e-5
    bias, beta, noise = (torch.randn(channels) for _ in range(3))
    mean, var, gamma = bias + 1e-3 * noise, torch.rand(channels), torch.randn(channels)
    norm = ("norm", ("conv", 0, 1), 2, 3, 4, 5, eps)
    tensors = [torch.ones(channels, 1, 1, 1), bias, gamma, beta, mean, var]
    x = torch.zeros(1, channels, 1, 1)
    found = conv_with_branches(x, tensors, ("sum", (1, norm)), groups=channels)
    bias, gamma, beta, mean, var = (tensor.double() for tensor in tensors[1:])
    assert torch.equal(found.flatten(), ((bias - mean) * gamma * torch.rsqrt(var + eps) + beta).float())
