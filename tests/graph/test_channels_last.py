"""Parts of a graph that run channels_last without a compiler: which do, and that nobody outside sees it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checking import scramble
from torch import Tensor, fx, nn

from triton_convbn import ConvBNPass
from triton_convbn.ops.memory_format import to_channels_last

C = 16


def conv_bn(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def depthwise(kernel: int = 3, outputs: int = C) -> nn.Sequential:
    return conv_bn(C, outputs, kernel, C)


class Blocks(nn.Module):
    """Depthwise blocks as in mobile networks, and a function after them."""

    def __init__(self, end: Callable[..., Any] = lambda x, y: y, **changes: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.end = end
        self.stem = conv_bn(8, C)
        self.first, self.second, self.third = depthwise(), depthwise(5), depthwise()
        self.narrow, self.wide = conv_bn(C, C, 1), nn.Conv2d(C, C, 1)
        self.gate = nn.Sequential(nn.Conv2d(C, 4, 1), nn.ReLU(), nn.Conv2d(4, C, 1), nn.Sigmoid())
        self.relu = nn.ReLU(inplace=True)
        for name, module in changes.items():
            setattr(self, name, module)
        scramble(self.eval(), 1e-3)

    def forward(self, x: Tensor) -> Any:
        y = self.relu(self.stem(x))
        y = y + F.silu(self.wide(F.hardswish(self.first(y))))
        y = self.relu(self.narrow(F.dropout(self.second(y), 0.1, self.training)))
        y = self.relu(self.third(y))
        return self.end(x, y)


def excited(x: Tensor, y: Tensor, gate: nn.Module) -> Tensor:
    return y * gate(y.mean((2, 3), keepdim=True)) + y * gate(F.adaptive_avg_pool2d(y, 1))


def run(model: nn.Module, x: Tensor, dynamic: bool | None = None, **options: Any) -> tuple[Callable[..., Any], int]:
    """Return the rewritten model and the number of copies to channels_last."""
    copies = []

    def rewrite(gm: fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        ConvBNPass(**{"codegen": False, "when": "always"} | options)(gm.graph)
        gm.graph.lint()
        gm.recompile()
        copies.append(len(gm.graph.find_nodes(op="call_function", target=to_channels_last)))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=rewrite, dynamic=dynamic)
    compiled(x.clone())
    return compiled, copies[0]


def tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def steps(tensor: Tensor) -> list[int]:
    """Return the strides of a gradient without those of dimensions of size 1, and all strides of an output."""
    if tensor.requires_grad:
        return list(tensor.stride())
    return [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def check(model: nn.Module, x: Tensor, copies: int, **options: Any) -> None:
    """Check the number of copies, and that outputs and gradients are the model's, with the same strides."""
    compiled, found = run(model, x, **options)
    assert found == copies
    results = []
    for call in (compiled, model):
        leaf = x.clone().requires_grad_()
        outputs = tensors(call(leaf * 1))
        loss = sum((output * torch.linspace(-1, 2, output.shape[-1])).sum() for output in outputs)
        results.append((outputs, torch.autograd.grad(loss, [leaf, *model.parameters()], materialize_grads=True)))
    for ours, right in zip(*results, strict=True):
        for one, other in zip(ours, right, strict=True):
            assert steps(one) == steps(other)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.detach().abs().max()))


X = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(3))

ENDS: dict[str, Callable[..., Any]] = {
    "output": lambda x, y: y,
    "view": lambda x, y: y.view(2, -1),
    "two_outputs": lambda x, y: (y, y.view(2, C, -1)),
    "mean": lambda x, y: y.mean((2, 3)),
    "mean_of_torch": lambda x, y: torch.mean(y, dim=(-1, -2), keepdim=True),
    "pool": lambda x, y: F.adaptive_avg_pool2d(y, 1),
    "enlarged_mean": lambda x, y: F.interpolate(F.adaptive_avg_pool2d(y, (1, 1)), (3, 5)),
    "strides": lambda x, y: y.as_strided((2, C, 144), (C * 144, 144, 1)),
    "size": lambda x, y: y.reshape(y.shape[0], y.size(1), -1),
}


@pytest.mark.parametrize("end", ENDS)
def test_nobody_outside_sees_the_layout(end: str) -> None:
    check(Blocks(ENDS[end]), X, 1)


def test_gates() -> None:
    model = Blocks()
    model.end = lambda x, y: excited(x, y, model.gate)
    check(model, X, 1)


