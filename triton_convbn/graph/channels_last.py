"""Run parts of a graph channels_last on a CPU, in graphs that run in eager mode.

oneDNN computes a depthwise convolution of contiguous tensors in a layout of its own. It copies the input there and the
output back, in forward and for both gradients. Channels_last it copies nothing: 3 x 3 kernels take 0.4 to 0.8 of the
time, and the gradients of 7 x 7 kernels 0.3 to 0.7 (AMD EPYC, Zen 4, one thread). See docs/experiments.md.

A part consists of convolutions and of calls that compute every element by itself, so that the layout changes no value
but by rounding. What enters a part is copied to channels_last, and what others read of it is copied back. So no other
call sees another layout.
"""

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..dispatch import device_type
from ..ops.activation import ACTIVATIONS
from ..ops.autograd import conv_with_fold
from ..ops.branches_autograd import conv_with_branches, conv_with_scales
from ..ops.input_norm_autograd import conv_with_input_norm
from ..ops.memory_format import to_channels_last
from ..ops.merge_together import merge_together
from ..post_grad.layout_of_sums import CHAIN
from .calls import is_subclass
from .dialects import read_conv
from .mutation import Mutations
from .writes import flatten

GAIN = 2
"""Copy if depthwise convolutions read and write more than this many times the elements of the copies."""

_FUNCTIONS = {operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, torch.add, torch.mul, torch.sub}
_FUNCTIONS |= {F.relu, torch.relu, torch.relu_, torch.sigmoid, torch.tanh, *ACTIVATIONS.values()}
_METHODS = {"add", "add_", "mul", "mul_", "relu", "relu_", "sigmoid", "sub", "tanh"}
"""Calls that compute every element by itself."""


class _Convolution(NamedTuple):
    """What decides whether a two-dimensional convolution can be of a part.

    Attributes:
        folded: Something is folded into it. Else torch returns a gradient of its weight that is channels_last.
    """

    x: fx.Node
    weights: list[Tensor]
    folded: bool
    groups: int
    stride: Any
    dilation: Any

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == _example(self.x).shape[1]

    @property
    def allowed(self) -> bool:
        """Return whether its results are as exact channels_last, and the gradient of its weight is contiguous.

        Of a dense convolution oneDNN adds the products one after another, see `layout_of_sums`. MKL computes kernels of
        one element in both layouts alike.
        """
        if self.depthwise:
            return True
        if self.groups > 1 or not self.weights:
            return False
        kernel = max(weight.shape[2:].numel() for weight in self.weights)
        if kernel > 1 and not self.folded:
            return False
        by_onednn = torch.get_num_threads() > 1 or _example(self.x).shape[0] >= 16  # `use_mkldnn` of ATen
        by_onednn = by_onednn or kernel > 1 or not all(each in (1, (1, 1)) for each in (self.stride, self.dilation))
        return not by_onednn or kernel * self.weights[0].shape[1] <= CHAIN


class _Part(NamedTuple):
    """Calls that read each other's results.

    Attributes:
        calls: The calls.
        copied: The tensors of others that they read.
        read: Those of their results that others read.
    """

    calls: list[fx.Node]
    copied: list[fx.Node]
    read: list[fx.Node]


