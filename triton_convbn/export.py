"""Fold the BatchNorms of an exported program once.

An exported program is deployed, so its calls need not fold. Its graph takes parameters and buffers as inputs, and a
signature says which input is which tensor of the state dict. ``<convolution>.folded_weight`` and ``.folded_bias``
replace the tensors that are no longer read. The names are new, so that the model's state dict does not load into the
result and silently undo the folds.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, TensorArgument

from .export_constants import LIFTED, Constants, memory
from .graph import rewrite
from .graph.branch import Branch
from .graph.branches import merge_sums
from .graph.calls import Value
from .graph.conv_bn_pass import count_folds, report
from .graph.findings import Decline, Findings, Pair, norms_of
from .graph.input_norms import InputNorm, fold_input_norms, own_nodes
from .graph.match import find
from .graph.reasons import Reason
from .ops import branches, input_norm, reference
from .options import OnDecline, Options

_FOLDS = (reference.fold_reference, branches.fold_branches, input_norm.fold_input_norm)
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
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.split("@")[0] or otherwise or node.name  # the second call of a module has a suffix


def _fold(ep: ExportedProgram) -> tuple["_Folded", Findings]:
    overflowing: set[str] = set()
    while True:  # whether a fold fits its dtype, only its numbers say: where one does not, fold the others anew
        folded = _Folded(ep)
        findings = folded.findings(overflowing)
        work: dict[fx.Node, list[Pair] | Branch | InputNorm] = {branch.node: branch for branch in findings.sums}
        work |= {norm.last: norm for norm in findings.input_norms}  # a pair with the same convolution takes its place
        work |= findings.folded()
        # The last one first: what an earlier one puts in place the later ones read already, by their graph.
        more = {node.name for node in sorted(work, reverse=True) if not folded.fold(work[node], findings.input_norms)}
        if not more:
            return folded, findings
        overflowing |= more


class _Folded:
    """A copy of a program's graph and signature, in which BatchNorms are folded one by one."""

    def __init__(self, ep: ExportedProgram) -> None:
        self.ep = ep
        self.gm = _copied(ep.graph_module)
        self.signature, self.calls = copy.deepcopy((ep.graph_signature, ep.module_call_graph))
        self.order = {node: index for index, node in enumerate(self.gm.graph.nodes)}
        self.constants = Constants(ep, self.gm.graph)
        self.read = {node.name for node in self.gm.graph.find_nodes(op="placeholder") if node.users}
        self.parameters: dict[str, nn.Parameter] = {}  # the new ones, by their paths

    def findings(self, overflowing: set[str]) -> Findings:
        named = self._named()

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
            return Decline(norm.bn, Reason.DTYPE, _OVERFLOW) if norm.last.name in overflowing else None

        found = fold_input_norms(replace(found, pairs=pairs, declines=declines), self.gm.graph, decline)
        declines = found.declines
        for inner in self.gm.modules():
            if isinstance(inner, fx.GraphModule) and inner is not self.gm:
                nested = find(inner.graph)
                declines += [Decline(bn, Reason.NESTED_GRAPH) for bn in norms_of(nested.pairs)]
                declines += [Decline(decline.bn, Reason.NESTED_GRAPH) for decline in nested.declines]
        return replace(found, pairs=pairs, declines=declines)

    def _named(self) -> set[str]:
        """Return the names in the signatures of preserved modules (``preserve_module_call_signature``)."""
        signatures = [entry.signature for entry in self.calls if entry.signature is not None]
        return {argument.name for each in signatures for argument in (*each.inputs, *each.outputs)}

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
        for source in [node for node in graph.nodes if node.target in _FOLDS and node not in others]:
            tensors, made_of = self.constants.value(source), self.constants.sources(source)
            fits = fits and (_finite(tensors) or not _finite(made_of))
            taken = {user.args[1]: user for user in source.users}
            (convolution,) = {user for getitem in taken.values() for user in getitem.users}
            for index, kind in ((1, "bias"), (0, "weight")):  # each becomes the first input
                parameter = nn.Parameter(tensors[index], any(tensor.requires_grad for tensor in made_of))
                added = self._add(f"{module_of(convolution, name)}.folded_{kind}", parameter)
                taken[index].replace_all_uses_with(added)
                graph.erase_node(taken[index])
            inputs += [source, *source.all_input_nodes]
        self._erase_unread(inputs)
        for entry in self.calls:
            for result in results:
                if entry.signature is not None:
                    entry.signature.replace_all_uses_with(result, replaced[result])
        return fits

    def _erase_unread(self, nodes: Sequence[fx.Node]) -> None:
        """Erase what is computed from constants and no longer read, among these nodes and their sources.

        Examples are a fold, and the transposition through which a decomposed Linear reads its weight.
        """
        computed: set[fx.Node] = set()
        rest = [node for node in nodes if node.op == "call_function" and self.constants.has(node)]
        while rest:
            node = rest.pop()
            if node not in computed:
                computed.add(node)
                rest += [each for each in node.all_input_nodes if each.op == "call_function"]
        named = self._named()
        for node in reversed(self.gm.graph.nodes):
            if node in computed and not node.users and node.name not in named:
                self.gm.graph.erase_node(node)

    def _add(self, path: str, parameter: nn.Parameter) -> fx.Node:
        """Add a new parameter, as the first input of the graph after the tokens."""
        known = {*self.ep.state_dict, *self.ep.constants, *self.parameters}
        path = next(each for n in range(len(known) + 1) if (each := f"{path}_{n}" if n else path) not in known)
        specs, inputs = self.signature.input_specs, list(self.gm.graph.find_nodes(op="placeholder"))
        position = sum(spec.kind is InputKind.TOKEN for spec in specs)
        with self.gm.graph.inserting_before(inputs[position]):
            node = self.gm.graph.placeholder("p_" + path.replace(".", "_"))
        node.target = node.name
        mode = next(each.meta["val"].fake_mode for each in inputs if hasattr(each.meta.get("val"), "fake_mode"))
        node.meta["val"] = mode.from_tensor(parameter, static_shapes=True)
        specs.insert(position, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), path))
        self.parameters[path] = parameter
        return node

    def program(self) -> ExportedProgram:
        self._drop()
        graph, specs = self.gm.graph, self.signature.input_specs
        outputs: Any = graph.output_node().args[0]
        for spec, node in zip(self.signature.output_specs, outputs, strict=True):
            if isinstance(node, fx.Node) and not isinstance(spec.arg, ConstantArgument):
                spec.arg.name = node.name
        graph.lint()
        self.gm.recompile()
        state = {**self._kept(self.ep.state_dict), **self.parameters}
        return ExportedProgram(
            root=self.gm,
            graph=graph,
            graph_signature=self.signature,
            state_dict={spec.target: state.pop(spec.target) for spec in specs if spec.target in state} | state,
            range_constraints=copy.deepcopy(self.ep.range_constraints),
            module_call_graph=self.calls,
            example_inputs=self.ep.example_inputs,
            constants=self._kept(self.ep.constants),
            verifiers=self.ep.verifiers,
        )

    def _drop(self) -> None:
        """Remove the inputs that are no longer read, and the batch counters of the folded BatchNorms."""
        inputs = {node.name: node for node in self.gm.graph.find_nodes(op="placeholder")}
        specs = [spec for spec in self.signature.input_specs if spec.kind in LIFTED]
        unread = [spec for spec in specs if not inputs[spec.arg.name].users and spec.arg.name not in self._named()]
        gone = {spec.target for spec in unread if spec.arg.name in self.read}
        gone |= {f"{path.removesuffix('running_mean')}num_batches_tracked" for path in gone}
        gone |= self._other_names(gone)
        for spec in unread:
            if spec.target in gone:
                self.signature.input_specs.remove(spec)
                self.gm.graph.erase_node(inputs[spec.arg.name])

    def _kept(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return the tensors without those that were dropped."""
        before = {spec.target for spec in self.ep.graph_signature.input_specs}
        after = {spec.target for spec in self.signature.input_specs}
        gone = before - after
        gone |= self._other_names(gone) - after
        return {path: value for path, value in tensors.items() if path not in gone}

    def _other_names(self, paths: set[str]) -> set[str]:
        """Return every path of the tensors that have one of these paths."""
        every = {**self.ep.state_dict, **self.ep.constants}
        memories = {path: memory(value) for path, value in every.items() if isinstance(value, Tensor)}
        same = {memories[path] for path in paths if path in memories}
        return {path for path, where in memories.items() if where in same}


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of the graph and of the graphs inside it, with the same names.

    A deep copy would include what export has recorded of its tracing, not all of which can be copied.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node, own in zip(graph.nodes, gm.graph.nodes, strict=True):
        node.name = own.name  # a copy is renamed where the name is Python's own, such as "input"
        node.meta = dict(own.meta)
    copied = fx.GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    return copied


def _read(pair: Pair) -> list[fx.Node]:
    """Return the nodes that the fold of a pair reads."""
    values: tuple[Value | float, ...] = (*pair.parameters, *(bn.eps for bn in pair.norms))
    return [value for value in values if isinstance(value, fx.Node)]


def _finite(tensors: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
