"""Convolve the output of an activation without saving it: backward computes the activation again from its input.

The gradient of SiLU, GELU and most other activations needs their input, which autograd saves. The convolution after one
saves its output too. Under Inductor the partitioner keeps one of the two (`post_grad.recompute`). In eager mode
`conv_of_activation` does: hooks on what the convolution saves replace the activation's output by its input.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import has_torch_function
from torch.utils._pytree import tree_leaves, tree_map_only

from ..dispatch import is_plain, needs_plain_autograd
from .autograd import conv_with_fold
from .branches_autograd import conv_with_branches, conv_with_scales
from .input_norm_autograd import conv_with_input_norm

_aten = torch.ops.aten


def name_of(function: Any) -> str:
    """Return the name by which a graph calls a function of the two tables below."""
    return str(function) if isinstance(function, OpOverload) else getattr(function, "__name__", "")


def _by_name(*functions: Any) -> dict[str, Callable[..., Any]]:
    return {name_of(function): function for function in functions}


# In place these save a copy of their input.
COPYING = (F.silu, F.mish, F.hardswish, F.hardsigmoid, F.relu6, F.hardtanh)

ACTIVATIONS = _by_name(
    *COPYING,
    *(F.gelu, F.leaky_relu, F.elu, F.selu, F.celu, F.softplus, F.logsigmoid, torch.prelu),
    *(_aten.silu.default, _aten.gelu.default, _aten.mish.default, _aten.hardswish.default, _aten.leaky_relu.default),
    *(_aten.elu.default, _aten.softplus.default, _aten.hardtanh.default, _aten.hardsigmoid.default),
    *(_aten.prelu.default, _aten.relu6.default),
)
"""Activations whose gradient needs their input. ReLU, sigmoid and tanh save their output, as the convolution does."""

CONVOLUTIONS = _by_name(
    *(conv_with_fold, conv_with_input_norm, conv_with_branches, conv_with_scales),
    *(F.linear, torch.convolution),
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.convolution.default),
    _aten.linear.default,
)


class _Recipe(NamedTuple):
    """How to compute an activation's output again.

    Attributes:
        function: The function.
        arguments: Its arguments, positional and by keyword, with a `_Source` for each tensor.
        autocast: The device type, the dtype, and whether autocast is on.
    """

    function: Callable[..., Tensor]
    arguments: Any
    autocast: tuple[str, torch.dtype, bool]


class _Packed(NamedTuple):
    """A tensor, and the number of writes to it so far: torch does not check it where there are hooks."""

    tensor: Tensor
    version: int


def conv_of_activation(
    convolution: str,
    activation: str,
    arguments: Sequence[Any],
    options: Mapping[str, Any],
    activated: Tensor,
    *tensors: Any,
    **keywords: Any,
) -> Tensor:
    """Convolve an activation's output and save the activation's input instead. Differentiable as the convolution is.

    Saves the output, as the convolution by itself does, where hooks are not supported: under torch.func transforms,
    forward-mode AD and compilation, and for tensor subclasses.

    Args:
        convolution: A name of `CONVOLUTIONS`.
        activation: A name of `ACTIVATIONS`.
        arguments, options: What the activation was called with.
        activated: What it returned.
        tensors, keywords: The other arguments of the convolution.

    Returns:
        ``convolution(activated, *tensors, **keywords)``.
    """
    convolve, activate = CONVOLUTIONS[convolution], ACTIVATIONS[activation]
    if not _supports_hooks([each for each in tree_leaves((activated, arguments)) if each is not None]):
        return convolve(activated, *tensors, **keywords)
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)  # `save_on_cpu`, or a checkpoint's
    device = activated.device.type
    autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    recipe: list[_Recipe] = []
    # Hooks live as long as what is saved, so they may not hold the activation's output: it would stay in memory.
    reading = [(_facts(activated), (tuple(arguments), dict(options)))]

    def keep(tensor: Tensor) -> Any:
        return _Packed(tensor, tensor._version) if outer is None else outer[0](tensor)

    def restore(packed: Any) -> Tensor:
        if outer is not None:
            found: Tensor = outer[1](packed)
            return found
        # Compiled autograd traces this. It checks no versions itself.
        if not torch.compiler.is_compiling() and packed.tensor._version != packed.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a tensor of shape {tuple(packed.tensor.shape)} that {activation} or the convolution after it reads "
                f"is at version {packed.tensor._version}; expected version {packed.version} instead"
            )
        return packed.tensor

    def pack(tensor: Tensor) -> Any:
        ((output, given),) = reading
        if not tensor.numel() or _facts(tensor) != output:
            return keep(tensor)
        if not recipe:
            kept = tree_map_only(Tensor, lambda each: _Source(keep(each.detach())), given)
            recipe.append(_Recipe(activate, kept, autocast))
        return recipe[0]

    def unpack(packed: Any) -> Tensor:
        if not isinstance(packed, _Recipe):
            return restore(packed)
        args, kwargs = tree_map_only(_Source, lambda each: restore(each.packed), packed.arguments)
        kind, dtype, enabled = packed.autocast
        with torch.no_grad(), torch.autocast(kind, dtype, enabled, cache_enabled=False):
            return packed.function(*args, **kwargs)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output = convolve(activated, *tensors, **keywords)
    reading.clear()
    return output


class _Source:
    """What `keep` makes of an argument of the activation. A class of its own, which no pytree looks into."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed


def _supports_hooks(values: Sequence[Any]) -> bool:
    """Return whether autograd saves something of these, on which hooks work. The first is the activation's output."""
    activated = values[0]
    tensors = [each for each in values if isinstance(each, Tensor)]
    if has_torch_function(values) or not all(map(is_plain, tensors)):  # an fx.Proxy, or a tensor subclass
        return False
    if torch.compiler.is_compiling() or needs_plain_autograd(*tensors):
        return False
    if not (torch.is_grad_enabled() and activated.requires_grad) or activated.is_meta:
        return False
    return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common only if they are the same elements of the same memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
