"""Merged weights of several small sums at once: values and gradients as those of each sum alone, in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from triton_convbn.ops.merge_reference import kernel_of, merged_weight, rows_of
from triton_convbn.ops.merge_together import merge_together

Case = tuple[list[list[Tensor]], list[Tensor], list[int]]

# C_out and groups of each sum, the columns, the kernels of the weights, and whether the input is a term.
CASES: dict[str, Any] = {
    "depthwise": ([(4, 4), (6, 6), (4, 4)], 1, [(1, 1), (3, 3), (3, 3)], True),
    "one_weight": ([(4, 4), (3, 3)], 1, [(5, 3)], False),
    "two_outputs_a_channel": ([(6, 3), (8, 4)], 1, [(3, 3), (1, 3)], False),
    "dense": ([(4, 1), (4, 1)], 4, [(1, 1), (3, 3)], True),
    "dense_other_widths": ([(4, 1), (7, 1)], 3, [(1, 1), (1, 1)], False),
    "groups": ([(4, 2), (6, 3)], 2, [(3, 3), (1, 1)], True),
    "1d": ([(4, 4), (5, 5)], 1, [(1,), (3,)], True),
    "3d": ([(4, 4), (5, 5)], 1, [(1, 1, 1), (3, 1, 3)], True),
    "linear": ([(4, 1), (5, 1)], 3, [()], False),
}


def made(name: str, dtype: torch.dtype = torch.float64, trains: bool = True) -> Case:
    torch.manual_seed(0)
    sums, columns, kernels, has_input = CASES[name]
    weights = [[torch.randn(out, columns, *kernel).to(dtype) for kernel in kernels] for out, _ in sums]
    scales = [torch.randn(len(kernels) + has_input, out, dtype=torch.float64) for out, _ in sums]
    if dtype != torch.float64:
        scales = [scale.float() for scale in scales]
    for each in (*scales, *(weight for own in weights for weight in own)):
        each.requires_grad_(trains)
    return weights, scales, [number for _, number in sums]


def alone(weights: list[list[Tensor]], scales: list[Tensor], groups: list[int]) -> list[Tensor]:
    kernel = max(map(kernel_of, weights[0]))
    every = zip(weights, scales, groups, strict=True)
    return [merged_weight(own, *rows_of(scale, own), kernel, number) for own, scale, number in every]


def leaves(case: Case) -> list[Tensor]:
    weights, scales, _ = case
    return [*scales, *(weight for own in weights for weight in own)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reached", [None, 0])
def test_gradients(name: str, reached: int | None) -> None:
    case = made(name)
    found, want = merge_together(*case, torch.float64), alone(*case)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)
    chosen = slice(reached, None if reached is None else reached + 1)
    grads = [torch.randn_like(each) for each in want[chosen]]
    exact = torch.autograd.grad(want[chosen], leaves(case), grads, allow_unused=True, retain_graph=True)
    several = [torch.stack([grad, -2 * grad]) for grad in grads]
    batched = torch.autograd.grad(
        found[chosen], leaves(case), several, allow_unused=True, retain_graph=True, is_grads_batched=True
    )
    for create_graph in (True, False):
        ours = torch.autograd.grad(
            found[chosen], leaves(case), grads, allow_unused=True, create_graph=create_graph, retain_graph=create_graph
        )
        for one, other, both in zip(ours, exact, batched, strict=True):
            if other is None:
                assert one is None or not one.any()
                continue
            torch.testing.assert_close(one.detach(), other)
            torch.testing.assert_close(both, torch.stack([other, -2 * other]))


@pytest.mark.parametrize("name", ["depthwise", "dense", "linear"])
def test_second_derivatives(name: str) -> None:
    case = made(name)
    weights, scales, groups = case
    count = len(weights[0])

    def run(*own: Tensor) -> list[Tensor]:
        rest = own[len(scales) :]
        by_sum = [list(rest[start : start + count]) for start in range(0, len(rest), count)]
        return [each**2 for each in merge_together(by_sum, own[: len(scales)], groups, torch.float64)]

    assert torch.autograd.gradgradcheck(run, leaves(case))


def test_a_weight_in_two_sums() -> None:
    weights, scales, groups = made("depthwise")
    weights[2] = weights[0]
    found, want = merge_together(weights, scales, groups, torch.float64), alone(weights, scales, groups)
    for create_graph in (False, True):
        ours, exact = (
            torch.autograd.grad(
                [(each**2).sum() for each in outputs], weights[0], create_graph=create_graph, retain_graph=True
            )
            for outputs in (found, want)
        )
        for one, other in zip(ours, exact, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, merged: torch.dtype) -> None:
    case = made("depthwise", dtype)
    for one, other in zip(merge_together(*case, merged), alone(*case), strict=True):
        assert one.dtype == merged
        torch.testing.assert_close(one, other.to(merged))
    sum(each.float().sum() for each in merge_together(*case, merged)).backward()  # type: ignore[union-attr]
    for each in leaves(case):
        assert each.grad is not None
        assert (each.grad.dtype, each.grad.shape) == (each.dtype, each.shape)


@pytest.mark.parametrize("trained", ["scales", "second weights"])
def test_some_train(trained: str) -> None:
    case = made("depthwise", trains=False)
    weights, scales, _ = case
    own = scales if trained == "scales" else [each[1] for each in weights]
    for each in own:
        each.requires_grad_()
    grads = [torch.randn_like(each) for each in alone(*case)]
    ours = torch.autograd.grad(merge_together(*case, torch.float64), own, grads)
    for one, other in zip(ours, torch.autograd.grad(alone(*case), own, grads), strict=True):
        torch.testing.assert_close(one, other)


def test_layout_of_gradients_and_memory() -> None:
    """Gradients have the strides of their parameters. No two share memory."""
    torch.manual_seed(0)
    weights = [[torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()] for _ in range(2)]
    scales = [torch.randn(1, 4, requires_grad=True) for _ in range(2)]
    found = merge_together(weights, scales, [1, 1], torch.float32)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in found)
    sum((each**2).sum() for each in found).backward()  # type: ignore[union-attr]
    grads = [each.grad for each in (*scales, *(own[0] for own in weights))]
    assert all(own[0].grad.stride() == own[0].stride() for own in weights)  # type: ignore[union-attr]
    for number, grad in enumerate(grads):
        grad.fill_(number)  # type: ignore[union-attr]
    assert all(bool((grad == number).all()) for number, grad in enumerate(grads))


def test_transforms() -> None:
    weights, scales, groups = made("depthwise", trains=False)

    def first(weight: Tensor) -> Tensor:
        return merge_together([[weight, *weights[0][1:]], *weights[1:]], scales, groups, torch.float64)[0].sum()

    exact = torch.func.grad(lambda weight: alone([[weight, *weights[0][1:]]], scales[:1], groups[:1])[0].sum())
    torch.testing.assert_close(torch.func.grad(first)(weights[0][0]), exact(weights[0][0]))
    _, tangent = torch.func.jvp(first, (weights[0][0],), (torch.ones_like(weights[0][0]),))
    torch.testing.assert_close(tangent, exact(weights[0][0]).sum())


def test_a_weight_that_is_written_to_before_backward() -> None:
    case = made("depthwise")
    found = merge_together(*case, torch.float64)
    with torch.no_grad():
        case[0][1][2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found[0].sum().backward()


def test_writes_through_data_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CONVBN_CHECK_DATA", "1")
    case = made("depthwise")
    found = merge_together(*case, torch.float64)
    case[0][0][1].data.add_(1)
    with pytest.raises(RuntimeError, match="of the branches changed between forward and backward"):
        found[0].sum().backward()


def test_weights_of_inference_mode() -> None:
    with torch.inference_mode():
        weights, scales, groups = made("depthwise", trains=False)
    scales = [scale.clone().requires_grad_() for scale in scales]
    sum(each.sum() for each in merge_together(weights, scales, groups, torch.float64)).backward()  # type: ignore[union-attr]
    assert all(scale.grad is not None for scale in scales)
