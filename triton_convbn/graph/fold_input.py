"""Add the nodes that fold a BatchNorm into the convolution after it."""

import operator
from typing import Any

import torch
from torch import fx

from ..ops import input_norm, input_norm_autograd, strides
from ..options import Options
from .calls import Value, tensor_of
from .findings import Pair
from .fold_nodes import Calls, copied_if_saved, mark, read, rounding_keywords
from .grouping import fold_inputs
from .input_norms import InputNorm


def insert_input_fold(
    graph: fx.Graph,
    norm: InputNorm,
    pair: Pair | None,
    replaced: dict[fx.Node, fx.Node],
    options: Options,
    prescale: bool = True,
) -> tuple[Any, tuple[Any, ...], dict[str, Any], fx.Node | None]:
    """Add the fold before `norm.last`. If a BatchNorm after the convolution folds too, `pair` is that pair.

    Returns:
        The function to call with x, the tensors and the keywords to call it with, and what to multiply its output by,
        in the order of `rewrite._Convolution`.
    """
    conv = norm.conv
    call = Calls(graph)

    def read_value(value: Value) -> fx.Node | None:
        return read(graph, value, replaced)

    with graph.inserting_before(norm.last):
        weight = read_value(conv.weight)
        keywords: dict[str, Any] = {"groups": conv.groups} if conv.groups != 1 else {}
        if pair is not None:
            inputs = fold_inputs(pair, graph, read_value, call)
            keywords["after"] = (*inputs[2:6], inputs.eps)
        vectors = [*map(read_value, norm.vectors), norm.bn.eps]
        if options.recompute and not options.codegen:
            keywords |= rounding_keywords(conv, norm.dtype)
            tensors = weight, read_value(conv.bias), *vectors
            return input_norm_autograd.conv_with_input_norm, tensors, keywords, None
        if options.codegen and copied_if_saved(conv.weight, graph):
            weight = call(strides.preserve_strides, weight)
        keywords |= {} if norm.dtype is None else {"dtype": norm.dtype}
        keywords |= {} if prescale else {"prescale": False}
        name = f"{norm.bn.node.name}_fold"
        folded = call(input_norm.fold_input_norm, weight, read_value(conv.bias), *vectors, name=name, **keywords)
        example = tensor_of(conv.weight, graph)
        prescaled = prescale and (norm.dtype or (example.dtype if example is not None else None)) == torch.float16
        outputs = [call(operator.getitem, folded, index) for index in range(2 + prescaled)]
    mark(call.added, norm.bn.node, options)
    return conv.function, (outputs[0], outputs[1]), {}, outputs[2] if prescaled else None
