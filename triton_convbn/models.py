"""Load models by name: torchvision's, timm's, or what ``package.module:callable`` returns. Weights are random.

A callable may return the inputs of its model as well: ``(model, args)`` or ``(model, args, kwargs)``.
"""

import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import UsageError, pip_install
from .example_inputs import Inputs, of_shapes

DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "float64": (torch.float64, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast_float16": (torch.float32, torch.float16),
    "autocast_bfloat16": (torch.float32, torch.bfloat16),
}
"""The dtype of parameters and input and that of autocast, by the name of a command's --dtype."""


def load(name: str) -> nn.Module:
    """Return the model of that name, in eval mode, with random weights.

    Raises:
        UsageError: If there is no model of that name, or it cannot be imported or made.
    """
    return _load(name)[0]


def load_with_inputs(
    name: str,
    shapes: Sequence[str] | None = None,
    *,
    batch: int | None = None,
    size: int | None = None,
) -> tuple[nn.Module, Inputs]:
    """Return the model of that name, see `load`, and its inputs.

    The inputs have the given shapes, see `example_inputs.of_shapes`. Without shapes they are those that the callable
    returns with the model, or else a batch of images.

    Args:
        batch, size: The number of images, and their height and width; by default 1, and the model's own.

    Raises:
        UsageError: If there is no such model, or batch or size are given where the inputs are no images.
    """
    model, own = _load(name)
    given = of_shapes(shapes) if shapes else own
    if given is None:
        return model, Inputs((example_input(model, batch or 1, size),), images=True)
    if batch is not None or size is not None:
        surplus = " and ".join(option for option, value in (("--batch", batch), ("--size", size)) if value is not None)
        raise UsageError(f"{'--shape' if shapes else name} gives the inputs: leave out {surplus}")
    return model, given


def _load(name: str) -> tuple[nn.Module, Inputs | None]:
    """Return the model, and the inputs if the callable returns some."""
    if ":" in name:
        model, inputs = _from_callable(name)
        return model.eval(), inputs
    torchvision, timm = _optional("torchvision"), _optional("timm")
    if torchvision is None and timm is None:
        raise UsageError(f"models by name need torchvision or timm: {pip_install('models')}")
    known: list[str] = []
    if torchvision is not None:
        known += torchvision.models.list_models()
        if name in known:
            return _from_torchvision(torchvision, name).eval(), None
    if timm is not None:
        known += timm.list_models()
        if timm.is_model(name):
            return timm.create_model(name, pretrained=False).eval(), None
    close = difflib.get_close_matches(name, set(known), 3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise UsageError(f"no model {name!r} in torchvision or timm{hint} (package.module:callable works too)")


def example_input(model: nn.Module, batch: int = 1, size: int | None = None) -> Tensor:
    """Return a random image batch of the model's own size, or ``(batch, 3, 224, 224)``."""
    config = getattr(model, "default_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    if type(model).__name__ == "Inception3":
        height = width = 299
    return torch.randn(batch, channels, size or height, size or width)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set affine parameters and statistics of every BatchNorm to random values, in place. Return the model.

    With fresh ones (mean 0, variance 1, weight 1) a wrong fold looks right. A frozen BatchNorm is any module with a
    tensor `running_var`.
    """
    generator = torch.Generator().manual_seed(seed)
    module: Any
    for module in model.modules():
        if not isinstance(module, _BatchNorm) and not isinstance(getattr(module, "running_var", None), Tensor):
            continue
        with torch.no_grad():
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
            if module.weight is not None:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    return model


def _optional(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise UsageError(f"{package} does not import here: {error}") from error
        return None
    except (ImportError, RuntimeError) as error:  # such as a torchvision for another torch
        raise UsageError(f"{package} does not import here: {error}") from error


def _from_torchvision(torchvision: Any, name: str) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    wanted: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if name in ("googlenet", "inception_v3"):
        wanted["init_weights"] = False  # their truncated normals take a minute
    accepted = inspect.signature(builder).parameters
    arguments = {key: value for key, value in wanted.items() if key in accepted}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the default of init_weights will change
        model: nn.Module = torchvision.models.get_model(name, **arguments)
    return model


def _from_callable(name: str) -> tuple[nn.Module, Inputs | None]:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    if not module_name or not attribute or module_name.startswith("."):
        raise UsageError(f"{name!r} is not of the form package.module:callable")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(f"cannot import {module_name!r}: {error}") from error
    except Exception as error:  # the module may raise anything when it is imported
        raise UsageError(f"importing {module_name!r} raised {type(error).__name__}: {error}") from error
    made = getattr(module, attribute, None)
    if made is None:
        raise UsageError(f"{module_name!r} has no {attribute!r}")
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise UsageError(f"{name!r} is of type {type(made).__name__}, which cannot be called")
        try:
            made = made()
        except Exception as error:
            raise UsageError(f"{name}() raised {type(error).__name__}: {error}") from error
    match made:
        case nn.Module():
            return made, None
        case (nn.Module() as model, tuple() | list() as args):
            return model, Inputs(tuple(args))
        case (nn.Module() as model, tuple() | list() as args, Mapping() as kwargs):
            return model, Inputs(tuple(args), dict(kwargs))
    raise UsageError(
        f"{name!r} returned {type(made).__name__}, not a torch.nn.Module, (model, args) or (model, args, kwargs)"
    )
