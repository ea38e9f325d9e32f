"""Fold the BatchNorms of an exported program once.

An exported program is deployed, so its calls need not fold. Its graph takes parameters and buffers as inputs, and a
signature says which input is which tensor of the state dict. ``<convolution>.folded_weight`` and ``.folded_bias``
replace the tensors that are no longer read. The names are new, so that the model's state dict does not load into the
result and silently undo the folds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from .export_constants import FOLDS
from .export_program import ProgramCopy
from .graph import rewrite
from .graph.branch import Branch
from .graph.branches import merge_sums
from .graph.calls import Value
from .graph.conv_bn_pass import count_folds, report
from .graph.findings import Decline, Findings, Pair, module_path, norms_of
from .graph.fit import cancels
from .graph.input_norms import InputNorm, fold_input_norms, own_nodes
from .graph.match import find
from .graph.reasons import Reason
from .options import OnDecline, Options

_OVERFLOW = "the folded parameters are not finite in it"
_PLAIN = Options(kernel="torch", recompute=False, codegen=False)


def fold_exported(ep: ExportedProgram, *, on_decline: OnDecline = "ignore") -> ExportedProgram:
    """Fold every BatchNorm of an exported program into the convolution before or after it, if that is exact.

    Works before and after `run_decompositions`. Dynamic shapes stay dynamic. The result can be exported, saved,
    decomposed and compiled ahead of time like any program. A folded parameter requires a gradient if a source does.

    Args:
        ep: The program of `torch.export.export`. It does not change. The result shares its other tensors.
        on_decline: What happens if a BatchNorm cannot be folded, see `Options`. ``explain(ep)`` lists the reasons.

    Returns:
        A new program, or `ep` itself if nothing folds.

    Raises:
        TypeError: `ep` is not an ExportedProgram.
        OptionError: `on_decline` has a wrong value.
        DeclinedError: a BatchNorm cannot be folded, with ``on_decline="raise"``.
    """
    options = Options.of(on_decline=on_decline)
    if not isinstance(ep, ExportedProgram):
        raise TypeError(
            f"fold_exported takes a torch.export.ExportedProgram, not {type(ep).__name__}:"
            " call torch.export.export(model, arguments) first"
        )
    with torch.inference_mode(False):  # parameters that are made inside could never train or be loaded
        folded, findings = _fold(ep)
    report(findings.declines, options)
    count_folds(findings)
    return folded.program() if findings.changes_graph else ep


def findings_of(ep: ExportedProgram) -> tuple[Findings, Mapping[fx.Node, int]]:
    """Return what `fold_exported` does with each BatchNorm, and each node's position, without those of inner graphs."""
    folded, findings = _fold(ep)
    return findings, folded.order


def module_of(node: fx.Node, otherwise: str = "") -> str:
    """Return the path of the module that a call is written in, or `otherwise`, or the node's name."""
    return module_path(node) or otherwise or node.name


def _fold(ep: ExportedProgram) -> tuple["_Folded", Findings]:
    overflowing: set[str] = set()
    while True:  # only the numbers tell whether a fold fits its dtype: if one does not, start again without it
        folded = _Folded(ep)
        findings = folded.findings(overflowing)
        work: dict[fx.Node, list[Pair] | Branch | InputNorm] = {branch.node: branch for branch in findings.sums}
        work |= {norm.last: norm for norm in findings.input_norms}  # a pair with the same convolution takes its place
        work |= findings.folded()
        # Last first: then no fold that is still to come names a node that another has replaced.
        more = {node.name for node in sorted(work, reverse=True) if not folded.fold(work[node], findings.input_norms)}
        if not more:
            return folded, findings
        overflowing |= more


