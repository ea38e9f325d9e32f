"""Models that take no images, by function, for the command line: as in models_with_inputs:audio."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def pair(convolution: type[nn.Module], norm: type[nn.Module], inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(convolution(inputs, outputs, 3, padding=1, bias=False), norm(outputs), nn.ReLU())


class UNet(nn.Module):
    """A 3-D U-Net of one level for volumes with one channel, as in medical imaging."""

    def __init__(self) -> None:
        super().__init__()
        self.down = pair(nn.Conv3d, nn.BatchNorm3d, 1, 4)
        self.middle = pair(nn.Conv3d, nn.BatchNorm3d, 4, 4)
        self.up = nn.Sequential(nn.ConvTranspose3d(4, 4, 2, 2), nn.BatchNorm3d(4))
        self.head = nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        return self.head(torch.cat([high, self.up(self.middle(nn.functional.max_pool3d(high, 2)))], 1))


def unet() -> nn.Module:
    return UNet()


def audio() -> nn.Module:
    return nn.Sequential(pair(nn.Conv1d, nn.BatchNorm1d, 1, 4), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))


@dataclass
class Prediction:
    scores: Tensor
    labels: Tensor


@dataclass
class Output(OrderedDict[str, Any]):
    """A mapping and a dataclass, like the outputs of transformers."""

    loss: Tensor
    logits: Tensor
    nothing: None = None

    def __post_init__(self) -> None:
        self.update(loss=self.loss, logits=self.logits)


RETURNS = {
    "dict": lambda y: {"scores": y, "labels": y.argmax(1)},
    "list": lambda y: [y, y.mean()],
    "nested": lambda y: ((y,), [y * 2, {"mean": y.mean()}], None, 3),
    "dataclass": lambda y: Prediction(y, y.argmax(1)),
    "output": lambda y: Output(y.mean(), y),
}


class Mixed(nn.Module):
    """An image, indices of an embedding, a scale and an option; the result in one of many containers."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.stem = pair(nn.Conv2d, nn.BatchNorm2d, 3, 4)
        self.words, self.returns = nn.Embedding(5, 4), returns

    def forward(self, image: Tensor, tokens: Tensor, scale: Tensor | None = None, *, flip: bool = False) -> Any:
        y = self.stem(image.flip(3) if flip else image).mean((2, 3)) + self.words(tokens).mean(1)
        return RETURNS[self.returns](y if scale is None else y * scale)


def mixed() -> nn.Module:
    return Mixed("dict")


def mixed_output(name: str) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]:
    torch.manual_seed(0)
    return (
        Mixed(name),
        (torch.randn(2, 3, 8, 8), torch.tensor([[1, 4, 3], [0, 2, 2]])),
        {"scale": torch.rand(4), "flip": True},
    )


def returns_dict() -> Any:
    return mixed_output("dict")


def returns_list() -> Any:
    return mixed_output("list")


def returns_nested() -> Any:
    return mixed_output("nested")


def returns_dataclass() -> Any:
    return mixed_output("dataclass")


def returns_output() -> Any:
    return mixed_output("output")


class Detector(nn.Module):
    """A list of images of several sizes, as torchvision's detectors take them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = pair(nn.Conv2d, nn.BatchNorm2d, 3, 4)

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return [self.stem(image[None]) for image in images]


def nested_inputs() -> tuple[nn.Module, list[Any]]:
    return Detector(), [[torch.randn(3, 8, 8), torch.randn(3, 6, 10)]]


def only_indices() -> tuple[nn.Module, tuple[Tensor]]:
    """A model without a floating-point input."""
    model = nn.Sequential(nn.Embedding(5, 6), nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6))
    return model, (torch.tensor([[1, 4, 3, 0]]),)


def no_arguments() -> Any:
    return mixed(), "image"
