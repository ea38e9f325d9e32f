"""Gradients of folded biases as rows, on hand-written graphs. Inductor's code for them is tested in test_plan.py."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from triton_convbn.kernels.inputs import FoldInputs

from triton_convbn.ops.library import fold_backward_op
from triton_convbn.ops.packed_pairs import PackedPairs
from triton_convbn.post_grad.bias_grad_rows import split_bias_grads
from triton_convbn.post_grad.context import PassContext

aten = torch.ops.aten
CHANNELS = 5


def summing(dz: Tensor, device: str = "meta", dims: tuple[int, ...] = (0, 2, 3), times: int = 1) -> fx.GraphModule:
    """Return a graph from dz, the gradient of a convolution's output, to the gradients of `times` folds.

    The folded weight is [5, 3, 1, 1]. The example of dz is on `device`.
    """
    graph = fx.Graph()
    summed = graph.placeholder("dz")
    summed.meta["val"] = torch.empty_like(dz, device=device)
    weight, *vectors = (graph.placeholder(name) for name in ("weight", "gamma", "beta", "mean", "var"))
    folded = FoldInputs(weight, None, *vectors, eps=1e-5)  # type: ignore[arg-type]
    found = []
    for _ in range(times):
        gradient = graph.call_function(aten.sum.dim_IntList, (summed, list(dims)))
        arguments = ([weight, gradient], [3], [0b1101], [], *PackedPairs.pack([folded]))
        found.append(graph.call_function(fold_backward_op, arguments))
    graph.output(found)
    return fx.GraphModule(torch.nn.Module(), graph)


def arguments(dz: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(CHANNELS, generator=generator) for _ in range(3)]
    return [dz, torch.randn(CHANNELS, 3, 1, 1, generator=generator), *vectors, torch.ones(CHANNELS)]


def image(*size: int, **options: Any) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1), **options).to(
        memory_format=torch.channels_last
    )


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        ((2, CHANNELS, 12, 20), 24),
        ((3, CHANNELS, 7, 7), 3),
        ((1, CHANNELS, 2, 9), 2),
        ((4, CHANNELS, 256, 9), 1024),
        ((5, CHANNELS, 205, 9), None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_same_gradients(size: tuple[int, ...], rows: int | None, dtype: torch.dtype) -> None:
    """Up to 1024 rows are left to the fold's backward, else none. Intermediate sums are at least fp32."""
    dz = image(*size).to(dtype)
    gm = summing(dz)
    want = gm(*arguments(dz.double()))
    split_bias_grads(gm.graph, PassContext(gm.graph))
    gm.graph.lint()
    gm.recompile()
    (node,) = (node for node in gm.graph.nodes if node.target is fold_backward_op)
    gradient = node.args[0][1].meta["val"]
    assert gradient.shape == ((CHANNELS,) if rows is None else (rows, CHANNELS))
    assert gradient.dtype == torch.promote_types(dtype, torch.float32)
    for got, exact in zip(gm(*arguments(dz))[0], want[0], strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-4, check_dtype=False)


def test_shared_gradient_is_summed_once() -> None:
    dz = image(2, CHANNELS, 12, 12)
    gm = summing(dz, times=2)
    split_bias_grads(gm.graph, PassContext(gm.graph))
    assert targets(gm).count(aten.sum.dim_IntList) == 1
    gm.recompile()
    first, second = gm(*arguments(dz))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("why", ["contiguous", "on a CPU", "another sum", "used elsewhere", "one position"])
def test_sum_is_unchanged(why: str) -> None:
    dz = image(2, CHANNELS, 1, 1) if why == "one position" else image(2, CHANNELS, 6, 6)
    dz = dz.contiguous() if why == "contiguous" else dz
    gm = summing(dz, "cpu" if why == "on a CPU" else "meta", (0, 1, 2) if why == "another sum" else (0, 2, 3))
    if why == "used elsewhere":
        total = next(node for node in gm.graph.nodes if node.target is aten.sum.dim_IntList)
        gm.graph.output_node().args = ((total, *gm.graph.output_node().args[0]),)
    before = str(gm.graph)
    split_bias_grads(gm.graph, PassContext(gm.graph))
    assert str(gm.graph) == before