class _Folded(ProgramCopy):
    """A program in which BatchNorms are folded one by one."""

    def findings(self, overflowing: set[str]) -> Findings:
        named = self.named()

        def wanted(branch: Branch) -> bool:
            inside = [node.name for node in branch.own if node is not branch.node]
            read = [value for value in branch.values() if isinstance(value, fx.Node)]
            fits = branch.node.name not in overflowing
            return fits and named.isdisjoint(inside) and all(map(self.constants.has, read))

        found = merge_sums(find(self.gm.graph), self.gm.graph, wanted)
        pairs: list[Pair] = []
        declines = list(found.declines)
        for own in found.folded().values():
            bn = own[0].bn
            read = dict.fromkeys(node for pair in own for node in _read(pair))
            between = [each.bn.output for pair in own for each in pair.inner]
            computed = [node.name for node in read if not self.constants.has(node)]
            if any(node.name in named for pair in own for node in (pair.conv.node, *pair.steps, *between)):
                reason = Reason.CONV_SHARED, "the signature of a preserved module"
            elif computed:
                reason = Reason.NOT_CONSTANT, ", ".join(computed)
            elif bn.node.name in overflowing:
                reason = Reason.DTYPE, _OVERFLOW
            else:
                pairs += own
                continue
            declines += [Decline(each, *reason) for each in norms_of(own)]
        declines.sort(key=lambda decline: self.order[decline.bn.node])

        def decline(norm: InputNorm) -> Decline | None:
            values = (norm.conv.weight, norm.conv.bias, *norm.vectors, norm.bn.eps)
            computed = [node.name for node in values if isinstance(node, fx.Node) and not self.constants.has(node)]
            if any(node.name in named for node in own_nodes(norm)):
                return Decline(norm.bn, Reason.OUTPUT_SHARED, "the signature of a preserved module")
            if computed:
                return Decline(norm.bn, Reason.NOT_CONSTANT, ", ".join(computed))
            mean, var = (self.constants.value(each) if isinstance(each, fx.Node) else None for each in norm.vectors[2:])
            if cancels(mean, var, norm.bn.eps):
                return Decline(norm.bn, Reason.CANCELS)
            return Decline(norm.bn, Reason.DTYPE, _OVERFLOW) if norm.last.name in overflowing else None

        found = fold_input_norms(replace(found, pairs=pairs, declines=declines), self.gm.graph, decline)
        declines = found.declines
        for inner in self.gm.modules():
            if isinstance(inner, fx.GraphModule) and inner is not self.gm:
                nested = find(inner.graph)
                declines += [Decline(bn, Reason.NESTED_GRAPH) for bn in norms_of(nested.pairs)]
                declines += [Decline(decline.bn, Reason.NESTED_GRAPH) for decline in nested.declines]
        return replace(found, pairs=pairs, declines=declines)

    def fold(self, what: Sequence[Pair] | Branch | InputNorm, norms: Sequence[InputNorm]) -> bool:
        """Replace one BatchNorm and its convolutions, or one sum, by convolutions with new parameters.

        norms: All BatchNorms that fold into the convolution after them. Those before these convolutions fold as well.

        Returns:
            False if the new parameters are not finite but their sources are. The copy is then useless.
        """
        graph = self.gm.graph
        others = set(graph.nodes)
        if isinstance(what, Branch):
            results = [what.node]
            own, convolutions = set(what.own), [conv.node for conv, _ in what.convs]
        elif isinstance(what, InputNorm):
            results = [what.conv.node]
            own, convolutions = set(), [what.conv.node]
        else:
            results = [bn.output for bn in (what[0].bn, *what[0].twins)]
            own = {node for bn in norms_of(what) for node in (*bn.parts, bn.node)}
            convolutions = [pair.conv.node for pair in what]
        norms = [norm for norm in norms if norm.conv.node in convolutions]
        own |= {node for norm in norms for node in (*norm.bn.parts, norm.bn.node)}
        inputs = [node for each in (*convolutions, *own) for node in each.all_input_nodes if node not in own]
        sums = [what] if isinstance(what, Branch) else []
        pairs = [] if isinstance(what, Branch | InputNorm) else what
        replaced = rewrite.replace(graph, pairs, _PLAIN, prescale=False, sums=sums, input_norms=norms)
        name = convolutions[0].name
        fits = True
        for source in [node for node in graph.nodes if node.target in FOLDS and node not in others]:
            tensors, made_of = self.constants.value(source), self.constants.sources(source)
            fits = fits and (_finite(tensors) or not _finite(made_of))
            taken = {user.args[1]: user for user in source.users}
            (convolution,) = {user for getitem in taken.values() for user in getitem.users}
            for index, kind in ((1, "bias"), (0, "weight")):  # each becomes the first input
                parameter = nn.Parameter(tensors[index], any(tensor.requires_grad for tensor in made_of))
                added = self.add(f"{module_of(convolution, name)}.folded_{kind}", parameter)
                taken[index].replace_all_uses_with(added)
                graph.erase_node(taken[index])
            inputs += [source, *source.all_input_nodes]
        self.erase_unread(inputs)
        for entry in self.calls:
            for result in results:
                if entry.signature is not None:
                    entry.signature.replace_all_uses_with(result, replaced[result])
        return fits


def _read(pair: Pair) -> list[fx.Node]:
    """Return the nodes that the fold of a pair reads."""
    values: tuple[Value | float, ...] = (*pair.parameters, *(bn.eps for bn in pair.norms))
    return [value for value in values if isinstance(value, fx.Node)]


def _finite(tensors: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
