"""Check whether the tensors of a fold fit: ranks, channels, dtypes, devices, the range of statistics."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..ops.reference import FLOATING
from .calls import BatchNormCall, ConvCall, Value, is_subclass, may_train, rank_of, requires_grad, tensor_of
from .findings import Pair
from .producers import Producers, channels_of, output_rank
from .reasons import Reason


def rank_obstacle(pair: Pair, dim: int, graph: fx.Graph) -> Reason | None:
    """Return why the BatchNorm does not act on the convolution's channels, or None.

    It acts on dim 1, and the channels are at `dim` of its input. They are at dim 1 of the convolution's output if its
    input is batched, with as many dimensions as the weight. A Linear has them at the last dimension.
    """
    conv, bn = pair.conv, pair.bn
    weight = tensor_of(conv.weight, graph)
    if weight is None:
        return Reason.UNKNOWN_SHAPE
    batched, rank = weight.ndim, output_rank(conv, graph)
    if bn.parts and bn.ranks is not None:  # no check of its own says that it fits what it is given
        normalized = rank if bn.input is conv.node else rank_of(bn.input, graph)
        if rank is not None and normalized is None:
            return Reason.UNKNOWN_SHAPE
        if normalized is not None and normalized not in bn.ranks:
            return Reason.NOT_PER_CHANNEL
    if rank is not None:
        if conv.linear and batched == 2:
            return None if dim == 1 else Reason.LINEAR_RANK if dim == rank - 1 else Reason.CHANNELS_MOVED
        if rank != batched:
            return Reason.LINEAR_RANK if conv.linear else Reason.UNBATCHED
        return None if dim == 1 else Reason.CHANNELS_MOVED
    if dim != 1:
        return Reason.CHANNELS_MOVED
    possible = {2, 3, 4, 5} if conv.linear else {batched - 1, batched}
    if bn.ranks is not None:
        possible &= bn.ranks
    if possible == {batched}:
        return None
    if batched in possible:
        return Reason.UNKNOWN_SHAPE
    return Reason.LINEAR_RANK if conv.linear else Reason.UNBATCHED


def tensors_obstacle(pair: Pair, sources: Producers, graph: fx.Graph) -> Reason | None:
    """Return why the tensors do not fold, or None. sources: All convolutions of the BatchNorm."""
    conv, bn = pair.conv, pair.bn
    weight = tensor_of(conv.weight, graph)
    if weight is None:
        return Reason.UNKNOWN_SHAPE
    values: tuple[Value, ...] = (conv.bias, *bn.vectors)
    vectors = [tensor_of(value, graph) for value in values if value is not None]
    if any(vector is None for vector in vectors):
        return Reason.UNKNOWN_SHAPE
    known: list[Tensor] = [weight, *(vector for vector in vectors if vector is not None)]
    activations = [tensor_of(node, graph) for node in (conv.input, conv.node, bn.output)]
    if any(is_subclass(tensor) for tensor in (*known, *activations) if tensor is not None):
        return Reason.TENSOR_SUBCLASS
    channels = channels_of(conv, weight)
    normalized_channels = channels if pair.channels is None else sources.length
    wanted = [channels] * (conv.bias is not None) + [normalized_channels] * len(known)
    if any(tuple(vector.shape) != (length,) for vector, length in zip(known[1:], wanted, strict=False)):
        return Reason.CHANNELS
    convolved, normalized = tensor_of(conv.node, graph), tensor_of(bn.output, graph)
    outputs = [tensor for tensor in (convolved, normalized) if tensor is not None]
    if any(tensor.dtype not in FLOATING for tensor in known + outputs):
        return Reason.DTYPE
    if len(outputs) == 2 and outputs[0].dtype != outputs[1].dtype:
        return Reason.DTYPE  # the convolution cannot return what the BatchNorm would
    returned = weight.dtype if convolved is None else convolved.dtype
    if example_misleads(weight, convolved, known) or changes_dtype(bn, returned):
        return Reason.DTYPE
    if len({tensor.device for tensor in known + outputs}) > 1:
        return Reason.DEVICE
    return None


def changes_dtype(bn: BatchNormCall, dtype: torch.dtype) -> bool:
    """Return whether a BatchNorm of a tensor of this dtype returns another, or rounds its vectors more coarsely.

    No fold repeats that.
    """
    promotes = bn.promotes is not None and torch.promote_types(dtype, bn.promotes) != dtype
    return promotes or any(torch.promote_types(dtype, rounded) != rounded for rounded in bn.computed)


def example_misleads(weight: Tensor, convolved: Tensor | None, known: Sequence[Tensor]) -> bool:
    """Return whether the folded convolution has another dtype in a run than the example of its output.

    No call returns a wider dtype than that of its weight, as autocast only narrows. Graphs of make_fx have such
    examples: autocast does not reach fakes. Nor does it reach what a `vmap` batches, and with one such tensor among
    those that the fold reads (`known`) the folded weight is batched (torch 2.14).
    """
    if convolved is None or convolved.dtype == weight.dtype:
        return False
    if any(map(is_functorch_wrapped_tensor, (convolved, *known))):
        return True
    return torch.promote_types(weight.dtype, convolved.dtype) == convolved.dtype


def kept(pair: Pair, graph: fx.Graph) -> tuple[Value, ...]:
    """Return what a fold saves for its backward, if it has one.

    A write to it after the pair would be an error there, also if the unfused pair saves something else: with a frozen
    weight it saves the convolution's output instead of its input.
    """
    values = (pair.conv.input, *pair.parameters)
    return values if has_backward(pair.bn.output, values, graph) else ()


def has_backward(output: fx.Node, values: tuple[Value, ...], graph: fx.Graph) -> bool:
    """Return whether what is computed from the values may have a backward."""
    example = output.meta.get("example_value")
    if isinstance(example, Tensor):
        return requires_grad(example)
    return any(may_train(value, graph) for value in values)


def rounding(conv: ConvCall, graph: fx.Graph) -> torch.dtype | None:
    """Return the dtype that autocast gives the convolution if it differs from the weight's, else None."""
    weight, convolved = tensor_of(conv.weight, graph), tensor_of(conv.node, graph)
    if weight is None or convolved is None or convolved.dtype == weight.dtype:
        return None
    return convolved.dtype


MOST_DEVIATIONS = 4.0
"""The largest root mean square, over the channels, of the mean in standard deviations."""


def cancels(mean: Tensor | None, var: Tensor | None, eps: float | fx.Node | None) -> bool:
    """Return whether a fold would lose precision to the mean of its input. False if the statistics are unknown.

    A BatchNorm subtracts the mean before anything is rounded. The fold subtracts it from products with x that are as
    large: with a mean of 10 deviations outputs in bf16 have 8 times, gradients in fp32 50 times the error of eager's
    (`perf.numerics`). That is the input of a network more often than an activation.
    """
    if mean is None or var is None or not isinstance(eps, float | int):
        return False
    with torch.no_grad(), unset_fake_temporarily():
        squares = mean.detach().cpu().double().square() / (var.detach().cpu().double() + eps)
        return bool(squares.mean() > MOST_DEVIATIONS**2)
