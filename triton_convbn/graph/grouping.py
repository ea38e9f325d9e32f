"""Which pairs are folded by one launch, and where in the graph.

A kernel folds many pairs as cheaply as one, so pairs whose parameters are all there from the start are folded together,
ahead of the first of them. How many is bounded: by the arguments that a launch can have, forward and backward, and by
the bytes that come alive before they are needed. Pairs whose weight the graph computes are folded where they stand.

Pairs that train and frozen ones are folded apart: autograd takes all that a fold returns for differentiable as soon as
something is, and the convolutions of frozen pairs would keep their inputs. They may alternate: one group of each kind
stays open. A group ends when it is full, or when a parameter of the next pair is written to after the group's fold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..counters import count
from ..dispatch import use_kernel
from ..kernels.inputs import FoldInputs, spec_of, unsupported_reason
from ..kernels.spec import GradSpec, backward_of, plan_groups
from ..options import Options
from .calls import Attribute, Value, may_train, requires_grad, tensor_of
from .match import Pair
from .mutation import Mutations

BYTE_BUDGET = 64 * 2**20
"""Bytes that one launch may write. ResNet-50's 94 MB of fp32 weights take the four launches that 53 pairs need."""


@dataclass(frozen=True)
class Group:
    """Pairs that one fold serves, ahead of the BatchNorm of the first. kernel: whether the operator computes it, or
    plain torch (one pair then)."""

    pairs: tuple[Pair, ...]
    kernel: bool


def group(graph: fx.Graph, pairs: Sequence[Pair], options: Options, anywhere: bool = False) -> list[Group]:
    """Every pair in one group, the groups in the order of their first pairs.

    anywhere: group as if the kernels ran on whatever device the tensors are on.
    Raises: OptionError, where ``kernel="triton"`` insists on what cannot run.
    """
    if not pairs:
        return []
    effects = Mutations(graph)
    groups: list[tuple[list[Pair], bool]] = []
    open_groups: dict[tuple[torch.device, bool, str], tuple[list[Pair], list[GradSpec]]] = {}
    for pair in pairs:
        inputs = kernel_inputs(pair, graph) if anywhere or _use_kernel(pair, graph, options) else None
        members = [pair]
        if inputs is not None and all(map(_is_input, _values(pair))):
            # What the user annotates, a stage of a pipeline say, holds of every node of a fold.
            annotation = repr(pair.bn.node.meta.get("custom"))
            kind, spec = (inputs.weight.device, _trains(pair, graph), annotation), backward_of(spec_of(inputs))
            others, specs = open_groups.get(kind, ([], []))
            if others and _fits([*specs, spec], options) and _readable(pair, others[0], effects):
                others.append(pair)
                specs.append(spec)
                continue
            open_groups[kind] = members, [spec]
        groups.append((members, inputs is not None))
    return [Group(tuple(members), kernel) for members, kernel in groups]


def _values(pair: Pair) -> tuple[Value, ...]:
    return pair.conv.weight, pair.conv.bias, *pair.vectors


def _is_input(value: Value) -> bool:
    return value is None or isinstance(value, Attribute) or value.op in ("placeholder", "get_attr")


def _fits(specs: Sequence[GradSpec], options: Options) -> bool:
    """Return whether one launch folds the pairs, and one more differentiates them."""
    forward = plan_groups([spec.pair for spec in specs], options.group, BYTE_BUDGET)
    return len(forward) == len(plan_groups(specs, options.group)) == 1


def _readable(pair: Pair, first: Pair, effects: Mutations) -> bool:
    """Return whether the pair's parameters can be read where the first one is folded."""
    return effects.obstacle(first.conv.node, pair.bn.node, _values(pair)) is None


def _trains(pair: Pair, graph: fx.Graph) -> bool:
    return any(may_train(value, graph) for value in _values(pair))


def _use_kernel(pair: Pair, graph: fx.Graph, options: Options) -> bool:
    weight = tensor_of(pair.conv.weight, graph)
    return weight is not None and use_kernel(options.kernel, weight.device)


def kernel_inputs(pair: Pair, graph: fx.Graph) -> FoldInputs | None:
    """The pair's (fake) tensors, where the kernel takes them; None, counted, where plain torch has to fold it."""
    tensors = [tensor_of(value, graph) for value in _values(pair)]
    if pair.channels is not None:
        tensors[2:] = [None if vector is None else vector.narrow(0, *pair.channels) for vector in tensors[2:]]
    weight, mean, var = tensors[0], tensors[4], tensors[5]
    if weight is None or mean is None or var is None:
        return None
    layout, prescale = layout_of(pair, graph), needs_prescale(pair, graph)
    eps = 0.0 if isinstance(pair.bn.eps, fx.Node) or pair.bn.eps is None else pair.bn.eps
    static = eps, pair.conv.transposed, pair.conv.groups, pair.dtype, layout, prescale
    inputs = FoldInputs(weight, tensors[1], tensors[2], tensors[3], mean, var, *static)
    reason = _unfit(pair, [tensor for tensor in tensors if tensor is not None], mean, var) or unsupported_reason(inputs)
    if reason is None:
        return inputs
    count(f"decomposed:{reason}")
    return None


def needs_prescale(pair: Pair, graph: fx.Graph) -> bool:
    """Whether the fold is rounded to fp16, whose range is short: see `reference.prescale`."""
    weight = tensor_of(pair.conv.weight, graph)
    return (pair.dtype or (None if weight is None else weight.dtype)) == torch.float16


def layout_of(pair: Pair, graph: fx.Graph) -> torch.memory_format | None:
    """The layout that the convolution wants of its weight; None for the one that the weight has.

    A convolution that returns channels_last turns a contiguous weight around first, a copy that the fold can save it.
    Asked for where the convolution does not return it, channels_last would change the strides of what it returns.
    """
    weight, convolved = tensor_of(pair.conv.weight, graph), tensor_of(pair.conv.node, graph)
    if weight is None or convolved is None or convolved.ndim != weight.ndim:
        return None
    if is_functorch_wrapped_tensor(weight) or is_functorch_wrapped_tensor(convolved):
        return None  # inside a transform a tensor does not say how its whole is laid out
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    if (
        wanted is None
        or not weight.is_contiguous()
        or convolved.is_contiguous()
        or not convolved.is_contiguous(memory_format=wanted)
    ):
        return None
    return wanted


def _unfit(pair: Pair, tensors: Sequence[Tensor], mean: Tensor, var: Tensor) -> str | None:
    if isinstance(pair.bn.eps, fx.Node):
        return "eps is computed"
    if requires_grad(mean) or requires_grad(var):
        return "the statistics require gradients"
    if any(is_traceable_wrapper_subclass(tensor) for tensor in tensors):
        return "tensor subclass"
    if any(is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        return "inside a torch.func transform"
    return None
