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

from ..compile_context import compiling
from ..ops import autograd, branches_autograd, fp16_range
from ..options import Options
from .branch import Branch
from .branch_groups import Scales, group_sums, insert_scales
from .calls import BatchNormCall, ConvCall, Value
from .findings import Pair, norms_of
from .fold_input import insert_input_fold
from .fold_nodes import Folded, copy_example, copy_origin, erase, insert_fold, mark_layer, read, rounding_keywords
from .grouping import Group, fold_inputs, group
from .input_norms import InputNorm
from .layout import restore_strides, written_parts
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
    rewrite = _Rewrite(graph, options, prescale, mutations or Mutations(graph), input_norms)
    rewrite.replace(pairs, sums)
    return rewrite.replaced


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


class _Rewrite:
    """One call of `replace`.

    Attributes:
        replaced: What stands for the outputs of the nodes that are gone. A pair may read that of an earlier one.
    """

    def __init__(
        self, graph: fx.Graph, options: Options, prescale: bool, mutations: Mutations, input_norms: Sequence[InputNorm]
    ) -> None:
        self.graph, self.options, self.prescale, self.mutations = graph, options, prescale, mutations
        self.norms = {each.conv.node: each for each in input_norms}
        self.groups: dict[fx.Node, Group] = {}  # by the first convolution
        self.folded: dict[fx.Node, Folded] = {}  # by convolution
        self.scales: dict[fx.Node, Scales] = {}  # by convolution, of a sum the one with the largest kernel
        self.written: set[fx.Node] = set()
        self.replaced: dict[fx.Node, fx.Node] = {}

    def replace(self, pairs: Sequence[Pair], sums: Sequence[Branch]) -> None:
        """Replace everything, in the order of the graph."""
        graph, options = self.graph, self.options
        alone = [pair for pair in pairs if pair.conv.node not in self.norms]
        self.groups = {each.pairs[0].conv.node: each for each in group(graph, alone, options, mutations=self.mutations)}
        self.written = written_parts(graph, pairs, self.mutations)
        together = group_sums(graph, sums, alone, options, self.mutations) if self._in_eager else []
        work: dict[fx.Node, list[Pair] | Branch | InputNorm] = {branch.node: branch for branch in sums}
        work |= {norm.last: norm for norm in self.norms.values()}  # a pair with the same convolution takes its place
        for last, each in itertools.groupby(pairs, lambda pair: pair.bn.node):
            work[last] = list(each)
        for node in sorted(work):
            for members in together:
                if members[0].node is node:
                    self.scales |= insert_scales(graph, members, self.replaced, options, self.mutations)
            own = work[node]
            if isinstance(own, Branch):
                scales = self.scales.get(own.largest[0].node)
                self.replaced[node] = merge(graph, own, self.replaced, options, self.prescale, scales)
            elif isinstance(own, InputNorm):
                self.replaced[node] = self._convolve(own.conv, node, self._convolution_of_norm(own, None))
            else:
                self._replace_pairs(own)

    @property
    def _in_eager(self) -> bool:
        """Return whether fold and convolution are one function, which folds again in backward."""
        return self.options.recompute and not self.options.codegen

    def _replace_pairs(self, own: list[Pair]) -> None:
        """Replace the pairs of one BatchNorm."""
        node = own[0].bn.node
        for pair in own:
            self.replaced[pair.conv.node] = self._convolve(pair.conv, node, self._convolution_of(pair))
        for step in own[0].steps:  # they read the folded convolutions, which are later in the graph than the original
            if step < node:
                _erase_unused_parts(self.graph, step)
                node.prepend(step)
        for bn in norms_of(own):
            last = bn is own[0].bn or bn in own[0].twins
            compiled = self.options.codegen and compiling()  # and Inductor chooses the strides
            restores = last and (bool(own[0].steps) or not compiled)
            self._remove_batch_norm(bn, restores, copy=node in self.written)
            if last:
                copy_example(self.replaced[bn.output], bn.output)

    def _convolution_of(self, pair: Pair) -> _Convolution:
        """Return the folded convolution of a pair."""
        conv = pair.conv
        if conv.node in self.norms:
            return self._convolution_of_norm(self.norms[conv.node], pair)
        if conv.node in self.scales:
            return self._with_scales(pair, self.scales[conv.node])
        if self._in_eager:
            return self._with_fold(pair)
        if conv.node in self.groups:
            self.folded |= insert_fold(self.graph, self.groups[conv.node], self.replaced, self.options, self.prescale)
        *tensors, power = self.folded[conv.node]
        return _Convolution(conv.function, tuple(tensors), {}, power)

    def _convolution_of_norm(self, norm: InputNorm, pair: Pair | None) -> _Convolution:
        """Return the convolution that the BatchNorm before it is folded into, and that of the pair after it, if any."""
        found = insert_input_fold(self.graph, norm, pair, self.replaced, self.options, self.prescale)
        self._remove_batch_norm(norm.bn, restores=True, convolved=True)
        return _Convolution(*found)

    def _with_fold(self, pair: Pair) -> _Convolution:
        """Return the convolution as `autograd.conv_with_fold`."""
        with self.graph.inserting_before(pair.bn.node):
            inputs = fold_inputs(
                pair,
                self.graph,
                self._read,
                lambda function, *arguments: self.graph.call_function(function, arguments),
            )
        keywords: dict[str, Any] = {"transposed": pair.conv.transposed, "groups": pair.conv.groups}
        keywords |= rounding_keywords(pair.conv, pair.dtype)
        keywords |= {"kernel": False} if self.options.kernel == "torch" else {}
        return _Convolution(autograd.conv_with_fold, inputs[:7], keywords)

    def _with_scales(self, pair: Pair, scales: Scales) -> _Convolution:
        """Return the convolution as `branches_autograd.conv_with_scales`, or of a weight that is merged already."""
        if scales.weight is not None:
            return _Convolution(pair.conv.function, (scales.weight, scales.bias), {})
        with self.graph.inserting_before(pair.bn.node):
            weights = list(map(self._read, scales.weights))
        keywords: dict[str, Any] = {"groups": pair.conv.groups} | rounding_keywords(pair.conv, pair.dtype)
        keywords |= {"kernel_merges": False} if self.options.kernel == "torch" else {}
        tensors = weights, scales.scales, scales.bias
        omits = "transposed", "output_padding"
        return _Convolution(branches_autograd.conv_with_scales, tensors, keywords, omits=omits)

    def _read(self, value: Value) -> fx.Node | None:
        return read(self.graph, value, self.replaced)

    def _convolve(self, conv: ConvCall, last: fx.Node, convolution: _Convolution) -> fx.Node:
        """Replace a convolution by one with folded parameters, before the node `last`. Return its output."""
        graph, options = self.graph, self.options
        with graph.inserting_before(last):
            x = self._read(conv.input)
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

    def _remove_batch_norm(
        self, bn: BatchNormCall, restores: bool, copy: bool = False, convolved: bool = False
    ) -> None:
        """Remove a BatchNorm that is folded. Its readers read its input.

        Args:
            bn: The BatchNorm.
            restores: Give its readers the strides of its output, where its input does not have them.
            copy, convolved: See `restore_strides`.
        """
        last = self.replaced.get(bn.input, bn.input)
        if restores:
            with self.graph.inserting_before(bn.node):
                last = restore_strides(
                    self.graph, bn.output, bn.input, last, self.options, bn, copy=copy, convolved=convolved
                )
        self.replaced[bn.output] = last
        gone = removable_nodes(bn)
        bn.output.replace_all_uses_with(last)
        erase(self.graph, bn.output, bn.node)
        erase(self.graph, *[part for part in reversed(bn.parts) if part in gone])


def _erase_unused_parts(graph: fx.Graph, node: fx.Node) -> None:
    erase(graph, *[user for user in node.users if user.target is operator.getitem and not user.users])
