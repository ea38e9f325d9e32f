"""Scales and biases of several sums at once: values and gradients as BatchNorm's arithmetic has them, in fp64."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from triton_convbn.ops.branch_form import Composition
from triton_convbn.ops.branch_norms import scales_of_sums

Sums = list[tuple[int, Composition]]
"""The channels and the composition of each sum."""


@st.composite
def compositions(draw: Any) -> Composition:
    weights, of_input = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    signs = draw(st.tuples(*[st.sampled_from([1.0, 1.0, -1.0, 0.5])] * (weights + of_input)))
    return Composition(weights, signs, draw(st.sampled_from([None, None, 1.0, -2.0])), draw(st.booleans()))


SUMS = st.lists(
    st.tuples(st.integers(1, 5), st.one_of(st.just(Composition(2, (1.0, 1.0))), compositions())), min_size=1, max_size=4
)
KINDS = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1e-5, 0.1]))
"""Whether the BatchNorms have a weight, and a bias, and follow convolutions with a bias, and their eps."""

Norms = tuple[list[Tensor] | None, list[Tensor] | None, list[Tensor], list[Tensor], list[Tensor] | None]


def made(sums: Sums, kind: Any, trains: Any, dtype: torch.dtype = torch.float64) -> tuple[Norms, list[Tensor]]:
    """Return the vectors of all BatchNorms, and the factors."""
    sizes = [channels for channels, composition in sums for _ in composition.signs]
    weights, biases, inner, _ = kind

    def new(learns: bool) -> list[Tensor]:
        return [torch.randn(size).to(dtype).requires_grad_(learns and trains()) for size in sizes]

    variances = [(torch.rand(size) + 0.5).to(dtype) for size in sizes]
    norms = new(True) if weights else None, new(True) if biases else None, new(False), variances
    factors = [torch.randn(channels, 1, 1).to(dtype) for channels, composition in sums if composition.has_factor]
    return (*norms, new(True) if inner else None), [factor.requires_grad_(trains()) for factor in factors]


def expected(norms: Norms, factors: list[Tensor], sums: Sums, eps: float) -> list[Tensor]:
    gammas, betas, means, variances, inner = norms
    numbers, rest = iter(range(len(means))), iter(factors)
    scales, biases = [], []
    for channels, composition in sums:
        factor = next(rest).view(-1) if composition.has_factor else 1.0
        own, of_input, bias = [], [], torch.zeros(channels, dtype=means[0].dtype)
        for index, sign in enumerate(composition.signs):
            number = next(numbers)
            scale = (1 if gammas is None else gammas[number]) / (variances[number] + eps).sqrt()
            mean = means[number] if inner is None else means[number] - inner[number]
            bias = bias + sign * factor * ((0 if betas is None else betas[number]) - mean * scale)
            (own if index < composition.weights else of_input).append(sign * factor * scale)
        if composition.own is not None:
            of_input.append(torch.full((channels,), composition.own, dtype=means[0].dtype))
        scales.append(torch.stack([*own, *([sum(of_input)] if of_input else [])]))  # type: ignore[list-item]
        biases.append(bias)
    return scales + biases


def run(norms: Norms, factors: list[Tensor], sums: Sums, eps: float, wide: torch.dtype = torch.float64) -> Any:
    return scales_of_sums(norms, factors, eps, [composition for _, composition in sums], wide)


@settings(max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(SUMS, KINDS, st.data())
def test_gradients(sums: Sums, kind: Any, data: Any) -> None:
    torch.manual_seed(0)
    norms, factors = made(sums, kind, lambda: data.draw(st.booleans()))
    leaves = [tensor for each in (*norms, factors) for tensor in each or () if tensor.requires_grad]
    found, want = run(norms, factors, sums, kind[-1]), expected(norms, factors, sums, kind[-1])
    assert len(found) == len(want)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)
    reached = [index for index, each in enumerate(want) if each.requires_grad and data.draw(st.booleans())]
    if not reached:
        return
    ours, right = [found[index] for index in reached], [want[index] for index in reached]
    grads = [torch.randn_like(each) for each in right]
    exact = torch.autograd.grad(right, leaves, grads, allow_unused=True, retain_graph=True)
    for create_graph in (False, True):
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


TWO: Sums = [(4, Composition(2, (1.0, 1.0))), (3, Composition(1, (1.0,)))]
MIXED: Sums = [(4, Composition(1, (1.0, -1.0), 1.0, has_factor=True)), (3, Composition(1, (1.0,)))]
PLAIN = True, True, False, 1e-5
WITH_BIAS = True, True, True, 1e-5


@pytest.mark.parametrize("sums", [TWO, MIXED])
def test_rounded_once(sums: Sums) -> None:
    """The results in fp32 are those of fp64, rounded."""
    torch.manual_seed(0)
    norms, factors = made(sums, PLAIN, lambda: True, torch.float32)
    wide: Any = tuple(None if each is None else [tensor.double() for tensor in each] for each in norms)
    exact = expected(wide, [factor.double() for factor in factors], sums, 1e-5)
    for one, other in zip(run(norms, factors, sums, 1e-5, torch.float32), exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=2**-24, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_have_the_dtype_of_the_vectors(dtype: torch.dtype, mixed: bool) -> None:
    torch.manual_seed(0)
    norms, factors = made(MIXED[::-1], PLAIN, lambda: True, dtype)
    affine = [tensor for each in norms[:2] for tensor in each or ()]
    betas = norms[1]
    assert betas is not None
    if mixed:
        betas[0].data = betas[0].data.float()
    sum((each / 3).sum() for each in run(norms, factors, MIXED[::-1], 1e-5, torch.float32)).backward()
    for tensor in (*affine, *factors):
        assert tensor.grad is not None
        assert (tensor.grad.dtype, tensor.grad.shape) == (tensor.dtype, tensor.shape)
    third = torch.full((3,), 1 / 3, dtype=betas[0].dtype)
    assert torch.equal(betas[0].grad, third), "rounded to the dtype of another vector"  # type: ignore[arg-type]


@pytest.mark.parametrize("sums", [TWO, MIXED])
@pytest.mark.parametrize("kind", [PLAIN, WITH_BIAS])
def test_second_derivatives(sums: Sums, kind: Any) -> None:
    torch.manual_seed(0)
    norms, factors = made(sums, kind, lambda: True)
    gammas, betas, means, variances, inner = norms
    number = len(means)

    def squares(*own: Tensor) -> list[Tensor]:
        lists = [list(own[start : start + number]) for start in (0, number, 2 * number)]
        rest = list(own[(3 if inner else 2) * number :])
        vectors = lists[0], lists[1], means, variances, lists[2] if inner else None
        return [each**2 for each in run(vectors, rest, sums, 1e-5)]

    assert torch.autograd.gradgradcheck(squares, [*(gammas or ()), *(betas or ()), *(inner or ()), *factors])


def test_statistics_that_train() -> None:
    torch.manual_seed(0)
    norms, _ = made(TWO, PLAIN, lambda: True)
    tensors = [tensor.detach().requires_grad_() for each in norms for tensor in each or ()]

    def of(*own: Tensor) -> Any:
        return run((own[:3], own[3:6], own[6:9], own[9:], None), [], TWO, 1e-5)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(of, tensors)


def test_transforms() -> None:
    torch.manual_seed(0)
    (gammas, betas, means, variances, _), _ = made(TWO, PLAIN, lambda: False)
    assert gammas is not None

    def first(gamma: Tensor) -> Tensor:
        return run(([gamma, *gammas[1:]], betas, means, variances, None), [], TWO, 1e-5)[0].sum()

    inverse = 1 / (variances[0] + 1e-5).sqrt()
    torch.testing.assert_close(torch.func.grad(first)(gammas[0]), inverse)
    by_row = torch.func.vmap(first)(torch.stack([gammas[0], 2 * gammas[0]]))
    torch.testing.assert_close(by_row, torch.stack([first(gammas[0]), first(2 * gammas[0])]))


def test_a_factor_that_is_written_to_before_backward() -> None:
    """Its gradient reads it. Those of BatchNorms alone read nothing that learns."""
    norms, factors = made(MIXED, PLAIN, lambda: True)
    found = run(norms, factors, MIXED, 1e-5)
    with torch.no_grad():
        factors[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found[0].sum().backward()


def test_writes_through_data_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CONVBN_CHECK_DATA", "1")
    norms, factors = made(MIXED, PLAIN, lambda: True)
    found = run(norms, factors, MIXED, 1e-5)
    factors[0].data.add_(1)
    with pytest.raises(RuntimeError, match="of the BatchNorms changed between forward and backward"):
        found[0].sum().backward()


def test_scales_have_no_gradient_if_only_biases_train() -> None:
    norms, factors = made(MIXED, PLAIN, lambda: False)
    betas = norms[1]
    assert betas is not None
    betas[0].requires_grad_()
    found = run(norms, factors, MIXED, 1e-5)
    assert [each.requires_grad for each in found] == [False, False, True, True]
    found[2].sum().backward()
    torch.testing.assert_close(betas[0].grad, factors[0].view(-1).detach())
