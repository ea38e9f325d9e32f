"""List what is measured: whole models by name, and layers as networks have them. Weights and statistics are random."""

import copy
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_convbn.errors import UsageError, pip_install
from triton_convbn.example_inputs import Inputs, bind, of_shapes
from triton_convbn.explanation import explain
from triton_convbn.models import example_input, load, load_with_inputs, randomize


class Setting(NamedTuple):
    """The mode, dtype, layout and batch size of a run: names of `models.DTYPES` and `subject.LAYOUTS`.

    Modes: "infer" is forward without gradients; "train" is forward and backward for every parameter, with frozen
    statistics; "train-frozen" freezes the affine parameters too; "input-grad" is backward to the input alone, as in an
    adversarial attack.
    """

    mode: str
    dtype: str
    layout: str
    batch: int


@dataclass(frozen=True)
class Case:
    """A model that is measured.

    Attributes:
        build: Returns a new model: in eval mode, fp32, on the CPU.
        shape: The shape of one example.
        inner: True for a piece of a network, whose input needs a gradient in training.
        x: The input, if the model does not take random numbers of any batch size.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    inner: bool = False
    x: Tensor | None = None

    def own_batch(self, setting: Setting) -> Setting:
        """Return the setting with the batch size that the input has."""
        return setting if self.x is None or not self.x.ndim else setting._replace(batch=len(self.x))


APPLICATIONS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("applications.json").read_text())
"""Small models of other packages, by name: a callable, "package.module:callable", its arguments, and the shapes of the
inputs as of --shape."""


def application(name: str) -> tuple[nn.Module, Inputs]:
    """Return a model of `APPLICATIONS` in eval mode, and its inputs. Raises: UsageError if its package is missing."""
    torch.manual_seed(0)
    module, _, attribute = APPLICATIONS[name]["call"].partition(":")
    arguments = APPLICATIONS[name].get("arguments", {})
    try:
        if "model_type" in arguments:  # transformers makes a model from a configuration
            arguments = {"config": importlib.import_module("transformers").AutoConfig.for_model(**arguments)}
        made = attrgetter(attribute)(importlib.import_module(module))(**arguments)
    except ModuleNotFoundError as error:
        raise UsageError(f"{name} is not here: {error}; {pip_install('applications')}") from error
    return made.eval(), of_shapes(APPLICATIONS[name]["shapes"])


def whole(name: str, size: int | None = None, shapes: Sequence[str] | None = None, batch: int | None = None) -> Case:
    """Return a model by name, with inputs as `models.load_with_inputs` makes them, or one of `APPLICATIONS`.

    The name of the case tells inputs apart that give other figures. It is `name@size` at another size than the model's
    own, and `name@2x3x8x8+2x9:int64` with inputs of these shapes.

    Raises:
        UsageError: If there is no such model, or it has inputs of its own where size or batch are given.
    """
    if name not in APPLICATIONS:
        model, inputs = load_with_inputs(name, shapes, size=size, batch=batch)
    elif size or shapes or batch:
        raise UsageError(f"{name} has inputs of its own: leave out --size, --shape and --batch")
    else:
        model, inputs = application(name)
    bound, x = bind(randomize(model), inputs)
    if shapes:
        name += f"@{'+'.join(shapes).replace(',', 'x')}"
    elif size and x.shape[1:] != example_input(model).shape[1:]:
        name += f"@{size}"
    case = Case(name, lambda: copy.deepcopy(bound), tuple(x.shape[1:]))
    return case if inputs.images else replace(case, x=x)


def of_model(model_name: str, size: int | None = None) -> list[Case]:
    """Return every convolution with its BatchNorm and a ReLU, as the model has them.

    Layers of the same shape are one case, named after the first.
    """
    model = randomize(load(model_name))
    x = example_input(model, 1, size)
    modules = dict(model.named_modules())
    shapes: dict[str, tuple[int, ...]] = {}

    def remember(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes.setdefault(name, tuple(inputs[0].shape[1:]))

    rows = [row for row in explain(model, x).rows if row.conv]
    hooks = [modules[row.conv].register_forward_pre_hook(partial(remember, row.conv)) for row in rows]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    found: dict[tuple[str, tuple[int, ...]], Case] = {}
    for row in rows:
        conv, shape = modules[row.conv], shapes[row.conv]
        block = nn.Sequential(conv, modules[row.batch_norm], nn.ReLU()).eval()
        case = Case(f"{model_name}/{row.conv}", partial(copy.deepcopy, block), shape, True)
        found.setdefault((repr(conv), shape), case)
    return list(found.values())


def _block(name: str, modules: Callable[[], list[nn.Module]], shape: tuple[int, ...]) -> Case:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomize(nn.Sequential(*modules())).eval()

    return Case(name, build, shape, inner=True)


def _resnext() -> list[nn.Module]:
    """Return the block of ResNeXt-50 32x4d's second stage (arXiv 1611.05431), without its shortcut."""
    return [
        nn.Conv2d(256, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
    ]  # fmt: skip


def _decoder() -> list[nn.Module]:
    """Return three transposed convolutions that double the resolution, as in pose estimation (arXiv 1804.06208)."""
    made: list[nn.Module] = []
    for inputs, outputs in pairwise((512, 256, 128, 64)):
        made += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return made


def _head(hidden: int, outputs: int) -> list[nn.Module]:
    """Return a projection head of self-supervised learning."""
    first = nn.Linear(2048, hidden), nn.BatchNorm1d(hidden), nn.ReLU()
    return [*first, nn.Linear(hidden, outputs), nn.BatchNorm1d(outputs)]


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    name: getattr(nn, name)
    for name in (
        *("ReLU", "Sigmoid", "Tanh", "LeakyReLU", "ReLU6", "Hardtanh", "Hardsigmoid", "RReLU", "SiLU", "GELU"),
        *("Hardswish", "PReLU", "ELU", "CELU", "SELU", "Mish", "Softplus", "Softsign", "Softshrink", "Hardshrink"),
        *("Tanhshrink", "LogSigmoid"),
    )
} | {"Threshold": partial(nn.Threshold, 0.1, 0.0)}
"""The activations of `torch.nn` that take one tensor of any shape and return one like it."""


