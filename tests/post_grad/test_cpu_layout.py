"""The layouts of folded weights and of their gradients in C++: nobody copies them afterwards."""

import copy
from unittest import mock

import pytest
import torch
from checking import scramble
from torch import Tensor, fx, nn
from torch._inductor import config

from triton_convbn.post_grad.context import PassContext
from triton_convbn.post_grad.cpu_layout import set_cpu_layouts


class Block(nn.Module):
    """A pair, a sum of branches with kernels of 3 x 3, 3 x 3 and 1 x 1 and the input, and a pair of 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        branches = [nn.Conv2d(16, 16, size, padding=size // 2, bias=False) for size in (3, 3, 1)]
        self.branches = nn.ModuleList(nn.Sequential(branch, nn.BatchNorm2d(16)) for branch in branches)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.relu(sum((branch(x) for branch in self.branches), self.norm(x))))


@pytest.mark.parametrize("parameters", [torch.contiguous_format, torch.channels_last])
def test_nothing_is_copied(parameters: torch.memory_format) -> None:
    """The convolution's backward reads channels_last weights, autograd takes gradients with their parameters' strides.

    Inductor runs convolutions channels_last if it expects a gain, which it does for these on a CPU.
    """
    model = scramble(Block().eval()).to(memory_format=parameters)
    x = torch.linspace(-1, 1, 4 * 8 * 12 * 12).view(4, 8, 12, 12).contiguous(memory_format=parameters)
    want = copy.deepcopy(model).double()
    want(x.double()).sin().sum().backward()
    given: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: given.__setitem__(name, grad))
    weights: list[Tensor] = []
    convolution_backward = torch.ops.aten.convolution_backward.default

    def recorded(grad: Tensor, x: Tensor, weight: Tensor, *rest: object) -> object:
        assert x.is_contiguous(memory_format=torch.channels_last)
        weights.append(weight)
        return convolution_backward(grad, x, weight, *rest)

    with config.patch(force_disable_caches=True):
        run = torch.compile(model, backend="triton_convbn")
        run(x).sum().backward()
    model.zero_grad()
    # The code looks the operator up on every call.
    with mock.patch.object(torch.ops.aten.convolution_backward, "default", recorded):
        run(x).sin().sum().backward()
    assert len(weights) == 3
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    for (name, parameter), exact in zip(model.named_parameters(), want.parameters(), strict=True):
        assert given[name].stride() == parameter.stride(), name  # also where a size is 1: DDP warns otherwise
        torch.testing.assert_close(parameter.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * exact.grad.abs().max())


def test_a_pointwise_weight_that_is_expanded() -> None:
    """Its elements share memory, which no gradient can be written to."""
    base, bn = torch.randn(8, 1, 1, 1, requires_grad=True), scramble(nn.BatchNorm2d(8).eval())
    run = torch.compile(lambda x, w: bn(nn.functional.conv2d(x, w)).relu(), backend="triton_convbn")
    run(torch.randn(2, 4, 6, 5), base.expand(8, 4, 1, 1)).sum().backward()
    assert base.grad is not None
    assert base.grad.isfinite().all()


def test_a_weight_that_is_computed_in_many_steps() -> None:
    """Two operations a step read the step before: 2^60 paths lead to the parameter, and each is one too many."""
    graph = fx.Graph()
    grad, x, weight = (graph.placeholder(name) for name in ("grad", "x", "weight"))
    x.meta["val"] = torch.empty(2, 4, 8, 8).to(memory_format=torch.channels_last)
    computed = weight
    for _ in range(60):
        product = graph.call_function(torch.ops.aten.mul.Tensor, (computed, 0.1))
        computed = graph.call_function(torch.ops.aten.add.Tensor, (computed, product))
    arguments = grad, x, computed, [0], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
    graph.output(graph.call_function(torch.ops.aten.convolution_backward.default, arguments))
    set_cpu_layouts(graph, PassContext(graph))
    assert len(graph.nodes) == 3 + 2 * 60 + 2


def test_gradients_of_pointwise_convolutions_that_do_not_fold() -> None:
    """Dilated, oneDNN computes them, with the strides of channels_last. DDP warns about these."""
    dilated = nn.Conv2d(64, 64, 1, dilation=2)
    pair = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))
    model = scramble(nn.Sequential(pair, nn.GELU(), dilated, nn.GELU(), nn.Conv2d(64, 64, 1, stride=2)).eval())
    with config.patch(force_disable_caches=True):
        torch.compile(model, backend="triton_convbn")(torch.randn(2, 64, 32, 32)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), name
