"""Convolutions with kernels of one element on one thread: which are dilated, and that it changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import scramble
from torch import Tensor, fx, nn
from torch.testing._internal.two_tensor import TwoTensor

from triton_convbn import ConvBNPass
from triton_convbn.cpu import Cpu, cpu
from triton_convbn.graph import one_thread

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "part": lambda x: x[:, :, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(one_thread, "cpu", lambda: Cpu("AuthenticAMD", 26, 2))


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    keywords = {"kernel_size": 1} | options
    return scramble(nn.Sequential(nn.Conv2d(64, 64, **keywords), nn.BatchNorm2d(64), nn.SiLU()).eval(), 1e-3)


class Branches(nn.Module):
    """``bn(conv(x)) + bn(conv(x)) + bn(x)``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = network()[:2], network()[:2]  # type: ignore[index]
        self.c = scramble(nn.BatchNorm2d(64).eval())

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x)


class Pointwise(nn.Module):
    """``bn(conv(x)), pointwise(y)``."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.pointwise = network(kernel_size=3), nn.Conv2d(64, 64, 1)

    def forward(self, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = tensors
        return self.pair(x), self.pointwise(y)


def run(model: nn.Module, x: Any, **options: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Return the rewritten model and the dilation of each convolution."""
    found: list[Any] = []

    def rewrite(gm: fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        ConvBNPass(**{"codegen": False, "when": "always"} | options)(gm.graph)
        gm.recompile()
        convs = [node for node in gm.graph.nodes if "conv" in getattr(node.target, "__name__", "")]
        found.extend(node.kwargs.get("dilation", 1) for node in convs)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=rewrite)
    compiled(x)
    return compiled, found


X = (2, 64, 32, 32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [network, Branches])
@pytest.mark.parametrize("codegen", [False, True])
def test_dilated(layout: str, make: Callable[[], nn.Module], codegen: bool) -> None:
    check(make(), LAYOUTS[layout](torch.randn(4, 64, 32, 32)).detach(), 1, codegen)


def check(model: nn.Module, x: Tensor, dilated: int, codegen: bool) -> None:
    """Check the number of convolutions, and that outputs and gradients are those of the model, in the same layout."""
    x.requires_grad_()
    compiled, found = run(model, x, codegen=codegen)
    assert found == [(2, 2)] * dilated
    leaves = [x, *model.parameters()]
    results = []
    for call in (compiled, model):
        output = call(x)
        results.append((output, torch.autograd.grad((output * torch.linspace(-1, 2, 32)).sum(), leaves)))
    (ours, grads), (right, exact) = results
    assert ours.stride() == right.stride()
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
    for one, other in zip(grads, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


class Between(nn.Module):
    """A convolution with a BatchNorm, and two with an activation between them and none."""

    def __init__(self, folds: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = network()[:2]  # type: ignore[index]
        self.rest = scramble(nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.GELU(), nn.Conv2d(64, 64, (1, 1))))
        self.first[1].train(not folds)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codegen", [False, True])
def test_convolutions_without_a_batchnorm(layout: str, codegen: bool) -> None:
    check(Between(folds=True), LAYOUTS[layout](torch.randn(4, 64, 32, 32)).detach(), 3, codegen)


def test_a_graph_in_which_nothing_folds() -> None:
    """It stays as it is."""
    assert run(Between(folds=False), torch.randn(X))[1] == [1, 1, 1]


OTHERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "a_larger_kernel": ({"kernel_size": 3, "padding": 1}, X),
    "groups": ({"groups": 2}, X),
    "few_products": ({}, (2, 64, 16, 16)),
    "many_images": ({}, (16, 64, 32, 32)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    options, shape = OTHERS[name]
    assert (2, 2) not in run(network(**options), torch.randn(shape))[1]


def test_a_small_image_with_many_products() -> None:
    torch.manual_seed(0)
    model = scramble(nn.Sequential(nn.Conv2d(64, 512, 1), nn.BatchNorm2d(512)).eval(), 1e-3)
    assert run(model, torch.randn(1, 64, 17, 17))[1] == [(1, 1)], "torch computes it by neither of the two"
    assert run(model, torch.randn(1, 64, 18, 18))[1] == [(2, 2)]


def test_other_dimensions() -> None:
    torch.manual_seed(0)
    model = scramble(nn.Sequential(nn.Conv1d(64, 64, 1), nn.BatchNorm1d(64)).eval(), 1e-3)
    assert (2, 2) not in run(model, torch.randn(2, 64, 1024))[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert (2, 2) not in run(network().to(dtype), torch.randn(X, dtype=dtype))[1]


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert (2, 2) not in run(network(), torch.randn(X))[1]


def test_a_dynamic_batch() -> None:
    model, x = network(), torch.randn(X)
    torch._dynamo.mark_dynamic(x, 0)
    assert (2, 2) not in run(model, x)[1]


def test_tensor_subclasses() -> None:
    """DTensor can only shard the last dimension of an undilated convolution."""
    model, x = Pointwise(), torch.randn(X)
    assert run(model, (x, x))[1] == [(1, 1), (2, 2)]
    assert run(model, (x, TwoTensor(x, x.clone())))[1] == [(1, 1), 1]


def test_graphs_that_run_elsewhere() -> None:
    assert (2, 2) not in run(network(), torch.randn(X), recompute=False)[1]


def test_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), torch.randn(X)
    assert run(model, x)[1] == [(2, 2)]
    with torch.backends.mkldnn.flags(enabled=False):
        assert (2, 2) not in run(model, x)[1]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        assert (2, 2) not in run(model, x)[1]
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert (2, 2) not in run(model, x)[1]
    for other in (None, Cpu("AuthenticAMD", 25, 17), Cpu("GenuineIntel", 26, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(one_thread, "cpu", lambda other=other: other)
            assert (2, 2) not in run(model, x)[1]


def test_cpu_is_read() -> None:
    """On another system or architecture it is None."""
    own, text = cpu(), Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert (own is None) == ("vendor_id" not in text)
    assert own is None or f"cpu family\t: {own.family}\nmodel\t\t: {own.model}\n" in text