def _six(activation: str) -> list[nn.Module]:
    """Return six layers of 64 channels with the same activation."""
    conv, bn = partial(nn.Conv2d, 64, 64, 3, padding=1, bias=False), partial(nn.BatchNorm2d, 64)
    return [make() for _ in range(6) for make in (conv, bn, ACTIVATIONS[activation])]


def _rt_detr() -> Case:
    """Return RT-DETR's hybrid encoder (arXiv 2304.08069), made from transformers' configuration, for 128 x 128 images.

    Raises:
        UsageError: If transformers is not installed.
    """
    try:
        from transformers import RTDetrConfig
        from transformers.models.rt_detr.modeling_rt_detr import RTDetrHybridEncoder
    except ImportError as error:
        raise UsageError(f"the layers rt_detr need transformers: pip install transformers ({error})") from error
    config = RTDetrConfig()
    strides = config.feat_strides

    class Encoder(nn.Module):
        """The encoder as a function of its largest input. Average pooling makes the others."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = RTDetrHybridEncoder(config)

        def forward(self, x: Tensor) -> Tensor:
            levels = self.encoder([F.avg_pool2d(x, stride // strides[0]) for stride in strides]).last_hidden_state
            return torch.cat([level.flatten(2) for level in levels], 2)

    side = 128 // strides[0]
    return _block("rt_detr/hybrid_encoder", lambda: [Encoder()], (config.encoder_hidden_dim, side, side))


LAYERS: dict[str, Callable[[], list[Case]]] = {
    "resnet50": lambda: of_model("resnet50"),
    "mobilenet_v2": lambda: of_model("mobilenet_v2"),
    "activations": lambda: [
        _block(f"activations/{name.lower()}", partial(_six, name), (64, 56, 56)) for name in ACTIVATIONS
    ],
    "resnext": lambda: [_block("resnext/block_32x4d", _resnext, (256, 56, 56))],
    "decoder": lambda: [_block("decoder/three_transposed", _decoder, (512, 7, 7))],
    "heads": lambda: [
        _block("heads/simclr", partial(_head, 2048, 128), (2048,)),  # arXiv 2002.05709
        _block("heads/byol", partial(_head, 4096, 256), (2048,)),  # arXiv 2006.07733
    ],
    "rt_detr": lambda: [_rt_detr()],
}
