"""The operators that merge sums of branches, with the interpreted kernels and in plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from triton_convbn import ConvBNPass
from triton_convbn.ops.merge_library import merge_op
from triton_convbn.ops.reference import FLOATING

DTYPE = FLOATING.index(torch.float64)


@pytest.fixture(params=[False, True], ids=["torch", "triton"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run the operators with and without kernels. Returns whether kernels run."""
    if request.param:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    counters.clear()
    return bool(request.param)


def sums(requires_grad: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Return two sums in fp64: dense with the input, and depthwise."""
    torch.manual_seed(0)
    sizes = [(4, 4, 3, 3), (4, 4, 1, 3), (4, 4, 1, 1), (5, 1, 3, 3), (5, 1, 3, 3)]
    weights = [torch.randn(size, dtype=torch.float64, requires_grad=requires_grad) for size in sizes]
    scales = [torch.randn(size, dtype=torch.float64, requires_grad=requires_grad) for size in ((4, 4), (2, 5))]
    return weights, scales


def merge(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(merge_op(list(tensors[:5]), list(tensors[5:]), [3, 2], [DTYPE, DTYPE]))


@pytest.mark.slow
def test_gradients() -> None:
    weights, scales = sums()
    tensors = (*weights, *scales)
    assert torch.autograd.gradcheck(merge, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(merge, tensors, fast_mode=True)


@pytest.mark.parametrize("trained", [[0], [2, 6], [5], [3, 4]])
def test_only_what_trains_gets_a_gradient(trained: list[int]) -> None:
    weights, scales = sums(requires_grad=False)
    tensors = [*weights, *scales]
    for index in trained:
        tensors[index].requires_grad_()
    first, second = merge(*tensors)
    found = torch.autograd.grad(first.sum() + second.sum(), [tensors[index] for index in trained])
    everything = [tensor.detach().requires_grad_() for tensor in tensors]
    first, second = merge(*everything)
    every = torch.autograd.grad(first.sum() + second.sum(), everything)
    for index, gradient in zip(trained, found, strict=True):
        assert gradient.equal(every[index])


def test_a_sum_without_a_gradient() -> None:
    weights, scales = sums()
    first, _ = merge(*weights, *scales)
    first.sum().backward()
    assert weights[0].grad is not None
    assert weights[3].grad is None
    assert scales[1].grad is None


def test_transforms() -> None:
    """Forward mode and vmap have the rules of plain torch."""
    weights, scales = sums(requires_grad=False)
    tensors = (*weights, *scales)
    tangents = tuple(map(torch.ones_like, tensors))
    _, moved = torch.func.jvp(merge, tensors, tangents)
    step = 1e-6
    ahead = merge(*(tensor + step * tangent for tensor, tangent in zip(tensors, tangents, strict=True)))
    for here, there, tangent in zip(merge(*tensors), ahead, moved, strict=True):
        torch.testing.assert_close((there - here) / step, tangent, atol=1e-4, rtol=1e-4)
    stacked = tuple(torch.stack([tensor, 2 * tensor]) for tensor in tensors)
    doubled = merge(*(2 * tensor for tensor in tensors))
    for one, two, both in zip(merge(*tensors), doubled, torch.func.vmap(merge)(*stacked), strict=True):
        torch.testing.assert_close(both, torch.stack([one, two]))


@pytest.mark.parametrize("last", [False, True])
def test_strides_are_those_of_the_fake(last: bool) -> None:
    """Outputs and gradients have the strides that a compiler was promised, from dW' in any layout."""
    weights, scales = sums(requires_grad=False)
    if last:
        weights = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
    arguments: tuple[Any, ...] = (weights, scales, [3, 2], [DTYPE, DTYPE])
    torch.library.opcheck(merge_op, arguments, test_utils=["test_schema", "test_faketensor"])
    grads = [torch.ones(1, dtype=torch.float64).expand(4, 4, 3, 3), torch.randn(5, 1, 3, 3, dtype=torch.float64)]
    operator = torch.ops.triton_convbn.merge_backward.default
    torch.library.opcheck(operator, (grads, [15, 7], *arguments), test_utils=["test_schema", "test_faketensor"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point, self.same = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.point(x) + self.same(x)


@pytest.mark.parametrize("choice", ["auto", "torch", "triton"])
@pytest.mark.parametrize("codegen", [True, False])
def test_the_pass_merges_by_a_kernel_where_one_runs(choice: str, codegen: bool, kernel: bool) -> None:
    """Code that Inductor generates merges by plain torch unless the kernel is asked for."""
    if choice == "triton" and not kernel:
        pytest.skip("no kernel runs here")
    model, x = Block().eval(), torch.randn(2, 4, 6, 6)
    called: list[str] = []

    class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        ConvBNPass(kernel=choice, codegen=codegen)(gm.graph)
        gm.recompile()

        def run(*arguments: Any) -> Any:
            with Recorded():
                return gm.forward(*arguments)

        return run

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    output = compiled(x)
    with Recorded():
        output.sum().backward()
    wanted = kernel and (choice == "triton" or (choice == "auto" and not codegen))
    assert ("triton_convbn.merge.default" in called) == wanted
    assert ("triton_convbn.merge_backward.default" in called) == wanted
    torch.testing.assert_close(output, model(x))
    assert not any(key.startswith("decomposed") for key in counters["triton_convbn"])
