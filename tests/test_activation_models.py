"""Networks whose activations need their input keep half of what they keep under plain Inductor's partitioner."""

from typing import Any

import pytest
import torch
from post_grad_partition import partitioned
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from triton_convbn.measure import saved_for_backward
from triton_convbn.models import load, randomize

pytestmark = pytest.mark.slow


def yolov8n() -> tuple[nn.Module, Tensor]:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    model = randomize(tasks.DetectionModel("yolov8n.yaml", verbose=False)).eval()
    model.model[-1].training = True  # returns the heads' outputs instead of boxes
    return model, torch.randn(1, 3, 64, 64)


def unet() -> tuple[nn.Module, Tensor]:
    nets = pytest.importorskip("monai.networks.nets")
    sizes: dict[str, Any] = {"channels": (16, 32, 64), "strides": (2, 2), "num_res_units": 2}
    model = nets.UNet(spatial_dims=3, in_channels=1, out_channels=2, **sizes, norm="batch", act="prelu")
    return randomize(model).eval(), torch.randn(1, 1, 32, 32, 32)


def torchvision(name: str) -> tuple[nn.Module, Tensor]:
    pytest.importorskip("torchvision")
    return randomize(load(name)).eval(), torch.randn(2, 3, 64, 64)


MODELS: dict[str, tuple[Any, float]] = {
    "efficientnet_b0": (lambda: torchvision("efficientnet_b0"), 0.62),
    "mobilenet_v3_large": (lambda: torchvision("mobilenet_v3_large"), 0.62),
    "yolov8n": (yolov8n, 0.61),
    "monai UNet": (unet, 0.65),
}


def step(model: nn.Module, run: Any, x: Tensor) -> tuple[int, dict[str, Tensor]]:
    """Return the bytes that a forward keeps, and the gradients."""
    model.zero_grad()
    with saved_for_backward(model) as saved:
        output = run(x)
    losses = [each.square().sum() for each in tree_leaves(output) if isinstance(each, Tensor) and each.requires_grad]
    sum(losses, torch.zeros((), dtype=x.dtype)).backward()
    return saved.total, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    build, most = MODELS[name]
    model, x = build()
    model, x = model.double(), x.double()
    _, expected = step(model, model, x)
    kept: dict[bool, int] = {}
    for ours in (False, True):
        torch._dynamo.reset()
        graphs: list[fx.GraphModule] = []
        kept[ours], found = step(model, torch.compile(model, backend=partitioned(graphs, convbn=ours)), x)
        for path, gradient in found.items():
            torch.testing.assert_close(gradient, expected[path], rtol=1e-6, atol=1e-7, msg=f"{ours} {path}")
    assert kept[True] <= most * kept[False]
