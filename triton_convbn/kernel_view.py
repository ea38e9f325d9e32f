"""List the kernels that the pass would launch for a model, as text and as facts, on any machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .capture import Namer, captured
from .errors import UsageError
from .example_inputs import Inputs
from .graph.branches import merge_sums
from .graph.grouping import group
from .graph.match import find
from .kernels.codegen import generate_fold, generate_fold_backward
from .kernels.inputs import FoldInputs, grad_spec_of, spec_of
from .kernels.kernel_source import KernelSource
from .kernels.spec import GradSpec, Needs, PairSpec
from .options import Options


@dataclass(frozen=True)
class View:
    """One launch: its direction, the names of its BatchNorms, their specs, its source."""

    direction: str
    pairs: tuple[str, ...]
    specs: tuple[PairSpec, ...] | tuple[GradSpec, ...]
    source: KernelSource


def kernels_of(
    model: nn.Module, inputs: Sequence[Any], options: Options, keywords: Mapping[str, Any] | None = None
) -> list[View]:
    """Return every fold that would be launched on a device that runs kernels: forward launches, then backward launches.

    Backward is that of a training step in which every parameter trains, with gradients in the layout of the weights. If
    backward computes the folded weights again, it does so by forward's kernel without the biases, which is not listed.
    Resets Dynamo, as `explain` does.

    Args:
        inputs, keywords: The arguments of the model's forward.
    """
    views: list[View] = []

    def visit(gm: fx.GraphModule) -> Callable[[Namer], None]:
        pairs = merge_sums(find(gm.graph), gm.graph).pairs
        groups = [each for each in group(gm.graph, pairs, options, anywhere=True) if each.kernel]

        def report(name: Namer) -> None:
            for each in groups:
                names = tuple(name(pair.bn.node) for pair in each.pairs)
                forward = tuple(map(spec_of, each.inputs))
                views.append(View("forward", names, forward, generate_fold(forward)))
                backward = tuple(grad_spec_of(pair, *_gradients(pair), Needs()) for pair in each.inputs)
                views.append(View("backward", names, backward, generate_fold_backward(backward)))

        return report

    with torch.no_grad():
        captured(model, inputs, keywords or {}, visit)
    return sorted(views, key=lambda view: view.direction, reverse=True)


def kernels_of_named(name: str, model: nn.Module, inputs: Inputs, options: Options) -> list[View]:
    """Return what `kernels_of` does, for a model of the command line.

    Raises:
        UsageError: If nothing folds.
    """
    views = kernels_of(model, inputs.args, options, inputs.kwargs)
    if not views:
        raise UsageError(f"nothing folds in {name!r}; triton-convbn explain says why")
    return views


def _gradients(pair: FoldInputs) -> tuple[Tensor, Tensor]:
    """Return dW' and db' as the convolution's backward gives them, without values."""
    dtype = pair.out_dtype or pair.weight.dtype
    return torch.empty_like(pair.weight, dtype=dtype), torch.empty_like(pair.running_mean, dtype=dtype)
