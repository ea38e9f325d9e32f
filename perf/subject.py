"""A case as it is run: in one mode, dtype, layout and batch, on one device; and what one step of it is."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from triton_convbn.errors import UsageError

from .cases import Case
from .table import Key

MODES = {
    "infer": "forward, without gradients",
    "train": "forward and backward; every parameter trains, the affine ones too; statistics are frozen",
    "train-frozen": "the same with frozen affine parameters",
    "input-grad": "forward and backward to the input alone, as an adversarial attack does",
}

# The dtype of the parameters, and that of autocast.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "float64": (torch.float64, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast_float16": (torch.float32, torch.float16),
    "autocast_bfloat16": (torch.float32, torch.bfloat16),
}

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Setting(NamedTuple):
    """mode: of MODES. dtype: of DTYPES. layout: of LAYOUTS, of the input and the weights."""

    mode: str
    dtype: str
    layout: str
    batch: int


@dataclass(frozen=True)
class Subject:
    """A model and its input, both of which the steps share: gradients lie on them after a step."""

    key: Key
    model: nn.Module
    x: Tensor
    autocast: torch.dtype | None

    @property
    def trains(self) -> bool:
        return self.key.mode != "infer"

    def forward(self, way: Callable[[Tensor], Tensor]) -> Tensor:
        on = self.autocast is not None
        with torch.autocast(self.x.device.type, self.autocast or torch.bfloat16, enabled=on):
            return way(self.x)

    def step(self, way: Callable[[Tensor], Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
        """The output, under "", and every gradient by the name of its parameter, the input's as "input".

        model: whose parameters `way` runs with, where these are not the subject's own. The loss weighs the outputs
        differently, and not so that the weights cancel: the gradient of a last bias is their sum. No optimizer.
        """
        model = model or self.model
        model.zero_grad(set_to_none=True)
        self.x.grad = None
        with torch.set_grad_enabled(self.trains):
            output = self.forward(way)
            if self.trains:
                wide = torch.promote_types(output.dtype, torch.float32)
                drop_unprofitable = torch.linspace(-1, 2, output.shape[-1], dtype=wide, device=output.device)
                (output.to(wide) * drop_unprofitable).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if self.x.grad is not None:
            found["input"] = self.x.grad
        return {"": output.detach(), **found}

    def exact(self) -> dict[str, Tensor]:
        """What a step gives in fp64, in eager, with the very same parameters. On the CPU."""
        x = self.x.detach().double().requires_grad_(self.x.requires_grad)
        double = Subject(self.key, copy.deepcopy(self.model).double(), x, None)
        return {name: tensor.cpu() for name, tensor in double.step(double.model).items()}

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.x.grad = None


def subject(case: Case, setting: Setting, device: torch.device) -> Subject:
    """The case in that setting. The seed is fixed.

    Raises: UsageError, where the model does not run on its input, or does not return what can be compared.
    """
    torch.manual_seed(0)
    model = case.build()
    x = torch.randn(setting.batch, *case.shape)
    _try(case.name, model, x)
    dtype, autocast = DTYPES[setting.dtype]
    layout = LAYOUTS[setting.layout]
    model = model.to(device, dtype).to(memory_format=layout)
    x = x.to(device, dtype, memory_format=layout if x.ndim == 4 else torch.contiguous_format)
    _freeze(model, setting.mode)
    x.requires_grad_(setting.mode == "input-grad" or (setting.mode != "infer" and case.inner))
    return Subject(Key(case.name, "", *setting), model, x, autocast)


def _freeze(model: nn.Module, mode: str) -> None:
    if mode == "input-grad":
        model.requires_grad_(False)
    elif mode == "train-frozen":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)


def _try(name: str, model: nn.Module, x: Tensor) -> None:
    """One line instead of a traceback for a model that is not what a benchmark can run."""
    try:
        with torch.no_grad():
            output = model(x)
    except Exception as error:
        raise UsageError(f"{name} does not run on an input of shape {tuple(x.shape)}: {error}") from error
    if not isinstance(output, Tensor):
        raise UsageError(f"{name} returns {type(output).__name__}; what is compared is a single tensor")
    if not output.is_floating_point() or not output.ndim:
        raise UsageError(
            f"{name} returns a {output.dtype} tensor of shape {tuple(output.shape)}; no loss is made of that"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(f"{name} has nothing to train: no parameter of it requires a gradient")
