"""The inputs that commands run a model on: tensors of given shapes, or whatever its callable returns with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .errors import UsageError, first_line


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a model, which may hold tensors in any pytree.

    Attributes:
        images: True for a batch of random images, which could as well have another size.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    images: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def batch(self) -> int:
        """Return the first size of the first tensor."""
        return next((tensor.shape[0] for tensor in self.tensors if tensor.ndim), 1)

    def to(self, device: str | None = None, dtype: torch.dtype | None = None) -> "Inputs":
        """Return the inputs on another device, and with floating-point tensors in another dtype."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device or tensor.device, dtype if tensor.is_floating_point() else None)

        args, kwargs = tree_map_only(Tensor, moved, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def __str__(self) -> str:
        shapes = [str(tuple(tensor.shape)) for tensor in self.tensors]
        if not shapes:
            return "inputs without tensors"
        return f"an input of shape {shapes[0]}" if len(shapes) == 1 else f"inputs of shapes {', '.join(shapes)}"


def of_shapes(shapes: Sequence[str]) -> Inputs:
    """Return one tensor for each shape, always with the same values.

    Args:
        shapes: The sizes of a tensor, with commas between them, and perhaps a colon and the name of a dtype:
            "1,1,16,16,16" or "2,9:int64". Floating-point tensors are normally distributed. Others are zeros and ones,
            which are indices of most embeddings.

    Raises:
        UsageError: If a shape is written in another way.
    """
    generator = torch.Generator().manual_seed(0)
    return Inputs(tuple(_tensor(shape, generator) for shape in shapes))


def check(name: str, model: nn.Module, inputs: Inputs) -> Any:
    """Return what the model returns for the inputs, without gradients.

    Raises:
        UsageError: If the model raises an error, which eager mode explains in fewer words than Dynamo.
    """
    try:
        with torch.no_grad():
            return model(*inputs.args, **inputs.kwargs)
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(
            f"{name} does not run on {inputs}: {why}; give inputs that it accepts by --shape, or by a callable that "
            "returns (model, args) or (model, args, kwargs)"
        ) from error


def check_bound(name: str, model: nn.Module, x: Tensor) -> Any:
    """Return what `check` returns, for a model and an input that `bind` has returned."""
    if isinstance(model, BoundModel):
        return check(name, model.model, Inputs(*model.arguments(x)))
    return check(name, model, Inputs((x,)))


def bind(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Tensor]:
    """Return the model as a function of one tensor, and the tensor: the first that is floating-point, or the first.

    A model with one input is returned as it is.

    Raises:
        UsageError: If no input is a tensor.
    """
    tensors = inputs.tensors
    if not tensors:
        raise UsageError("no input of the model is a tensor")
    x = next(filter(Tensor.is_floating_point, tensors), tensors[0])
    alone = len(inputs.args) == 1 and inputs.args[0] is x and not inputs.kwargs
    return model if alone else BoundModel(model, inputs, x), x


class BoundModel(nn.Module):
    """A model as a function of one of its inputs. The other tensors are buffers, which move and copy with the model."""

    def __init__(self, model: nn.Module, inputs: Inputs, x: Tensor) -> None:
        super().__init__()
        self.model = model
        leaves, self.structure = tree_flatten((inputs.args, inputs.kwargs))
        self.positions = [index for index, leaf in enumerate(leaves) if leaf is x]
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf is not x:
                self.register_buffer(f"input_{index}", leaf.detach())
        self.train(model.training)

    def arguments(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and the keyword arguments of the model."""
        leaves = [getattr(self, f"input_{index}", constant) for index, constant in enumerate(self.constants)]
        for position in self.positions:
            leaves[position] = x
        return tree_unflatten(leaves, self.structure)

    def forward(self, x: Tensor) -> Any:
        """Return what the model returns for x and the other inputs."""
        args, kwargs = self.arguments(x)
        return self.model(*args, **kwargs)


def tensors_of(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in what a model returns, in order: in any pytree, mapping or dataclass."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found += [leaf] if leaf.is_floating_point() else []
        elif isinstance(leaf, Mapping):
            found += tensors_of(list(leaf.values()))
        elif is_dataclass(leaf):
            found += tensors_of([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def _tensor(text: str, generator: torch.Generator) -> Tensor:
    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    shape = [int(size) for size in sizes.split(",") if size.strip().isdecimal()]
    if not isinstance(dtype, torch.dtype) or len(shape) != len(sizes.split(",")):
        raise UsageError(f"--shape {text}: write sizes, and perhaps a dtype, as in 1,3,224,224 or 2,9:int64")
    try:
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    except RuntimeError as error:  # more memory than there is, or a dtype of quantized tensors
        raise UsageError(f"--shape {text}: {first_line(error)}") from error