def test_outputs_of_more_channels() -> None:
    """Each input channel of the last one has two."""
    check(Blocks(third=depthwise(7, 2 * C)), X, 1)


def test_a_sum_of_branches() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small, self.norm = depthwise(), depthwise(1), nn.BatchNorm2d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.large(x) + self.small(x) + self.norm(x)

    check(Blocks(first=Branches(), third=Branches()), X, 1)
    check(Blocks(first=Branches(), third=Branches()), X, 1, pairs_per_launch=1)


def write(tensor: Tensor, to: Callable[[Tensor], Tensor]) -> Tensor:
    to(tensor).mul_(2)
    return tensor


WRITES: dict[str, Callable[..., Any]] = {
    "to_the_output": lambda x, y: write(y * 3, lambda z: z),
    "to_a_view": lambda x, y: write(y * 3, lambda z: z[:, 0]),
    "to_a_view_that_is_detached": lambda x, y: write(y * 3, lambda z: z.detach().view(2, -1)),
    "to_an_input_of_the_part": lambda x, y: y + write(x.mean(1, keepdim=True).expand(y.shape).clone(), lambda z: z),
}


@pytest.mark.parametrize("end", WRITES)
def test_writes(end: str) -> None:
    """A copy would not see them. A call in place is of a part where it alone reads what it writes to."""
    check(Blocks(WRITES[end]), X, 1)


def test_a_write_to_the_input_of_the_graph() -> None:
    class Written(Blocks):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.mul_(2))

    check(Written(), X, 0)  # what is left is too small


def test_a_write_that_another_call_sees() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = depthwise()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.relu_(y) * 2 + y

    check(Blocks(third=Written()), X, 1)


STAYS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "no_depthwise_convolution": (
        lambda: Blocks(first=conv_bn(C, C, 1), second=conv_bn(C, C, 1), third=conv_bn(C, C, 1)),
        X,
        {},
    ),
    "double": (lambda: Blocks().double(), X.double(), {}),
    "channels_last": (Blocks, X.to(memory_format=torch.channels_last), {}),
    "one_position": (Blocks, X[:, :, :1, :1].contiguous(), {}),
    "dynamic": (Blocks, X, {"dynamic": True}),
    "a_graph_to_run_elsewhere": (Blocks, X, {"recompute": False}),
    "nothing_folds": (lambda: Blocks().train(), X, {}),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays_contiguous(case: str) -> None:
    make, x, options = STAYS[case]
    assert run(make(), x, **options)[1] == 0


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert run(Blocks(), X)[1] == 0


def test_a_part_that_does_not_pay() -> None:
    """Depthwise convolutions read and write two tensors, and the copies are two. Three would pay."""
    one = nn.Sequential(conv_bn(32, C), depthwise(), conv_bn(C, C))
    three = nn.Sequential(conv_bn(32, C), depthwise(), depthwise(), depthwise(), conv_bn(C, C))
    x = torch.randn(2, 32, 12, 12)
    for model, copies in ((one, 0), (three, 1)):
        # 288 products in the first convolution: channels_last it is less exact.
        assert run(scramble(model.eval()), x)[1] == copies


@pytest.mark.parametrize(("threads", "copies"), [(1, 1), (2, 2)])
def test_kernels_of_one_element(threads: int, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one thread MKL computes them, in both layouts alike. On several, oneDNN is less exact with 160 channels."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def several() -> list[nn.Module]:
        return [conv_bn(160, 160, groups=160) for _ in range(3)]

    model = nn.Sequential(*several(), conv_bn(160, 160, 1), *several())
    assert run(scramble(model.eval()), torch.randn(2, 160, 6, 6))[1] == copies


def test_second_derivatives_and_batched_gradients() -> None:
    model, x = Blocks(lambda x, y: F.softplus(y).mean((2, 3))), X.clone().requires_grad_()
    compiled, copies = run(model, X)
    assert copies == 1
    results = []
    for call in (compiled, model):
        output = call(x)
        (first,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        (batched,) = torch.autograd.grad(output[0], x, torch.eye(C), retain_graph=True, is_grads_batched=True)
        results.append((first, batched, *torch.autograd.grad((first**2).sum(), [x, model.first[0].weight])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_transforms() -> None:
    """The copies are left out there."""
    model = Blocks()
    compiled, copies = run(model, X)
    assert copies == 1
    tangent = torch.randn_like(X)
    torch._dynamo.reset()
    for ours, right in zip(
        torch.func.jvp(compiled, (X,), (tangent,)), torch.func.jvp(model, (X,), (tangent,)), strict=True
    ):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
