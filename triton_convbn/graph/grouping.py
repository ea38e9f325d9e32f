"""Decide which pairs one call of the fold operator serves, and where in the graph it is.

A kernel folds many pairs as cheaply as one, so pairs whose parameters are inputs of the graph are folded together,
before the first of them. Two limits apply to a group: the number of kernel arguments, forward and backward, and the
bytes that are allocated before they are needed. A pair whose weight is computed in the graph is folded where it is.

Trained and frozen pairs are in different groups. Autograd treats all outputs of an operator as differentiable if one of
them is, so the convolutions of frozen pairs would save their inputs. The two kinds may alternate: one group of each
kind is open at a time. A group ends if it is full, or if a parameter of the next pair is written to after the group's
fold.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor

from ..counters import count
from ..dispatch import use_kernel
from ..kernels.config import plan_groups
from ..kernels.inputs import FoldInputs, Unsupported, spec_of
from ..kernels.spec import GradSpec, PairSpec, backward_of
from ..ops import reference
from ..options import Options
from .calls import BatchNormCall, Value, is_input, may_train, requires_grad, tells_training, tensor_of
from .findings import Pair
from .mutation import Mutations

BYTE_BUDGET = 64 * 2**20
"""Bytes that one launch may write. ResNet-50's 94 MB of fp32 weights take four launches, as many as 53 pairs need."""


@dataclass(frozen=True)
class Group:
    """Pairs that are folded together, before the BatchNorm of the first.

    Attributes:
        pairs: The pairs.
        inputs: The example tensors of each pair if kernels fold them. Empty: plain torch folds the only pair.
    """

    pairs: tuple[Pair, ...]
    inputs: tuple[FoldInputs, ...]

    @property
    def kernel(self) -> bool:
        """Return whether the operator folds the pairs. If not, plain torch does."""
        return bool(self.inputs)


def group(
    graph: fx.Graph,
    pairs: Sequence[Pair],
    options: Options,
    anywhere: bool = False,
    mutations: Mutations | None = None,
) -> list[Group]:
    """Return groups that cover all pairs, ordered by their first pairs.

    Args:
        graph: The graph of the pairs.
        pairs: The pairs, in the graph's order.
        options: `kernel` and `pairs_per_launch` apply.
        anywhere: Assume that kernels run on every device.
        mutations: The effects of the graph if they are known, see `Findings`.

    Raises:
        OptionError: ``kernel="triton"``, and no kernel can run.
    """
    groups: list[_OpenGroup] = []
    open_groups: dict[tuple[torch.device, bool, str], _OpenGroup] = {}
    for pair in pairs:
        found = _kernel_spec(pair, graph) if anywhere or _use_kernel(pair, graph, options) else None
        if found is None:
            groups.append(_OpenGroup([pair], [], []))
            continue
        inputs, spec = found[0], backward_of(found[1])
        new = _OpenGroup([pair], [inputs], [spec])
        if all(map(is_input, pair.parameters)):
            # An annotation, such as the stage of a pipeline, applies to every node of a fold.
            annotation = repr(pair.bn.node.meta.get("custom"))
            kind = inputs.weight.device, _trains(pair, graph), annotation
            last = open_groups.get(kind)
            mutations = mutations or Mutations(graph)
            # If a frozen pair were folded with one that trains, autograd would save what reads it, and a write in the
            # graph would then raise an error. Graphs of make_fx do not say what trains.
            if mutations.effects and not all(map(tells_training, pair.parameters)):
                last = None
            if last and _fits([*last.specs, spec], options) and _readable(pair, last.pairs[0], mutations):
                last.pairs.append(pair)
                last.inputs.append(inputs)
                last.specs.append(spec)
                continue
            open_groups[kind] = new
        groups.append(new)
    return [Group(tuple(each.pairs), tuple(each.inputs)) for each in groups]


class _OpenGroup(NamedTuple):
    """A group that may grow."""

    pairs: list[Pair]
    inputs: list[FoldInputs]
    specs: list[GradSpec]


def _fits(specs: Sequence[GradSpec], options: Options) -> bool:
    """Return whether one launch folds the pairs, and one more differentiates them."""
    forward = plan_groups([spec.pair for spec in specs], options.pairs_per_launch, BYTE_BUDGET)
    return len(forward) == len(plan_groups(specs, options.pairs_per_launch)) == 1


def _readable(pair: Pair, first: Pair, mutations: Mutations) -> bool:
    """Return whether the pair's parameters can be read where the first one is folded."""
    return mutations.obstacle(first.conv.node, pair.bn.node, pair.parameters) is None


