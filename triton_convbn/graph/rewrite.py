"""Replace pairs by folded convolutions, in a graph that stays ordinary Python.

A pair ``y = conv(x, W, b); z = bn(y)`` becomes

    folded = fold(W, b, bn_weight, bn_bias, running_mean, running_var, eps, ...)
    z = conv(x, folded[0], folded[1], ...)

The fold is a node of its own, so that AOTAutograd's partitioner can recompute it in backward. Without a partitioner
(``codegen=False``) fold and convolution are one function that folds again in backward, see `autograd`, or the vectors
of several pairs and sums are computed together, see `branch_groups`.
"""

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import fx

from ..ops import autograd, branches_autograd, fp16_range
from ..options import Options
from .branch import Branch
from .branch_groups import Scales, group_sums, insert_scales
from .calls import BatchNormCall, ConvCall
from .dialects import read_passthrough
from .findings import Pair, norms_of
from .fold_input import insert_input_fold
from .fold_nodes import GENERAL, Folded, copy_example, copy_origin, erase, insert_fold, mark_layer, read
from .grouping import fold_inputs, group
from .input_norms import InputNorm
from .layout import restore_strides
from .match import removable_nodes
from .merge import merge
from .mutation import Mutations
from .one_thread import by_onednn


def replace(
    graph: fx.Graph,
    pairs: Sequence[Pair],
    options: Options,
    prescale: bool = True,
    mutations: Mutations | None = None,
    sums: Sequence[Branch] = (),
    input_norms: Sequence[InputNorm] = (),
) -> dict[fx.Node, fx.Node]:
    """Replace each pair and each sum in the graph by its folded convolution. The caller recompiles the module.

    Args:
        graph: The graph of the pairs.
        pairs: All pairs of the BatchNorms to fold.
        options: `kernel`, `pairs_per_launch`, `recompute` and `codegen` apply.
        prescale: Keep folds in fp16 in range, see `fp16_range.prescale`. False if the caller reads the folded values.
        mutations: The effects of the graph if they are known, see `Findings`.
        sums: The sums of branches to merge.
        input_norms: The BatchNorms to fold into the convolution after them. It may be that of a pair.

    Returns:
        What stands for the outputs of the nodes that were replaced.

    Raises:
        OptionError: ``kernel="triton"``, and no kernel can run.
    """
    norms = {each.conv.node: each for each in input_norms}
    alone = [pair for pair in pairs if pair.conv.node not in norms]
    groups = {each.pairs[0].conv.node: each for each in group(graph, alone, options, mutations=mutations)}
    folded: dict[fx.Node, Folded] = {}  # by convolution
    replaced: dict[fx.Node, fx.Node] = {}  # a pair may read the output of a pair that was replaced earlier
    work: dict[fx.Node, list[Pair] | Branch | InputNorm] = {branch.node: branch for branch in sums}
    work |= {norm.last: norm for norm in input_norms}  # a pair with the same convolution takes its place
    for last, each in itertools.groupby(pairs, lambda pair: pair.bn.node):
        work[last] = list(each)
    eager = options.recompute and not options.codegen
    mutations = mutations or Mutations(graph)
    together = group_sums(graph, sums, alone, options, mutations) if eager else []
    scales: dict[fx.Node, Scales] = {}  # by convolution, of a sum the one with the largest kernel
    written = _written_parts(graph, pairs, mutations)
    for node in sorted(work):
        for members in together:
            if members[0].node is node:
                scales |= insert_scales(graph, members, replaced, options, mutations)
        own = work[node]
        if isinstance(own, Branch):
            conv, _ = own.largest
            replaced[node] = merge(graph, own, replaced, options, prescale, scales.get(conv.node))
            continue
        if isinstance(own, InputNorm):
            convolution = _Convolution(*insert_input_fold(graph, own, None, replaced, options, prescale))
            _remove_batch_norm(graph, own.bn, replaced, options, convolved=True)
            replaced[node] = _convolve(graph, own.conv, node, replaced, convolution, options)
            continue
        for pair in own:
            norm = norms.get(pair.conv.node)
            if norm is not None:
                convolution = _Convolution(*insert_input_fold(graph, norm, pair, replaced, options, prescale))
                _remove_batch_norm(graph, norm.bn, replaced, options, convolved=True)
            elif pair.conv.node in scales:
                convolution = _conv_with_scales(graph, pair, scales[pair.conv.node], replaced, options)
            elif eager:
                convolution = _conv_with_fold(graph, pair, replaced, options)
            else:
                if pair.conv.node in groups:
                    folded |= insert_fold(graph, groups[pair.conv.node], replaced, options, prescale)
                *tensors, power = folded[pair.conv.node]
                convolution = _Convolution(pair.conv.function, tuple(tensors), {}, power)
            replaced[pair.conv.node] = _convolve(graph, pair.conv, node, replaced, convolution, options)
        for step in own[0].steps:  # they read the folded convolutions, which are later in the graph than the original
            if step < node:
                _erase_unused_parts(graph, step)
                node.prepend(step)
        for bn in norms_of(own):
            last = bn is own[0].bn or bn in own[0].twins
            restored = options if last and own[0].steps else None
            _remove_batch_norm(graph, bn, replaced, restored, copy=node in written)
            if last:
                copy_example(replaced[bn.output], bn.output)
    return replaced


