"""Find the values of an exported program that are the same in every call."""

import operator
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from .graph.mutation import Mutations
from .graph.views import storage_of
from .ops import branches, input_norm, reference

LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
"""The kinds of a graph's inputs that are tensors of the program's own."""

_MUTATED = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)


def lifted(ep: ExportedProgram) -> dict[str, Tensor]:
    """Return the program's own tensors by the names of the inputs that they are given to."""
    every = {**ep.state_dict, **ep.constants}
    targets = {spec.arg.name: spec.target for spec in ep.graph_signature.input_specs if spec.kind in LIFTED}
    return {name: every[target] for name, target in targets.items() if isinstance(every.get(target), Tensor)}


FOLDS = (reference.fold_reference, branches.fold_branches, input_norm.fold_input_norm)
"""The folds in plain torch."""


class Constants:
    """The constants of a program: its own tensors that nothing writes to, and what pure operators compute from them."""

    def __init__(self, ep: ExportedProgram, graph: fx.Graph) -> None:
        self.tensors = lifted(ep)
        signature, effects = ep.graph_signature, Mutations(graph)
        mutated = {spec.target for spec in signature.output_specs if spec.kind in _MUTATED}
        written = {spec.arg.name for spec in signature.input_specs if spec.target in mutated}
        written |= {node.name for node in graph.find_nodes(op="placeholder") if effects.writes_to(node)}
        memory = {name: storage_of(tensor) for name, tensor in self.tensors.items()}
        others = {memory[name] for name in written if name in memory}
        others.discard(None)  # a sparse tensor has no memory that it could share
        self._constant = {name for name in memory if name not in written and memory[name] not in others}
        self._known: dict[fx.Node, bool] = {}

    def has(self, node: fx.Node) -> bool:
        """Return whether the node has the same value in every call."""
        for each in _sources_first(node, self._known):
            if each.op == "placeholder":
                self._known[each] = each.name in self._constant
            else:
                pure = each.op == "call_function" and _is_pure(each.target)
                self._known[each] = pure and all(self._known[source] for source in each.all_input_nodes)
        return self._known[node]

    def value(self, node: fx.Node) -> Any:
        """Return the value of a constant node, detached."""
        values: dict[fx.Node, Any] = {}
        for each in _sources_first(node):
            if each.op == "placeholder":
                values[each] = self.tensors[each.name].detach()
            else:
                arguments, keywords = fx.node.map_arg((each.args, each.kwargs), values.__getitem__)
                with torch.no_grad():
                    values[each] = each.target(*arguments, **keywords)  # type: ignore[operator]
        return values[node]

    def sources(self, node: fx.Node) -> list[Tensor]:
        """Return the program's tensors that a constant node is computed from."""
        return [self.tensors[each.name] for each in _sources_first(node) if each.op == "placeholder"]


def _sources_first(node: fx.Node, known: Container[fx.Node] = ()) -> list[fx.Node]:
    """Return the node and all that it is computed from, each after its inputs, but for what is known."""
    found: dict[fx.Node, None] = {}
    waiting = [] if node in known else [node]
    while waiting:  # a recursion would not survive 200 layers
        current = waiting[-1]
        missing = [each for each in current.all_input_nodes if each not in found and each not in known]
        waiting += missing
        if not missing:
            found[waiting.pop()] = None
    return list(found)


def _is_pure(target: Any) -> bool:
    if isinstance(target, OpOverload):
        return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
    return target in (operator.getitem, torch.narrow, reference.compose, *FOLDS)
