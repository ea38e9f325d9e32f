"""Which graphs Inductor compiles contiguous, and the merged weights that its C++ then adds up in place."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from checking import check, scramble
from torch import Tensor, fx, nn
from torch._inductor import config
from torch._inductor.select_algorithm import extern_kernels
from torch.nn.modules.batchnorm import _BatchNorm

from triton_convbn.compat import WRITES_IN_ORDER
from triton_convbn.post_grad import manager
from triton_convbn.post_grad.add_small_kernels import add_small_kernels
from triton_convbn.post_grad.context import PassContext

aten = torch.ops.aten

older = not WRITES_IN_ORDER


@pytest.fixture(autouse=True)
def avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile as on a CPU that has it, so that every CPU runs the same tests."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


class Sum(nn.Module):
    """The sum of a BatchNorm and of convolutions with BatchNorms. kernels: Their sizes, the strides are 1."""

    def __init__(
        self, channels: int, *kernels: Any, identity: bool = True, dimensions: int = 2, **options: Any
    ) -> None:
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"BatchNorm{dimensions}d")
        paddings = [size // 2 if isinstance(size, int) else tuple(each // 2 for each in size) for size in kernels]
        self.branches = nn.ModuleList(
            nn.Sequential(conv(channels, channels, size, padding=padding, bias=False, **options), norm(channels))
            for size, padding in zip(kernels, paddings, strict=True)
        )
        if identity:
            self.branches.append(norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches[1:]) + self.branches[0](x)


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def run(
    model: nn.Module, x: Tensor, trains: bool = False, dynamic: bool = False, **options: Any
) -> tuple[Tensor, list[Tensor], int]:
    """Return the output, the inputs of the convolutions, and the number of weights that are added up in place."""
    inputs: list[Tensor] = []
    added = 0

    def convolution(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        inputs.append(x)
        return original(x, *rest, **options)

    def count(graph: fx.Graph, context: PassContext) -> None:
        nonlocal added
        add_small_kernels(graph, context)
        graph.lint()
        added += len(graph.find_nodes(op="call_function", target=aten.as_strided_scatter.default))

    torch._dynamo.reset()
    passes = [count if each is add_small_kernels else each for each in manager.PASSES]
    with (
        config.patch(force_disable_caches=True),
        mock.patch.object(manager, "PASSES", passes),
        torch.set_grad_enabled(trains),
    ):
        compiled = torch.compile(model, backend="triton_convbn", dynamic=dynamic or None, options=options)
        compiled(x)
        original = extern_kernels.convolution
        with mock.patch.object(extern_kernels, "convolution", convolution):
            output = compiled(x)
    return output, inputs, added


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@pytest.mark.skipif(older, reason="channels_last there")
def test_large_sums_train_contiguous() -> None:
    """And so do all other convolutions of the graph. Channels_last is less exact with AVX-512."""
    has_avx512 = torch._C._get_cpu_capability() == "AVX512"
    norm = nn.BatchNorm2d(64)
    model = scramble(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), norm, Sum(64, 3, 1)).eval())
    x = torch.randn(2, 64, 12, 12)
    exact = copy.deepcopy(model).double()(x.double()).detach()
    contiguous, inputs, added = run(model, x, trains=True)
    assert [each.is_contiguous() for each in inputs] == [True, True]
    assert added
    channels_last, inputs, added = run(model, x, trains=True, force_layout_optimization=True)
    assert any(map(is_channels_last, inputs)), "the option is the user's"
    assert added == 0
    assert contiguous.is_contiguous()
    contiguous, channels_last = contiguous.detach(), channels_last.detach()
    if has_avx512:
        assert rms(contiguous - exact) < rms(channels_last - exact)


@pytest.mark.skipif(older, reason="channels_last there")
@pytest.mark.parametrize(
    ("size", "options"), [(8, {}), (32, {}), (8, {"freezing": True}), (8, {"dynamic": True})], ids=str
)
def test_inference_is_contiguous_where_weights_are_large(size: int, options: dict[str, bool]) -> None:
    """Else the copies of the activations take longer. Frozen weights are channels_last before the layout is chosen."""
    model = scramble(Sum(64, 3, 1).eval())
    x = torch.randn(2, 64, size, size)
    expected = copy.deepcopy(model)(x)
    output, inputs, added = run(model, x, **options)
    contiguous = size == 8 and not options
    if not options.get("freezing"):
        assert [is_channels_last(each) for each in inputs] == [not contiguous]
    assert added == contiguous
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_other_cpus_keep_inductors_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous, oneDNN's AVX2 code starts the sums with the bias, which is less exact than channels_last."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = scramble(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), Sum(64, 3, 1)).eval())
    _, inputs, added = run(model, torch.randn(2, 64, 12, 12), trains=True)
    assert any(map(is_channels_last, inputs))
    assert added == 0


OTHERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "few_products": (lambda: Sum(16, 3, 1), torch.float32),
    "inference": (lambda: Sum(64, 3, 1), torch.float32),
    "one_element": (lambda: Sum(256, 1, 1), torch.float32),
    "depthwise": (lambda: Sum(64, 3, 1, groups=64), torch.float32),
    "pair": (lambda: nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)), torch.float32),
    "sixteen_bits": (lambda: Sum(64, 3, 1), torch.bfloat16),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_graphs_keep_inductors_layout(name: str) -> None:
    make, dtype = OTHERS[name]
    layer: Any = make()
    channels = next(layer.parameters()).shape[0]
    model = scramble(nn.Sequential(nn.Conv2d(4, channels, 3, padding=1), nn.BatchNorm2d(channels), layer).eval())
    _, inputs, added = run(model.to(dtype), torch.randn(2, 4, 16, 16, dtype=dtype), trains=name != "inference")
    assert len(inputs) == 2
    assert is_channels_last(inputs[1])
    assert added == 0


def test_users_layout_is_kept() -> None:
    """Contiguous is not forced on a model that is channels_last itself."""
    model = scramble(Sum(64, 3, 1).eval()).to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 12, 12).to(memory_format=torch.channels_last)
    output, inputs, added = run(model, x, trains=True)
    assert is_channels_last(inputs[0])
    assert is_channels_last(output)
    assert added == 0
    torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)


SUMS: dict[str, tuple[Callable[[], Sum], tuple[int, ...]]] = {
    "square": (lambda: Sum(24, 3, 1), (2, 24, 7, 6)),
    "no_input": (lambda: Sum(24, 3, 1, identity=False), (2, 24, 7, 6)),
    "small_one_first": (lambda: Sum(24, 1, 3, 3), (2, 24, 7, 6)),
    "row": (lambda: Sum(24, (1, 3), 3), (2, 24, 7, 6)),
    "column": (lambda: Sum(24, 5, (3, 1), identity=False), (2, 24, 7, 6)),
    "groups": (lambda: Sum(24, 3, 1, groups=3), (2, 24, 7, 6)),
    "one_dimension": (lambda: Sum(8, 5, 3, identity=False, dimensions=1), (2, 8, 9)),
    "three_dimensions": (lambda: Sum(8, 3, 1, dimensions=3), (2, 8, 5, 4, 3)),
    "three_sizes": (lambda: Sum(24, 5, 3, 1), (2, 24, 7, 6)),
    "one_size": (lambda: Sum(24, 3, 3), (2, 24, 7, 6)),
}


def sizes(model: Sum, dtype: torch.dtype) -> int:
    """Return the number of sizes of kernels. In 16 bit the input is one of 1 x 1, else it is added afterwards."""
    kernels = {tuple(weight.shape[2:]) for weight in model.parameters() if weight.ndim > 1}
    has_input = isinstance(model.branches[-1], _BatchNorm)
    return len(kernels | {(1,) * len(next(iter(kernels)))} if has_input and dtype == torch.bfloat16 else kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SUMS)
def test_small_kernels_are_added_in_place(name: str, dtype: torch.dtype) -> None:
    """Each element is rounded once, so the weight is that of the padded sum."""
    make, shape = SUMS[name]
    model = make()
    count = int(sizes(model, dtype) == 2 and not older)
    scramble(model.eval()).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    output, _, added = run(model, x, layout_optimization=False)
    assert added == count
    with mock.patch.object(manager, "PASSES", [each for each in manager.PASSES if each is not add_small_kernels]):
        padded, _, _ = run(model, x, layout_optimization=False)
    assert torch.equal(output, padded)


class Broadcast(nn.Module):
    """A weight that the model itself adds up, whose smaller kernel is broadcast."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.sum = Sum(24, 3, 1)
        self.wide, self.small = nn.Parameter(torch.randn(24, 24, 3, 3)), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.sum(x).relu(), self.wide + F.pad(self.small, (1, 1, 1, 1)), padding=1)


@pytest.mark.parametrize("shape", [(24, 24, 1, 1), (24, 1, 1, 1), (1, 24, 1, 1), (1, 1)])
def test_kernels_that_are_broadcast_are_padded(shape: tuple[int, ...]) -> None:
    model = scramble(Broadcast(*shape).eval())
    x = torch.randn(2, 24, 7, 6)
    output, _, added = run(model, x, trains=True)
    assert added == (0 if older else 1 + (shape == (24, 24, 1, 1)))
    torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", SUMS)
def test_gradients(name: str) -> None:
    make, shape = SUMS[name]
    model = scramble(make().eval())
    with config.patch(force_disable_caches=True, layout_optimization=False):
        check(torch.compile(model, backend="triton_convbn"), model, torch.randn(shape))
