"""What a compiled training step with frozen statistics keeps for backward, counted and not estimated."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_convbn.measure import saved_for_backward
from triton_convbn.models import load, randomize

pytestmark = pytest.mark.slow

pytest.importorskip("torchvision")


def kept(model: nn.Module, x: Tensor, **way: Any) -> int:
    """The bytes that one compiled forward keeps, from which backward then computes every gradient."""
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, **way)
    compiled(x)
    with saved_for_backward(model) as saved:
        loss = compiled(x).sum()
    model.zero_grad()
    loss.backward()
    # Little would be kept, too, where nothing has to be differentiated.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return saved.total


def test_resnet50() -> None:
    """Without the pass Inductor keeps 643 MB, with its own pass 388 MB."""
    model = randomize(load("resnet50"))
    saved = kept(model, torch.randn(8, 3, 224, 224), backend="triton_convbn")
    # One activation map a block has to be kept, whatever is folded: the inputs of 48 ReLUs and of the pooling.
    assert 64e6 < saved < 300e6


@pytest.mark.parametrize("batch", [8, 2])
def test_resnet50_without_code_generation(batch: int) -> None:
    """Eager keeps 687 and 172 MB, a fold that keeps its weights 426 and 177; folded again in backward 332 and 83."""
    model, x = randomize(load("resnet50")), torch.randn(batch, 3, 224, 224)
    ours = kept(model, x, backend="triton_convbn_eager")
    with saved_for_backward(model) as eager:
        model(x)
    assert 8e6 * batch < ours <= eager.total / 2


def test_folded_weights_are_what_recompute_saves() -> None:
    """A block of a ResNet-18 at a small size: its weights are larger than its activations."""
    block = randomize(load("resnet18")).layer3[1]
    x = torch.randn(4, 256, 8, 8)
    ours = kept(block, x, backend="triton_convbn")
    ours_kept = kept(block, x, backend="triton_convbn", options={"recompute": False})
    plain = kept(block, x)
    upstream = kept(block, x, options={"efficient_conv_bn_eval_fx_passes": True})
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    weights = sum(conv.weight.nbytes for conv in convolutions)
    assert ours + weights <= ours_kept
    assert ours < plain < upstream
    # The folded weights, kept: no more than Inductor's own pass keeps, but for the folded biases and the like.
    assert ours_kept <= 1.01 * upstream
