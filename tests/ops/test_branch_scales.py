"""Scales and biases of several sums at once: values and gradients as BatchNorm's arithmetic has them, in fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from triton_convbn.ops.branch_scales import scales_of_sums

NORM = st.fixed_dictionaries({"affine": st.sampled_from(["both", "weight", "bias", "none"]), "bias": st.booleans()})
NORM = st.tuples(NORM, st.sampled_from([1e-5, 0.1]))
SUMS = st.lists(st.tuples(st.integers(1, 5), st.lists(NORM, min_size=1, max_size=4)), min_size=1, max_size=4)


def made(drawn, trains, dtype=torch.float64):  # type: ignore[no-untyped-def]
    """Return tensors and `scales_of_sums`' description of the sums."""
    tensors: list[Tensor] = []

    def new(tensor: Tensor, learns: bool = True) -> int:
        tensors.append(tensor.to(dtype).requires_grad_(learns and trains()))
        return len(tensors) - 1

    sums = tuple(
        tuple(
            (
                new(torch.randn(channels)) if kind["affine"] in ("both", "weight") else None,
                new(torch.randn(channels)) if kind["affine"] in ("both", "bias") else None,
                new(torch.randn(channels), False),
                new(torch.rand(channels) + 0.5, False),
                new(torch.randn(channels)) if kind["bias"] else None,
                eps,
            )
            for kind, eps in norms
        )
        for channels, norms in drawn
    )
    return tensors, sums


def expected(tensors: list[Tensor], sums) -> list[Tensor]:  # type: ignore[no-untyped-def]
    found = []
    for norms in sums:
        total: Tensor | float = 0.0
        for *positions, eps in norms:
            gamma, beta, mean, var, bias = (None if position is None else tensors[position] for position in positions)
            scale = (1 if gamma is None else gamma) / (var + eps).sqrt()
            found.append(scale)
            total = total + (0 if beta is None else beta) - (mean - (0 if bias is None else bias)) * scale
        found.append(total)
    return found


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(SUMS, st.data())
def test_gradients(drawn, data) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    tensors, sums = made(drawn, lambda: data.draw(st.booleans()))
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    found, want = scales_of_sums(tensors, sums, torch.float64), expected(tensors, sums)
    assert len(found) == len(want)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)
    reached = [index for index, each in enumerate(want) if each.requires_grad and data.draw(st.booleans())]
    if not reached:
        return
    ours, right = [found[index] for index in reached], [want[index] for index in reached]
    grads = [torch.randn_like(each) for each in right]
    exact = torch.autograd.grad(right, leaves, grads, allow_unused=True, retain_graph=True)
    for create_graph in (False, True):  # by formula, and by autograd for second derivatives
        each = torch.autograd.grad(ours, leaves, grads, allow_unused=True, create_graph=create_graph, retain_graph=True)
        for one, other in zip(each, exact, strict=True):
            torch.testing.assert_close(total(one), total(other))
            if one is not None and other is not None:
                torch.testing.assert_close(one.detach(), other)
    several = [torch.stack([grad, -2 * grad]) for grad in grads]
    batched = torch.autograd.grad(ours, leaves, several, allow_unused=True, is_grads_batched=True, retain_graph=True)
    for one, other in zip(batched, exact, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, torch.stack([other, -2 * other]))
    torch.autograd.backward(ours, grads)
    filled = [leaf.grad for leaf in leaves if leaf.grad is not None]
    for number, grad in enumerate(filled):
        grad.fill_(number)
    assert all(bool((grad == number).all()) for number, grad in enumerate(filled)), "two gradients share memory"


def total(grad: Tensor | None) -> Tensor:
    """Return the sum. A gradient of zeros and none are the same."""
    return torch.zeros((), dtype=torch.float64) if grad is None else grad.detach().sum()


def both(drawn_dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    kind = {"affine": "both", "bias": False}, 1e-5
    return made([(4, [kind, kind]), (3, [kind])], lambda: True, drawn_dtype)


def test_rounded_once() -> None:
    """The results in fp32 are those of fp64, rounded."""
    torch.manual_seed(0)
    tensors, sums = both()
    exact = expected([tensor.double() for tensor in tensors], sums)
    for one, other in zip(scales_of_sums(tensors, sums, torch.float32), exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=2**-24, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_the_dtype_of_the_vectors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors, sums = both(dtype)
    sum(each.sum() for each in scales_of_sums(tensors, sums, torch.float32)).backward()
    assert {tensor.grad.dtype for tensor in tensors if tensor.grad is not None} == {dtype}


def test_statistics_that_train() -> None:
    torch.manual_seed(0)
    tensors, sums = both(torch.float64)
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *own: scales_of_sums(own, sums, torch.float64), tensors)


def test_transforms() -> None:
    torch.manual_seed(0)
    tensors, sums = both(torch.float64)
    tensors = [tensor.detach() for tensor in tensors]

    def first(gamma: Tensor) -> Tensor:
        return scales_of_sums([gamma, *tensors[1:]], sums, torch.float64)[0].sum()

    inverse = 1 / (tensors[3] + 1e-5).sqrt()
    torch.testing.assert_close(torch.func.grad(first)(tensors[0]), inverse)
    by_row = torch.func.vmap(first)(torch.stack([tensors[0], 2 * tensors[0]]))
    torch.testing.assert_close(by_row, torch.stack([first(tensors[0]), 2 * first(tensors[0])]))
