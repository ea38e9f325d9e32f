"""Scales and biases of several sums at once: values and gradients as BatchNorm's arithmetic has them, in fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from triton_convbn.ops.branch_norms import scales_of_sums

SUMS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4)
"""The channels and the number of BatchNorms of each sum."""
KINDS = st.tuples(st.booleans(), st.booleans(), st.sampled_from([1e-5, 0.1]))
"""Whether the BatchNorms have a weight, and a bias, and their eps."""

Norms = tuple[list[Tensor] | None, list[Tensor] | None, list[Tensor], list[Tensor]]


def made(sums, kind, trains, dtype=torch.float64) -> Norms:  # type: ignore[no-untyped-def]
    """Return the vectors of all BatchNorms."""
    sizes = [channels for channels, count in sums for _ in range(count)]
    weights, biases, _ = kind

    def new(learns: bool) -> list[Tensor]:
        return [torch.randn(size).to(dtype).requires_grad_(learns and trains()) for size in sizes]

    variances = [(torch.rand(size) + 0.5).to(dtype) for size in sizes]
    return new(True) if weights else None, new(True) if biases else None, new(False), variances


def expected(norms: Norms, sums, eps: float) -> list[Tensor]:  # type: ignore[no-untyped-def]
    gammas, betas, means, variances = norms
    scales, shifts = [], []
    for index, (mean, var) in enumerate(zip(means, variances, strict=True)):
        scales.append((1 if gammas is None else gammas[index]) / (var + eps).sqrt())
        shifts.append((0 if betas is None else betas[index]) - mean * scales[-1])
    own, other = iter(scales), iter(shifts)
    found = [torch.cat([next(own) for _ in range(count)]) for _, count in sums]
    return found + [torch.stack([next(other) for _ in range(count)]).sum(0) for _, count in sums]


def counts(sums) -> list[int]:  # type: ignore[no-untyped-def]
    return [count for _, count in sums]


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(SUMS, KINDS, st.data())
def test_gradients(sums, kind, data) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    norms = made(sums, kind, lambda: data.draw(st.booleans()))
    leaves = [tensor for each in norms for tensor in each or () if tensor.requires_grad]
    found = scales_of_sums(norms, kind[2], counts(sums), torch.float64)
    want = expected(norms, sums, kind[2])
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


TWO = [(4, 2), (3, 1)]
PLAIN = True, True, 1e-5


def test_rounded_once() -> None:
    """The results in fp32 are those of fp64, rounded."""
    torch.manual_seed(0)
    norms = made(TWO, PLAIN, lambda: True, torch.float32)
    exact = expected(tuple([tensor.double() for tensor in each] for each in norms), TWO, 1e-5)  # type: ignore
    for one, other in zip(scales_of_sums(norms, 1e-5, counts(TWO), torch.float32), exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=2**-24, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_have_the_dtype_of_the_vectors(dtype: torch.dtype, mixed: bool) -> None:
    torch.manual_seed(0)
    norms = made(TWO, PLAIN, lambda: True, dtype)
    affine = [tensor for each in norms[:2] for tensor in each or ()]
    if mixed:
        affine[-1].data = affine[-1].data.float()
    sum((each / 3).sum() for each in scales_of_sums(norms, 1e-5, counts(TWO), torch.float32)).backward()
    for tensor in affine:
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
    third = torch.full((3,), 1 / 3, dtype=affine[-1].dtype)
    assert torch.equal(affine[-1].grad, third), "rounded to the dtype of another vector"  # type: ignore[arg-type]


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    gammas, betas, means, variances = made(TWO, PLAIN, lambda: True)

    def run(*affine: Tensor) -> tuple[Tensor, ...]:
        return scales_of_sums((affine[:3], affine[3:], means, variances), 1e-5, counts(TWO), torch.float64)

    assert torch.autograd.gradgradcheck(lambda *own: [each**2 for each in run(*own)], [*gammas, *betas])


def test_statistics_that_train() -> None:
    torch.manual_seed(0)
    norms = made(TWO, PLAIN, lambda: True)
    tensors = [tensor.detach().requires_grad_() for each in norms for tensor in each]

    def run(*own: Tensor) -> tuple[Tensor, ...]:
        parts = own[:3], own[3:6], own[6:9], own[9:]
        return scales_of_sums(parts, 1e-5, counts(TWO), torch.float64)

    assert torch.autograd.gradcheck(run, tensors)


def test_transforms() -> None:
    torch.manual_seed(0)
    gammas, betas, means, variances = made(TWO, PLAIN, lambda: False)

    def first(gamma: Tensor) -> Tensor:
        own = [gamma, *gammas[1:]], betas, means, variances
        return scales_of_sums(own, 1e-5, counts(TWO), torch.float64)[0].sum()

    inverse = 1 / (variances[0] + 1e-5).sqrt()
    torch.testing.assert_close(torch.func.grad(first)(gammas[0]), inverse)
    by_row = torch.func.vmap(first)(torch.stack([gammas[0], 2 * gammas[0]]))
    torch.testing.assert_close(by_row, torch.stack([first(gammas[0]), first(2 * gammas[0])]))