def _trains(pair: Pair, graph: fx.Graph) -> bool:
    return any(may_train(value, graph) for value in pair.parameters)


def _use_kernel(pair: Pair, graph: fx.Graph, options: Options) -> bool:
    weight = tensor_of(pair.conv.weight, graph)
    return weight is not None and use_kernel(options.kernel, weight.device)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call one of the functions of `fold_inputs` on example tensors, of which only the facts count."""
    if function is not reference.compose:
        return function(*arguments)
    mean = arguments[4]  # the vectors of two BatchNorms may be fake tensors of two modes, which do not mix
    vector = mean.new_empty(mean.shape, dtype=reference.arithmetic(arguments[:6]))
    return vector, vector


def fold_inputs(
    pair: Pair, graph: fx.Graph, read: Callable[[Value], Any], call: Callable[..., Any] = _call
) -> FoldInputs:
    """Return what the fold of a pair reads, with tensors or nodes as `read` returns them.

    `call` calls a function of these: `torch.narrow` slices the vectors of a BatchNorm that follows several
    convolutions, and `reference.compose` makes several BatchNorms one.
    """
    conv = pair.conv

    def vectors_of(bn: BatchNormCall, channels: tuple[int, int] | None) -> list[Any]:
        vectors = map(read, bn.vectors)
        return [v if v is None or channels is None else call(torch.narrow, v, 0, *channels) for v in vectors]

    first, *others = [*pair.inner, (pair.bn, pair.channels)]
    vectors, eps = vectors_of(*first), first[0].eps
    for bn, channels in others:
        composed = call(reference.compose, *vectors[:2], *vectors_of(bn, channels), bn.eps)
        vectors[:2] = call(operator.getitem, composed, 0), call(operator.getitem, composed, 1)
    static: Any = eps, conv.transposed, conv.groups, pair.dtype, _layout_of(pair, graph), needs_prescale(pair, graph)
    return FoldInputs(read(conv.weight), read(conv.bias), *vectors, *static)


def _kernel_spec(pair: Pair, graph: fx.Graph) -> tuple[FoldInputs, PairSpec] | None:
    """Return the pair's example tensors and spec, or None, with the reason counted, if no kernel can fold it."""
    tensors = [tensor for value in pair.parameters if (tensor := tensor_of(value, graph)) is not None]
    if any(map(is_functorch_wrapped_tensor, tensors)):  # no operation on it is allowed outside its transform
        count("decomposed:inside a torch.func transform")
        return None
    if any(isinstance(bn.eps, fx.Node) for bn in pair.norms):
        count("decomposed:eps is computed")
        return None
    statistics = [value for bn in pair.norms for value in (bn.running_mean, bn.running_var)]
    if any(tensor_of(value, graph) is None for value in (pair.conv.weight, *statistics)):
        return None
    inputs = fold_inputs(pair, graph, lambda value: tensor_of(value, graph))
    try:
        _check(inputs)
        return inputs, spec_of(inputs)
    except Unsupported as error:
        count(f"decomposed:{error}")
        return None


def needs_prescale(pair: Pair, graph: fx.Graph) -> bool:
    """Return whether the folded weight is fp16, which has a short range. See `fp16_range.prescale`."""
    weight = tensor_of(pair.conv.weight, graph)
    return (pair.dtype or (None if weight is None else weight.dtype)) == torch.float16


def _layout_of(pair: Pair, graph: fx.Graph) -> torch.memory_format | None:
    """Return the layout that the convolution needs of its weight, or None for the weight's own.

    A convolution with a channels_last output first copies a contiguous weight to channels_last. The fold can save that
    copy. For other convolutions a channels_last weight would change the strides of the output.
    """
    weight, convolved = tensor_of(pair.conv.weight, graph), tensor_of(pair.conv.node, graph)
    if weight is None or convolved is None or convolved.ndim != weight.ndim:
        return None
    if any(map(is_functorch_wrapped_tensor, (weight, convolved))):
        return None  # a wrapped tensor has no layout
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    if (
        wanted is None
        or not weight.is_contiguous()
        or convolved.is_contiguous()
        or not convolved.is_contiguous(memory_format=wanted)
    ):
        return None
    return wanted


def _check(inputs: FoldInputs) -> None:
    """Raise Unsupported for what only plain torch handles in a graph."""
    if requires_grad(inputs.running_mean) or requires_grad(inputs.running_var):
        raise Unsupported("the statistics require gradients")
