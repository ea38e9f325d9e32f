"""Fold a detection backbone, a ResNet-50 with a feature pyramid, and print what folds and how many bytes it saves.

torchvision's model with random weights: once with nn.BatchNorm2d in eval mode, whose affine parameters train, and once
with FrozenBatchNorm2d, which has no parameters. Needs torchvision, no download.
"""

import torch
import typer
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import triton_convbn
from triton_convbn.measure import saved_for_backward


def main(size: int = 224, batch: int = 2, norms: int = 2, rows: bool = False) -> None:
    for norm in (nn.BatchNorm2d, FrozenBatchNorm2d)[:norms]:
        torch.manual_seed(0)
        layers = {"weights": None, "norm_layer": norm, "trainable_layers": 5}
        model = resnet_fpn_backbone(backbone_name="resnet50", **layers).eval()
        for module in model.modules():
            if isinstance(module, norm):  # with the initial statistics any fold would look right
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        x = torch.randn(batch, 3, size, size)
        explanation = triton_convbn.explain(model, x)
        print(f"{norm.__name__}: " + (str(explanation) if rows else str(explanation).splitlines()[-1]), flush=True)
        compiled = torch.compile(model, backend="triton_convbn_eager")
        compiled(x)
        pyramids = {}
        for name, run in (("eager", model), ("triton_convbn", compiled)):
            with saved_for_backward(model) as saved:
                pyramids[name] = run(x)
            print(f"  {name:14} {saved.total / 1e6:.1f} MB kept for backward", flush=True)
        for level, want in pyramids["eager"].items():
            torch.testing.assert_close(pyramids["triton_convbn"][level], want, rtol=1e-3, atol=1e-3)
        print(f"  the same features on every level: {', '.join(pyramids['eager'])}")


if __name__ == "__main__":
    typer.run(main)
