"""Whole models whose heads are a BatchNorm and a Linear: no BatchNorm is left, and values and gradients are exact."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

from triton_convbn import ConvBNPass, fold_exported
from triton_convbn.models import load, randomize

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.slow

# Model, input size, BatchNorms, BatchNorms before a Linear: one in each of the two heads.
MODELS = [("levit_128s", 224, 52, 2), ("repvit_m0_9", 64, 108, 2)]


def compiled(model: nn.Module, codegen: bool) -> Callable[[Tensor], Tensor]:
    def backend(gm: fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        ConvBNPass(codegen=codegen)(gm.graph)
        gm.graph.lint()
        gm.recompile()
        return gm.forward

    return torch.compile(model, backend=backend, fullgraph=True)


def results(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradient of every parameter."""
    model.zero_grad()
    output = run(x)
    (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).sum().backward()
    return {"": output.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("codegen", [True, False])
@pytest.mark.parametrize(("name", "size", "norms", "forward"), MODELS, ids=[name for name, *_ in MODELS])
def test_every_batch_norm_folds(name: str, size: int, norms: int, forward: int, codegen: bool) -> None:
    model, x = randomize(load(name)).double(), torch.randn(2, 3, size, size, dtype=torch.float64)
    eager = copy.deepcopy(model)
    exact = results(eager, eager, x)
    found = results(compiled(model, codegen), model, x)
    ours = counters["triton_convbn"]
    assert (ours["folded"], ours["folded_forward"]) == (norms, forward)
    assert not any(key.startswith("declined:") for key in ours)
    assert found.keys() == exact.keys()
    norm = torch.linalg.vector_norm
    largest = max(norm(value) for value in exact.values())
    for key, value in exact.items():
        # The softmax of levit_128s saturates: gradients before it are 1e-17, the largest 800.
        assert norm(found[key] - value) <= 1e-9 * torch.maximum(norm(value), 1e-6 * largest), key


def test_export_leaves_no_batch_norm() -> None:
    model, x = randomize(load("repvit_m0_9")), torch.randn(1, 3, 64, 64)
    folded = fold_exported(torch.export.export(model, (x,), strict=False))
    assert not any("batch_norm" in str(node.target) for node in folded.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(folded.module()(x), model(x), rtol=1e-3, atol=1e-3)
