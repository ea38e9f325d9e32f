"""Write a program as an fx graph in each dialect, with the metadata that the dialect's maker leaves in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from blocks import Caller
from programs import Block, Call, Conv, Norm, Program, T, V, substitute, value_of
from spelling import FUNCTIONS, padding_of, spell_conv, spell_norm
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

Places = dict[str, list[tuple[nn.Module, str]]]
"""The modules and attribute names that hold each tensor."""


@dataclass
class Rendered:
    """A graph and how to run it.

    Attributes:
        gm: The graph. Graphs inside it are among its modules.
        places: Where each tensor is held; none if tensors are arguments.
        call: What to call instead of `gm`, if anything.
    """

    gm: fx.GraphModule
    places: Places = field(default_factory=dict)
    call: Callable[..., Any] | None = None

    def run(self, given: dict[str, Tensor], leaves: bool = True) -> tuple[Any, ...]:
        """Return the outputs for these tensors.

        leaves: The tensors are leaves, and held as parameters, which get the gradients. Else transforms wrap them.
        """
        for name, places in self.places.items():
            value = given[name]
            if leaves:
                given[name] = value = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
            for module, attribute in places:
                (module._buffers if attribute in module._buffers else module._parameters)[attribute] = value  # type: ignore[assignment]
        found = (self.call or self.gm.forward)(*[value for name, value in given.items() if name not in self.places])
        return found if isinstance(found, tuple) else (found,)


# -- torch functions, as Dynamo writes them ----------------------------------------------------------------------------


class _Examples(fx.Interpreter):
    """Runs a graph on fake tensors and leaves each node's result in `example_value`, as Dynamo does."""

    def run_node(self, node: fx.Node) -> Any:
        found = super().run_node(node)
        if node.op != "output":
            node.meta["example_value"] = found
        return found


def fakes(program: Program) -> list[Tensor]:
    """Return the program's tensors without values. Call it under a FakeTensorMode."""
    return [value_of(spec, torch.empty(spec.shape)) for spec in program.tensors.values()]


def functions(program: Program, examples: bool = True) -> Rendered:
    """Return a graph with every tensor a placeholder and every call torch's own function or a method."""
    root, graph = nn.Module(), fx.Graph()
    given = {name: graph.placeholder(name) for name in program.tensors}
    write(program, root, graph, given, lambda step, values: None)
    gm = fx.GraphModule(root, graph)
    if examples:
        with FakeTensorMode():
            _Examples(gm).run(*fakes(program))
    return Rendered(gm)


def write(
    program: Program,
    root: nn.Module,
    graph: fx.Graph,
    given: dict[str, fx.Node],
    as_module: Callable[[Any, list[fx.Node]], fx.Node | None],
) -> None:
    """Add the program's steps to the graph. `as_module` may write a step by itself."""
    values: list[fx.Node] = []

    def node_of(value: Any) -> fx.Node:
        return values[value.index] if isinstance(value, V) else given[value.name]

    for step in program.steps:
        values.append(as_module(step, values) or _write_step(step, root, graph, node_of))
    graph.output(tuple(node_of(value) for value in program.outputs))


def _write_step(step: Any, root: nn.Module, graph: fx.Graph, node_of: Callable[[Any], fx.Node]) -> fx.Node:
    if isinstance(step, Block):
        operands = {f"a{index}": T(()) for index in range(len(step.reads))}
        name = f"block{sum(1 for _ in root.children())}"
        root.add_module(name, Caller(step, functions(Program(operands, step.steps, (step.output,)), False).gm))
        return graph.call_module(name, substitute(step.reads, node_of))
    step = substitute(step, node_of)
    if isinstance(step, Conv):
        x = step.x
        if step.padding_mode != "zeros":
            x = graph.call_function(F.pad, (x, padding_of(step)), {"mode": step.padding_mode})
        return graph.call_function(*spell_conv(step, x, step.weight, step.bias))
    if isinstance(step, Norm):
        return graph.call_function(*spell_norm(step, step.x, step.mean, step.var, step.weight, step.bias))
    assert isinstance(step, Call)
    if step.function.startswith("."):
        return graph.call_method(step.function[1:], step.args, step.kwargs)
    return graph.call_function(FUNCTIONS[step.function], step.args, step.kwargs)


# -- what Dynamo captures ----------------------------------------------------------------------------------------------


def captured(program: Program) -> Rendered:
    """Return the graph that Dynamo captures. It runs as a backend of torch.compile runs it, guards included."""
    torch._dynamo.reset()
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        found.append(gm)
        return lambda *arguments: gm.forward(*arguments)  # which the pass replaces

    compiled = torch.compile(functions(program, examples=False).gm, backend=backend, fullgraph=True)

    def call(*arguments: Any) -> Any:
        returned = compiled(*arguments)
        if len(found) != 1:
            raise ValueError(f"Dynamo has captured {len(found)} graphs")
        return returned

    grad_mode = torch.is_grad_enabled()
    try:
        call(*program.given().values())
    finally:
        torch.set_grad_enabled(grad_mode)
    return Rendered(found[0], call=call)


# -- aten --------------------------------------------------------------------------------------------------------------


def aten(program: Program, mode: str = "real", pre_dispatch: bool = True) -> Rendered:
    """Return what make_fx traces on `real` tensors, whose metadata shares no memory, or on `fake` ones."""
    return _traced(program, tracing_mode=mode, pre_dispatch=pre_dispatch)


def decomposed(program: Program, functional: bool = False) -> Rendered:
    """Return aten after decomposition; without writes if `functional`."""
    return _traced(program, functional, tracing_mode="fake", decomposition_table=core_aten_decompositions())


def _traced(program: Program, functional: bool = False, **keywords: Any) -> Rendered:
    rendered = functions(program, examples=False)

    def call(*given: Tensor) -> Any:
        return rendered.gm.forward(*given)

    traced = torch.func.functionalize(call, remove="mutations_and_views") if functional else call
    gm = make_fx(traced, **keywords)(*program.given().values())
    if any(node.op == "get_attr" for node in gm.graph.nodes):  # `.data`, which a second run would find changed
        raise ValueError("a tensor was traced as a constant, to which the graph writes")
    return Rendered(gm)


def exported(program: Program, decompose: bool) -> Rendered:
    """Return what torch.export writes, with every tensor an argument."""
    gm = functions(program, examples=False).gm

    class Model(nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return gm(*given)

    ep = torch.export.export(Model(), tuple(program.given().values()), strict=False)
    return Rendered((ep.run_decompositions() if decompose else ep).module())