def run_channels_last(graph: fx.Graph) -> None:
    """Copy what enters and leaves the parts of a graph that take less time channels_last. Edit the graph in place."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return
    calls = {node: inputs for node in graph.nodes if (inputs := _inputs(node))}
    convolutions = {node: conv for node in calls if (conv := _convolution(node)) is not None}
    if not any(conv.depthwise for conv in convolutions.values()):
        return
    for part in _parts(_without_writes(graph, calls)):
        depthwise = [node for node in part.calls if node in convolutions and convolutions[node].depthwise]
        gain = sum(_example(each).numel() for node in depthwise for each in (convolutions[node].x, node))
        if gain > GAIN * sum(_example(each).numel() for each in (*part.copied, *part.read)):
            _copy(graph, part)


def _copy(graph: fx.Graph, part: _Part) -> None:
    """Add the copies, each after what it copies."""
    calls = set(part.calls)
    for node in part.copied:
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1] if node.op == "placeholder" else node):
            copy = graph.call_function(to_channels_last, (node,))
        for user in [user for user in node.users if user in calls]:
            user.replace_input_with(node, copy)
    for node in part.read:
        with graph.inserting_after(node):  # `contiguous` would leave a mean with the strides of channels_last
            copy = graph.call_method("clone", (node,), {"memory_format": torch.contiguous_format})
        for user in [user for user in node.users if user not in calls and user is not copy]:
            user.replace_input_with(node, copy)


def _parts(calls: dict[fx.Node, list[fx.Node]]) -> Iterator[_Part]:
    """Yield the parts: two calls are of one if one reads the result of the other."""
    neighbours: dict[fx.Node, list[fx.Node]] = {call: [] for call in calls}
    for call, inputs in calls.items():
        for each in inputs:
            if each in neighbours:
                neighbours[call].append(each)
                neighbours[each].append(call)
    while neighbours:
        waiting, own = [next(iter(neighbours))], dict[fx.Node, None]()
        while waiting:
            call = waiting.pop()
            waiting += neighbours.pop(call, ())
            own[call] = None
        copied = dict.fromkeys(each for call in own for each in calls[call] if each not in own)
        yield _Part(list(own), list(copied), [call for call in own if any(user not in own for user in call.users)])


def _without_writes(graph: fx.Graph, calls: dict[fx.Node, list[fx.Node]]) -> dict[fx.Node, list[fx.Node]]:
    """Return the calls whose tensors nothing writes to, so that a copy is what it copies.

    A call in place may write to a result that it alone reads.
    """
    mutations, found = Mutations(graph), dict(calls)
    if any(not effect.writes for effect in mutations.effects):  # a transform of torch.func
        return {}
    while True:
        written: set[Any] = set()
        for effect in mutations.effects:
            first = effect.node.args[0] if effect.node in found else None
            if not (isinstance(first, fx.Node) and first in found and list(first.users) == [effect.node]):
                written = written.union(*(mutations.memory(each) for each in effect.reached if each is not None))
        unsafe = [
            call
            for call, inputs in found.items()
            if written and any(None in written | own or written & own for own in map(mutations.memory, (call, *inputs)))
        ]
        if not unsafe:
            return found
        for call in unsafe:
            del found[call]


def _inputs(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a call reads in the layout of its part, none if it cannot be of one."""
    conv = _convolution(node)
    if conv is not None:
        return [conv.x] if conv.allowed else []
    if _is_mean(node):
        return [node.all_input_nodes[0]]
    known = node.target in (_METHODS if node.op == "call_method" else _FUNCTIONS) or _is_dropout_in_eval(node)
    if not known or "out" in node.kwargs or not _is_contiguous(node):
        return []
    shape = _example(node).shape
    return [each for each in node.all_input_nodes if _is_contiguous(each) and _example(each).shape == shape]


def _is_dropout_in_eval(node: fx.Node) -> bool:
    return node.target is F.dropout and (node.args[2] if len(node.args) > 2 else node.kwargs.get("training")) is False


def _is_mean(node: fx.Node) -> bool:
    """Return whether a call takes the mean over height and width."""
    if not node.args or len(node.all_input_nodes) != 1 or not _is_contiguous(node.all_input_nodes[0]):
        return False
    if not isinstance(node.meta.get("example_value"), Tensor):
        return False
    if node.target is F.adaptive_avg_pool2d:
        return node.args[1:] in ((1,), ((1, 1),))
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    takes_mean = node.target in ("mean", torch.mean) and "out" not in node.kwargs
    return takes_mean and isinstance(dims, tuple | list) and sorted(dims) in ([2, 3], [-2, -1])


def _convolution(node: fx.Node) -> _Convolution | None:
    """Read a two-dimensional convolution of contiguous tensors, folded or not, that is not transposed."""
    if node.op != "call_function" or not _is_contiguous(node):
        return None
    x: Any
    weights: Any
    folded = node.target in (conv_with_fold, conv_with_scales, conv_with_branches, conv_with_input_norm)
    if folded:
        x, weights, options = node.args[0], node.args[1], dict(node.kwargs)
    else:
        conv = read_conv(node)
        if conv is None or conv.obstacle is not None or conv.linear or conv.pad is not None:
            return None
        x, weights, options = conv.input, conv.weight, {**conv.options, "groups": conv.groups}
        options["transposed"] = conv.transposed
    if options.get("transposed") or not isinstance(x, fx.Node) or not _is_contiguous(x):
        return None
    tensors = [each.meta.get("example_value") for each in _weights(weights)]
    known = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.ndim == 4]
    groups: Any = options.get("groups", 1)
    return _Convolution(x, known, folded, groups, options.get("stride", 1), options.get("dilation", 1))


def _weights(value: Any) -> list[fx.Node]:
    """Return the weights of a convolution, those that are merged into it if they are."""
    if isinstance(value, fx.Node) and value.target is operator.getitem:
        source, index = value.args
        if isinstance(source, fx.Node) and source.target is merge_together:
            value = source.args[0][index]  # type: ignore[index]
    return [each for each in flatten([value]) if isinstance(each, fx.Node)]


def _is_contiguous(node: fx.Node) -> bool:
    """Return whether Dynamo knows that a node's result is contiguous, and could be channels_last."""
    tensor = node.meta.get("example_value")
    if not isinstance(tensor, Tensor) or tensor.ndim != 4 or tensor.dtype != torch.float32:
        return False
    if is_subclass(tensor) or device_type(tensor.device) != "cpu":
        return False
    if not all(isinstance(size, int) for size in tensor.shape):
        return False  # comparing dynamic sizes adds a guard
    return tensor.shape[1] > 1 and tensor.shape[2:].numel() > 1 and tensor.is_contiguous()


def _example(node: fx.Node) -> Tensor:
    tensor: Tensor = node.meta["example_value"]
    return tensor
