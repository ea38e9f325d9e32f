"""What is measured: layers as networks have them, and whole models by name. Random weights, random statistics."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from triton_convbn.errors import UsageError
from triton_convbn.explanation import explain
from triton_convbn.models import example_input, load, randomize


@dataclass(frozen=True)
class Case:
    """A model, made anew on every call of `build`: in eval mode, fp32, on the CPU.

    shape: of one example. inner: whether it is a piece of a network, whose input needs a gradient in training.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    inner: bool = False


def whole(name: str, size: int | None = None) -> Case:
    """A model by name; at another size than its own the case is called `name@size`, for its figures are others.

    Raises: UsageError, where there is none of that name.
    """
    model = randomize(load(name))
    shape = tuple(example_input(model, 1, size).shape[1:])
    return Case(at_size(name, model, size), lambda: copy.deepcopy(model), shape)


def at_size(name: str, model: nn.Module, size: int | None) -> str:
    """What the model is called on an input of that height and width."""
    return name if example_input(model, 1, size).shape == example_input(model, 1).shape else f"{name}@{size}"


def layers(name: str) -> list[Case]:
    """The layers of one of `LAYERS`. Raises: UsageError for another name."""
    if name not in LAYERS:
        raise UsageError(f"no such layers: {name}; choose one of {', '.join(LAYERS)}")
    return LAYERS[name]()


def of_model(model_name: str, size: int | None = None) -> list[Case]:
    """Every convolution with its BatchNorm and a ReLU, as the model has them: each shape once, by its first name."""
    model = randomize(load(model_name))
    x = example_input(model, 1, size)
    modules = dict(model.named_modules())
    shapes: dict[str, tuple[int, ...]] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            shapes.setdefault(name, tuple(inputs[0].shape[1:]))

        return hook

    rows = [row for row in explain(model, x).rows if row.conv]
    hooks = [modules[row.conv].register_forward_pre_hook(remember(row.conv)) for row in rows]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    found: dict[tuple[str, tuple[int, ...]], Case] = {}
    for row in rows:
        conv, bn = modules[row.conv], modules[row.batch_norm]
        block = nn.Sequential(conv, bn, nn.ReLU()).eval()
        case = Case(f"{model_name}/{row.conv}", lambda block=block: copy.deepcopy(block), shapes[row.conv], True)  # type: ignore[misc]
        found.setdefault((repr(conv), shapes[row.conv]), case)
    return list(found.values())


def _block(name: str, modules: Callable[[], list[nn.Module]], shape: tuple[int, ...]) -> Case:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomize(nn.Sequential(*modules())).eval()

    return Case(name, build, shape, inner=True)


def _resnext() -> list[Case]:
    """The block of ResNeXt-50 32x4d's second stage (arXiv 1611.05431), without its shortcut."""

    def modules() -> list[nn.Module]:
        return [
            nn.Conv2d(256, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 128, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
        ]  # fmt: skip

    return [_block("resnext/block_32x4d", modules, (256, 56, 56))]


def _decoder() -> list[Case]:
    """Three transposed convolutions that double the resolution, as in simple baselines for poses (arXiv 1804.06208)."""

    def modules() -> list[nn.Module]:
        widths = (512, 256, 128, 64)
        made: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            made += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return made

    return [_block("decoder/three_transposed", modules, (512, 7, 7))]


def _heads() -> list[Case]:
    """Projection heads of self-supervised learning: SimCLR's (arXiv 2002.05709), and BYOL's (arXiv 2006.07733)."""

    def head(hidden: int, outputs: int) -> Callable[[], list[nn.Module]]:
        def modules() -> list[nn.Module]:
            first: list[nn.Module] = [nn.Linear(2048, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
            return [*first, nn.Linear(hidden, outputs), nn.BatchNorm1d(outputs)]

        return modules

    return [_block("heads/simclr", head(2048, 128), (2048,)), _block("heads/byol", head(4096, 256), (2048,))]


LAYERS: dict[str, Callable[[], list[Case]]] = {
    "resnet50": lambda: of_model("resnet50"),
    "mobilenet_v2": lambda: of_model("mobilenet_v2"),
    "resnext": _resnext,
    "decoder": _decoder,
    "heads": _heads,
}
