"""Choose what computes a fold: the generated kernels or plain torch.

The choice depends on the type of the device and never initializes a device.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from .options import Kernel, OptionError

# Triton has backends for these, and torch calls AMD's devices "cuda" as well.
_TRITON_DEVICES = ("cuda", "xpu")

_planned: ContextVar[str | None] = ContextVar("planned device type", default=None)


@cache
def has_triton() -> bool:
    """Return whether triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


def is_set(variable: str) -> bool:
    """Return whether an environment variable switches something on."""
    return os.environ.get(variable, "0") not in ("", "0")


def interpreting() -> bool:
    """Return whether Triton interprets its kernels in Python, which also works on CPU tensors."""
    return is_set("TRITON_INTERPRET")


@contextmanager
def planned_for(device_type: str) -> Iterator[None]:
    """Choose inside the block as if all tensors were on a device of this type, for graphs that never run."""
    token = _planned.set(device_type)
    try:
        yield
    finally:
        _planned.reset(token)


def device_type(device: torch.device) -> str:
    """Return the type of the device, or the one that is planned for, see `planned_for`."""
    return _planned.get() or device.type


def kernel_runs(device: torch.device) -> bool:
    """Return whether a generated kernel can run on tensors of that device."""
    kind = device_type(device)
    return (kind in _TRITON_DEVICES or (kind == "cpu" and interpreting())) and has_triton()


def use_kernel(choice: Kernel, device: torch.device) -> bool:
    """Return whether the generated kernels compute folds on that device.

    Raises:
        OptionError: ``kernel="triton"``, and the kernels cannot run there.
    """
    if choice == "torch":
        return False
    runs = kernel_runs(device)
    if choice == "triton" and not runs:
        hint = "set TRITON_INTERPRET=1 to interpret them" if has_triton() else "install triton"
        raise OptionError(f"kernel='triton': Triton kernels do not run on {device.type} tensors here; {hint}")
    return runs


def needs_plain_autograd(*tensors: Tensor | None) -> bool:
    """Return whether torch's own operations have to be called, and not a custom autograd function.

    They have rules for forward mode and for transforms of torch.func. Dynamo traces them into one graph, and
    `torch.jit.trace` into a trace that can be saved. Inside inference mode, a custom function fails where gradients are
    enabled again: it saves tensors, which is not allowed.
    """
    if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled() and torch.is_inference_mode_enabled():
        return True
    return any(tensor is not None and is_functorch_wrapped_tensor(tensor) for tensor in tensors)


_PLAIN = {Tensor, nn.Parameter}


def is_plain(tensor: Tensor) -> bool:
    """Return whether the tensor's class is torch's own. A Buffer is a Tensor."""
    return type(tensor) in _PLAIN


def needs_plain_torch(*tensors: Tensor) -> bool:
    """Return whether torch's own operations have to compute: also under any compiler and for tensor subclasses.

    A subclass need not support writes to views of it, and a graph of make_fx does not say that there is one.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or needs_plain_autograd():
        return True  # without a transform no tensor is wrapped by one
    return not _PLAIN.issuperset(map(type, tensors))