class _Convolution(NamedTuple):
    """A function to call with x, these tensors, the convolution's options and these keywords.

    Attributes:
        power: What to multiply the output by, see `Folded`.
        omits: Options of the convolution that the function does not have.
    """

    function: Any
    tensors: tuple[Any, ...]
    keywords: dict[str, Any]
    power: fx.Node | None = None
    omits: tuple[str, ...] = ()


def _conv_with_fold(graph: fx.Graph, pair: Pair, replaced: dict[fx.Node, fx.Node], options: Options) -> _Convolution:
    """Return the convolution as `autograd.conv_with_fold`."""
    with graph.inserting_before(pair.bn.node):
        inputs = fold_inputs(
            pair,
            graph,
            lambda value: read(graph, value, replaced),
            lambda function, *arguments: graph.call_function(function, arguments),
        )
    keywords: dict[str, Any] = {"transposed": pair.conv.transposed, "groups": pair.conv.groups}
    keywords |= {} if pair.dtype is None else {"dtype": pair.dtype}
    keywords |= {"kernel": False} if options.kernel == "torch" else {}
    keywords |= {"general": True} if pair.conv.function in GENERAL else {}
    return _Convolution(autograd.conv_with_fold, inputs[:7], keywords)


def _conv_with_scales(
    graph: fx.Graph, pair: Pair, scales: Scales, replaced: dict[fx.Node, fx.Node], options: Options
) -> _Convolution:
    """Return the convolution as `branches_autograd.conv_with_scales`, or that of a weight which is merged already."""
    if scales.weight is not None:
        return _Convolution(pair.conv.function, (scales.weight, scales.bias), {})
    with graph.inserting_before(pair.bn.node):
        weights = [read(graph, value, replaced) for value in scales.weights]
    keywords: dict[str, Any] = {"groups": pair.conv.groups}
    keywords |= {} if pair.dtype is None else {"dtype": pair.dtype}
    keywords |= {"general": True} if pair.conv.function in GENERAL else {}
    keywords |= {"kernel_merges": False} if options.kernel == "torch" else {}
    tensors = weights, scales.scales, scales.bias
    return _Convolution(branches_autograd.conv_with_scales, tensors, keywords, omits=("transposed", "output_padding"))


def _convolve(
    graph: fx.Graph,
    conv: ConvCall,
    last: fx.Node,
    replaced: dict[fx.Node, fx.Node],
    convolution: _Convolution,
    options: Options,
) -> fx.Node:
    """Replace a convolution by one with folded parameters, before the node `last`. Return its output."""
    with graph.inserting_before(last):
        x = read(graph, conv.input, replaced)
        if conv.pad is not None:
            x = graph.call_function(F.pad, (x, conv.pad[0]), {"mode": conv.pad[1]})
            copy_origin(x, conv.node)
        name = f"{last.name}_conv"
        function, tensors, keywords, *_ = convolution
        own = {option: value for option, value in conv.options.items() if option not in convolution.omits}
        keywords = {**own, **keywords, **by_onednn(conv, graph, options)}
        output = graph.create_node("call_function", function, (x, *tensors), keywords, name=name)
        outputs = [output]
        if convolution.power is not None:
            linear: dict[str, Any] = {"linear": True} if conv.linear else {}
            outputs.append(graph.call_function(fp16_range.scaled_back, (output, convolution.power), linear))
    for output in outputs:
        copy_origin(output, conv.node)
        copy_example(output, conv.node)
    mark_layer(outputs[-1], options)
    _erase_unused_parts(graph, conv.node)  # they are before the new output
    conv.node.replace_all_uses_with(output)
    erase(graph, conv.node)
    return output


def _erase_unused_parts(graph: fx.Graph, node: fx.Node) -> None:
    erase(graph, *[user for user in node.users if user.target is operator.getitem and not user.users])


def _written_parts(graph: fx.Graph, pairs: Sequence[Pair], mutations: Mutations) -> set[fx.Node]:
    """Return the BatchNorms of parts of an output where a result is written to, as an in-place ReLU does, or returned.

    Without the BatchNorm the result is a view. Autograd forbids writes to what a chunk returns, and takes a write to
    one of several parts for a write to all.
    """
    parts = [pair for pair in pairs if pair.twins or any(map(_is_one_of_several, pair.steps))]
    if not parts:
        return set()

    def written(bn: BatchNormCall) -> bool:
        return graph.output_node() in bn.output.users or mutations.writes_to(bn.output)

    return {pair.bn.node for pair in parts if any(map(written, (pair.bn, *pair.twins)))}


def _is_one_of_several(node: fx.Node) -> bool:
    """Return whether a node takes one of the views that a call returns."""
    call = read_passthrough(node)
    return call is not None and call.parts is not None


def _remove_batch_norm(
    graph: fx.Graph,
    bn: BatchNormCall,
    replaced: dict[fx.Node, fx.Node],
    options: Options | None = None,
    copy: bool = False,
    convolved: bool = False,
) -> None:
    """Remove a BatchNorm that is folded. Its readers read its input.

    Args:
        options: Restore the strides of its output, as these options require. None if its input has them.
        copy, convolved: See `restore_strides`.
    """
    last = replaced.get(bn.input, bn.input)
    if options is not None:
        with graph.inserting_before(bn.node):
            last = restore_strides(graph, bn.output, bn.input, last, options, bn, copy=copy, convolved=convolved)
    replaced[bn.output] = last
    gone = removable_nodes(bn)
    bn.output.replace_all_uses_with(last)
    erase(graph, bn.output, bn.node)
    erase(graph, *[part for part in reversed(bn.parts) if part in gone])
