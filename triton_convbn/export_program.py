"""A copy of an exported program whose graph, signature and tensors change together."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, TensorArgument

from .export_constants import LIFTED, Constants
from .graph.views import storage_of


class ProgramCopy:
    """The copy of a program.

    Attributes:
        gm: The graph.
        calls: The module call graph, whose signatures name nodes.
        order: The position of each node of the graph, as it was copied.
        constants: The values that are the same in every call.
        parameters: The new parameters by their paths.
    """

    def __init__(self, ep: ExportedProgram) -> None:
        self.ep = ep
        self.gm = _copied(ep.graph_module)
        self.signature, self.calls = copy.deepcopy((ep.graph_signature, ep.module_call_graph))
        self.order = {node: index for index, node in enumerate(self.gm.graph.nodes)}
        self.constants = Constants(ep, self.gm.graph)
        self.parameters: dict[str, nn.Parameter] = {}
        self._read = {node.name for node in self.gm.graph.find_nodes(op="placeholder") if node.users}

    def named(self) -> set[str]:
        """Return the names in the signatures of preserved modules (``preserve_module_call_signature``)."""
        signatures = [entry.signature for entry in self.calls if entry.signature is not None]
        return {argument.name for each in signatures for argument in (*each.inputs, *each.outputs)}

    def erase_unread(self, nodes: Sequence[fx.Node]) -> None:
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
        named = self.named()
        for node in reversed(self.gm.graph.nodes):
            if node in computed and not node.users and node.name not in named:
                self.gm.graph.erase_node(node)

    def add(self, path: str, parameter: nn.Parameter) -> fx.Node:
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
        """Return the program as it is now. Do not use the copy afterwards."""
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
        unread = [spec for spec in specs if not inputs[spec.arg.name].users and spec.arg.name not in self.named()]
        gone = {spec.target for spec in unread if spec.arg.name in self._read}
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
        memories = {path: storage_of(value) for path, value in every.items() if isinstance(value, Tensor)}
        same = {memories[path] for path in paths if path in memories} - {None}
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
