"""Gradients of sums of branches: which are needed, what backward keeps, derivatives of derivatives, Inductor."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from branch_cases import MERGED, C, assert_same, blocks, conv_bn, gradients, made, rewritten
from cases import Calls
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from triton_convbn.graph import conv_bn_pass
from triton_convbn.ops.branches_autograd import conv_with_branches


@pytest.mark.parametrize("frozen", ["weights", "norms", "one_norm", "all_but_the_factor"])
def test_frozen_parameters(frozen: str) -> None:
    model, x = made(MERGED["repmixer"][0])
    for name, parameter in model.named_parameters():
        is_norm = parameter.ndim == 1
        parameter.requires_grad_(
            {
                "weights": is_norm or parameter.ndim == 3,
                "norms": not is_norm,
                "one_norm": not name.startswith("norm"),
                "all_but_the_factor": name.startswith("g"),
            }[frozen]
        )
    run, findings, _ = rewritten(model, x)
    assert findings.sums
    found, expected = gradients(run, model, x), gradients(model, model, x)
    assert {name for name in found if found[name] is None} == {name for name in expected if expected[name] is None}
    known = {name for name in expected if expected[name] is not None}
    assert_same({name: found[name] for name in known}, {name: expected[name] for name in known})


def test_backward_keeps_the_input_alone() -> None:
    """Autograd saves x, parameters that exist anyway, and little else. Not one output of a branch."""
    model, x = made(MERGED["nested"][0])
    run, _, _ = rewritten(model, x)
    kept = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    new = 0

    def save(tensor: Tensor) -> Tensor:
        nonlocal new
        storage = tensor.untyped_storage()
        new += storage.nbytes() * (storage.data_ptr() not in kept)
        kept.add(storage.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        output = run(x)
    assert new < output.untyped_storage().nbytes() / 4


def test_no_gradients_share_memory() -> None:
    """A write to one gradient, as clipping does, changes no other."""
    model, x = made(MERGED["repvgg"][0])
    run, _, _ = rewritten(model, x)
    run(x).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    before = [grad.clone() for grad in grads]
    for grad in grads:
        grad.add_(1)
    for grad, old in zip(grads, before, strict=True):
        assert grad.equal(old + 1)


def block_as_function(model: nn.Module) -> Callable[..., Tensor]:
    """Return the "repvgg" block as a function of x and its tensors."""
    first, second, third = model.a[1], model.b[1], model.c
    expression = (
        "sum",
        (1, ("norm", ("conv", 0, None), 2, 3, 4, 5, first.eps)),
        (1, ("norm", ("conv", 1, None), 6, 7, 8, 9, second.eps)),
        (1, ("norm", ("input",), 10, 11, 12, 13, third.eps)),
    )
    return lambda x, *tensors: conv_with_branches(x, tensors, expression, padding=1)


def tensors_of(model: nn.Module) -> list[Tensor]:
    norms = [(bn.weight, bn.bias, bn.running_mean, bn.running_var) for bn in (model.a[1], model.b[1], model.c)]
    return [model.a[0].weight, model.b[0].weight, *(each.detach() for norm in norms for each in norm)]


def test_second_derivatives() -> None:
    model, x = made(MERGED["repvgg"][0])
    run = block_as_function(model)
    tensors = [
        each.detach()[:3, :3].clone().requires_grad_() if each.ndim > 1 else each[:3].clone()
        for each in tensors_of(model)
    ]
    inputs = [x[:1, :3, :3, :3].clone().requires_grad_(), *tensors]
    for index in (2, 3, 6, 10, 11):
        inputs[1 + index].requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def one_weight_for_two_norms(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(x) + m.norm(m.a[0](x))


def central_difference(m: nn.Module, x: Tensor) -> Tensor:
    """Return a central difference convolution (arXiv 2003.04092)."""
    weight = m.a[0].weight
    return m.a[0](x) - 0.7 * F.conv2d(x, weight.sum((2, 3), keepdim=True))


@pytest.mark.parametrize("call", [one_weight_for_two_norms, central_difference])
@pytest.mark.parametrize("recompute", [False, True])
def test_penalty_on_gradients_of_weights_that_depend_on_each_other(call: Any, recompute: bool) -> None:
    """Autograd counted the paths through the first weight twice, if a graph of the gradients was wanted."""
    model, x = made(lambda: Calls(call, a=conv_bn(), norm=nn.BatchNorm2d(C)))
    run, findings, _ = rewritten(model, x, recompute=recompute)
    assert findings.sums

    def derivatives(run: Callable[..., Tensor]) -> dict[str, Tensor]:
        weight = model.a[0].weight
        (first,) = torch.autograd.grad(run(x).tanh().sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        return {"first": first.detach(), "second": second}

    assert_same(derivatives(run), derivatives(model))


def test_transforms() -> None:
    model, x = made(MERGED["repvgg"][0])
    run, tensors = block_as_function(model), [each.detach() for each in tensors_of(model)]
    assert_same({"y": run(x, *tensors)}, {"y": model(x).detach()})
    each = torch.func.vmap(lambda x, w: run(x, w, *tensors[1:]))(
        torch.stack([x, 2 * x]), torch.stack([tensors[0], -tensors[0]])
    )
    assert_same({"y": each[1]}, {"y": run(2 * x, -tensors[0], *tensors[1:])})
    tangents = (torch.ones_like(x), *map(torch.ones_like, tensors))
    _, forward = torch.func.jvp(run, (x, *tensors), tangents)
    _, pull = torch.func.vjp(run, x, *tensors)
    reverse = sum((one * other).sum() for one, other in zip(pull(torch.ones_like(forward)), tangents, strict=True))
    assert_same({"sum": forward.sum()}, {"sum": reverse})
    leaves = [each.clone().requires_grad_() for each in tensors[:2]]
    y = run(x, *leaves, *tensors[2:])
    grads = torch.stack([torch.ones_like(y), y.detach()])
    found = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(y, leaves, grad, retain_graph=True) for grad in grads]
    for index, value in enumerate(found):
        assert_same({"g": value[1]}, {"g": expected[1][index]})


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["every_parameter", "frozen_norms"])
def test_one_convolution_and_its_input_under_inductor(trained: str) -> None:
    """Merged where the convolution's own fold gains: if the BatchNorm's scale trains. Not in inference."""
    model, x = made(MERGED["one_convolution_and_the_input"][0], torch.float32)
    model.a[1].requires_grad_(trained == "every_parameter")
    found = []
    with patched_merge(found):
        torch.compile(model, backend="triton_convbn")(x).sum().backward()
    with patched_merge(found), torch.no_grad():
        torch._dynamo.reset()
        torch.compile(model, backend="triton_convbn")(x)
    assert found == [int(trained == "every_parameter"), 0]


def patched_merge(found: list[int]) -> Any:
    """Append how many sums merge in each graph."""
    return mock.patch.object(conv_bn_pass, "count_folds", lambda findings: found.append(len(findings.sums)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_under_inductor(layout: torch.memory_format) -> None:
    """Three convolutions forward, three backward, and no merged weight kept."""
    model, x = made(blocks, torch.float32)
    model, x = model.to(memory_format=layout), x.to(memory_format=layout)
    double = copy.deepcopy(model).double()
    exact = gradients(double, double, x.double())
    run = torch.compile(model, backend="triton_convbn")
    found, code = run_and_get_code(lambda: gradients(run, model, x))
    assert_same(found, exact, 5e-6)
    assert counters["triton_convbn"]["merged"] == 3
    forward, backward = code
    assert forward.count("= extern_kernels.convolution(") == 3
    assert backward.count("= torch.ops.aten.convolution_backward.default(") == 3
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), x)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(x)
    assert {tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in own} == {tuple(x.shape)}


def test_write_through_data_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CONVBN_CHECK_DATA", "1")
    model, x = made(MERGED["repvgg"][0])
    run, _, _ = rewritten(model, x)
    run(x).sum().backward()
    y = run(x)
    model.b[0].weight.data.mul_(2)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_a_bias_of_a_1d_sum_trains(dtype: torch.dtype) -> None:
    """The convolution's backward returns a gradient of the weight, in another shape, although it is masked out."""
    x, large, small = (torch.randn(size, dtype=dtype) for size in ((2, 3, 5), (2, 3, 3), (2, 3, 1)))
    bias = torch.randn(2, dtype=dtype, requires_grad=True)
    expression = ("sum", (1, ("conv", 0, 1)), (1, ("conv", 2, None)))
    output = conv_with_branches(x, [large, bias, small], expression, padding=1)
    output.sum().backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.full((2,), 10.0, dtype=dtype))
