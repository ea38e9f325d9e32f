"""The gradient of a large weight as one product of matrices: its values, and when it is one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import scramble
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from triton_convbn import conv_bn_eval, conv_sum_eval
from triton_convbn.ops import weight_gradient
from triton_convbn.ops.convolution import Convolution

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding": (1, 2)},
    "stride": {"stride": (2, 3)},
    "dilation": {"dilation": (2, 1), "padding": (2, 0)},
    "everything": {"stride": (2, 1), "padding": (3, 1), "dilation": (1, 3)},
    "one_row": {"kernel": (1, 4)},
}

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "part": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(weight_gradient, "LEAST_ELEMENTS", 1)


def conv_of(stride: Any = (1, 1), padding: Any = (0, 0), dilation: Any = (1, 1), **_: Any) -> Convolution:
    return Convolution(stride, padding, dilation, False, (0, 0), 1)


class Operators(TorchDispatchMode):
    """The masks of the gradients that convolutions compute."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[10]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values(case: str, layout: str) -> None:
    options = CASES[case]
    torch.manual_seed(0)
    x, weight = LAYOUTS[layout](torch.randn(2, 5, 9, 8)), torch.randn(256, 5, *options.get("kernel", (3, 2)))
    conv = conv_of(**options)
    grad = LAYOUTS[layout](torch.randn_like(conv(x, weight, torch.zeros(256))))
    exact = conv.backward(grad.double(), x.double(), weight.double(), (True, True, True))
    with torch.no_grad(), Operators() as operators:
        found = conv.backward(grad, x, weight, (True, True, True))
    assert operators.masks == [[True, False, False]]
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert found[1] is not None
    assert found[1].is_contiguous()


@pytest.mark.parametrize("wanted", [(False, True, False), (False, True, True), (True, True, False)])
def test_what_is_not_wanted(wanted: tuple[bool, bool, bool]) -> None:
    x, weight, grad = torch.randn(2, 3, 6, 6), torch.randn(64, 3, 3, 3), torch.randn(2, 64, 4, 4)
    with torch.no_grad():
        found = conv_of().backward(grad, x, weight, wanted)
    assert [each is not None for each in found] == list(wanted)


STAYS: dict[str, dict[str, Any]] = {
    "small": {"least": 64 * 27 + 1},
    "threads": {"threads": 2},
    "one_element": {"kernel": (1, 1)},
    "many_positions": {"x": (5, 3, 6, 6)},
    "no_images": {"x": (0, 3, 6, 6)},
    "double": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "gradients_of_gradients": {"grad_enabled": True},
    "bf16_products": {"precision": "medium"},
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays_a_convolution(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change = STAYS[case]
    monkeypatch.setattr(torch, "get_num_threads", lambda: change.get("threads", 1))
    monkeypatch.setattr(weight_gradient, "LEAST_ELEMENTS", change.get("least", 1))
    x = torch.randn(change.get("x", (4, 3, 6, 6)), dtype=change.get("dtype", torch.float32))
    weight = torch.randn(64, 3, *change.get("kernel", (3, 3)), dtype=x.dtype)
    grad = torch.randn_like(conv_of()(x, weight, torch.zeros(64, dtype=x.dtype)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(change.get("precision", before))
    try:
        with torch.set_grad_enabled(change.get("grad_enabled", False)), Operators() as operators:
            conv_of().backward(grad, x, weight, (True, True, True))
    finally:
        torch.set_float32_matmul_precision(before)
    assert operators.masks == [[True, True, True]]


def test_groups_and_transposed_convolutions() -> None:
    grad, x = torch.randn(1, 64, 4, 4), torch.randn(1, 4, 6, 6)
    for conv, weight in (
        (conv_of()._replace(groups=2), torch.randn(64, 2, 3, 3)),
        (conv_of()._replace(transposed=True), torch.randn(4, 64, 3, 3)),
    ):
        given = torch.randn_like(conv(x, weight, torch.zeros(64))) if conv.transposed else grad
        with torch.no_grad(), Operators() as operators:
            conv.backward(given, x, weight, (True, True, True))
        assert operators.masks == [[True, True, True]]


@pytest.mark.parametrize("merged", [False, True])
def test_folded_and_merged_convolutions(merged: bool) -> None:
    """First and second derivatives by hand are those of the modules."""
    torch.manual_seed(0)
    large, small = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(3, 64, 1, bias=False)
    norms = [scramble(nn.BatchNorm2d(64).eval(), seed=seed) for seed in (1, 2)]
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    leaves = [x, *large.parameters(), *small.parameters(), *norms[0].parameters()]

    def ours() -> Tensor:
        if not merged:
            return conv_bn_eval(large, norms[0], x)
        return conv_sum_eval([nn.Sequential(large, norms[0]), nn.Sequential(small, norms[1])], x)

    def right() -> Tensor:
        return norms[0](large(x)) + (norms[1](small(x)) if merged else 0)

    results = []
    for call in (ours, right):
        loss = call().sin().sum()
        with Operators() as operators:
            first = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        penalty = sum((each**2).sum() for each in again if each is not None)
        results.append((first, torch.autograd.grad(penalty, leaves, allow_unused=True), operators.masks))
    assert results[0][2] == [[True, False, False]]
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        for a, b in zip(one, other, strict=True):
            if a is not None or b is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
