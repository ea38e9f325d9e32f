"""Sums of branches whose outputs are scaled instead of their weights: values, gradients, and when that is so."""

from typing import Any

import pytest
import torch
from checking import scramble
from torch import Tensor, nn

from triton_convbn import conv_sum_eval
from triton_convbn.ops import branches_autograd, scaled_outputs, weight_gradient

CASES: dict[str, dict[str, Any]] = {
    "two": {},
    "stride": {"stride": 2},
    "stride_in_width": {"stride": (1, 3)},
    "four": {"small": 3},
    "input": {"identity": True},
    "norm_of_the_input": {"norm": True},
    "everything": {"identity": True, "norm": True, "small": 2},
    "larger_kernel": {"kernel": (5, 3), "stride": (2, 1)},
    "dilation": {"dilation": 2},
    "one_image": {"images": 1},
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(weight_gradient, "LEAST_ELEMENTS", 1)
    monkeypatch.setattr(scaled_outputs, "LEAST_ELEMENTS", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `scales_outputs` has answered."""
    answers: list[bool] = []
    original = scaled_outputs.scales_outputs

    def asked(*arguments: Any) -> bool:
        answers.append(original(*arguments))
        return answers[-1]

    monkeypatch.setattr(branches_autograd, "scales_outputs", asked)
    return answers


def branches(
    stride: Any = 1,
    small: int = 1,
    identity: bool = False,
    norm: bool = False,
    kernel: tuple[int, int] = (3, 3),
    dilation: int = 1,
    channels: int = 0,
    **_: Any,
) -> list[nn.Module]:
    torch.manual_seed(0)
    outputs = channels or 128
    inputs = outputs if identity or norm else 6
    padding = tuple(dilation * (size // 2) for size in kernel)
    large = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation)
    found: list[nn.Module] = [nn.Sequential(large, nn.BatchNorm2d(outputs))]
    for _number in range(small):
        found.insert(0, nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)))
    found += [nn.Identity()] * identity + [nn.BatchNorm2d(outputs)] * norm
    return [scramble(branch.eval(), 1e-3, seed) for seed, branch in enumerate(found)]


def inputs_of(own: list[nn.Module], images: int = 2, **_: Any) -> Tensor:
    channels = next(
        module for branch in own for module in branch.modules() if isinstance(module, nn.Conv2d)
    ).in_channels
    return torch.randn(images, channels, 7, 6)


def leaves_of(own: list[nn.Module], x: Tensor) -> list[Tensor]:
    return [x, *(parameter for branch in own for parameter in branch.parameters())]


def close(one: Tensor | None, exact: Tensor | None) -> None:
    if one is not None or exact is not None:
        assert one is not None
        assert exact is not None
        torch.testing.assert_close(one, exact.to(one.dtype), rtol=1e-4, atol=2e-5 * float(exact.detach().abs().max()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_values_and_gradients(case: str, layout: str, calls: list[bool]) -> None:
    own = branches(**CASES[case])
    x = inputs_of(own, **CASES[case])
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    x = x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "transposed" else x
    output = conv_sum_eval(own, x.requires_grad_())
    grad = torch.randn(output.shape)
    found = output, *torch.autograd.grad(output, leaves_of(own, x), grad)
    assert calls == [True]
    plain = sum(branch(x) for branch in own)
    assert output.stride() == plain.stride()
    wide = [branch.double() for branch in own]
    y = x.detach().double().requires_grad_()
    exact_output = sum(branch(y) for branch in wide)
    exact = exact_output, *torch.autograd.grad(exact_output, leaves_of(wide, y), grad.double())
    for one, other in zip(found, exact, strict=True):
        close(one, other)


def test_what_is_not_wanted(calls: list[bool]) -> None:
    """Each parameter alone, and the input alone."""
    own = branches(**CASES["everything"])
    x = inputs_of(own)
    for wanted in leaves_of(own, x):
        results = []
        for leaf in leaves_of(own, x):
            leaf.requires_grad_(leaf is wanted)
        for call in (lambda: conv_sum_eval(own, x), lambda: sum(branch(x) for branch in own)):
            results.append(torch.autograd.grad(call().sin().sum(), [wanted])[0])
        close(*results)
    assert calls
    assert all(calls)
    with torch.no_grad():
        close(conv_sum_eval(own, x), sum(branch(x) for branch in own))


def test_second_derivatives_and_batched_gradients(calls: list[bool]) -> None:
    own = branches(identity=True)
    x = inputs_of(own).requires_grad_()
    leaves = leaves_of(own, x)
    results = []
    for call in (lambda: conv_sum_eval(own, x), lambda: sum(branch(x) for branch in own)):
        output = call()
        first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((each**2).sum() for each in first), leaves, retain_graph=True)
        vectors = torch.randn(3, *output.shape, generator=torch.Generator().manual_seed(1))
        batched = torch.autograd.grad(output, leaves, vectors, is_grads_batched=True)
        results.append((*first, *second, *batched))
    assert calls == [True]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.detach().abs().max()))


def test_a_checkpoint_and_writes(calls: list[bool]) -> None:
    own = branches()
    x = inputs_of(own).requires_grad_()
    output = torch.utils.checkpoint.checkpoint(lambda x: conv_sum_eval(own, x), x, use_reentrant=False)
    close(*(torch.autograd.grad(each.sum(), x)[0] for each in (output, sum(branch(x) for branch in own))))
    output = conv_sum_eval(own, x)
    with torch.no_grad():
        own[0][0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    assert all(calls)


def test_a_write_that_autograd_does_not_see(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CONVBN_CHECK_DATA", "1")
    own = branches()
    output = conv_sum_eval(own, inputs_of(own))
    own[0][0].weight.data.mul_(2)
    with pytest.raises(RuntimeError, match=r"weight . of the branches changed"):
        output.sum().backward()


STAYS: dict[str, dict[str, Any]] = {
    "many_positions": {"images": 4},
    "no_images": {"images": 0},
    "small": {"least": 128 * 6 * 9 + 1},
    "threads": {"threads": 2},
    "one_convolution": {"small": 0, "identity": True},
    "bf16_products": {"precision": "medium"},
    "double": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", STAYS)
def test_what_merges(case: str, calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    change = STAYS[case]
    monkeypatch.setattr(torch, "get_num_threads", lambda: change.get("threads", 1))
    monkeypatch.setattr(scaled_outputs, "LEAST_ELEMENTS", change.get("least", 1))
    own = [branch.to(change.get("dtype", torch.float32)) for branch in branches(**change)]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(change.get("precision", before))
    try:
        conv_sum_eval(own, inputs_of(own, **change).to(change.get("dtype", torch.float32)))
    finally:
        torch.set_float32_matmul_precision(before)
    assert calls == [False]


def test_groups_and_several_large_kernels(calls: list[bool]) -> None:
    def pair(**options: Any) -> nn.Sequential:
        return scramble(nn.Sequential(nn.Conv2d(8, 128, **options), nn.BatchNorm2d(128)).eval())

    x = torch.randn(2, 8, 5, 5)
    for own in (
        [pair(kernel_size=3, padding=1, groups=2), pair(kernel_size=1, groups=2)],
        [pair(kernel_size=3, padding=1), pair(kernel_size=3, padding=1)],
        [pair(kernel_size=1), pair(kernel_size=1)],
        [pair(kernel_size=3, padding=2), pair(kernel_size=1, padding=1)],
    ):
        conv_sum_eval(own, x)
    assert calls == [False] * 4
