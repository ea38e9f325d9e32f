"""A program as an fx graph in each dialect, with the metadata that the dialect's maker leaves in it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from programs import DTYPES, FUNCTIONS, Call, Conv, Norm, Program, V, padding_of, spell_conv, spell_norm, substitute
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp


@dataclass
class Rendered:
    """A graph and how it is run: with a program's tensors as arguments, or as attributes of modules.

    places: of each tensor, the modules and names under which it lies; empty where tensors are arguments.
    """

    gm: fx.GraphModule
    places: dict[str, list[tuple[nn.Module, str]]]

    def run(self, given: dict[str, Tensor]) -> tuple[Any, ...]:
        """The outputs, for these tensors."""
        for name, places in self.places.items():
            value = given[name]
            given[name] = nn.Parameter(value.detach(), requires_grad=value.requires_grad)  # whose gradient it will be
            for module, attribute in places:
                (module._buffers if attribute in module._buffers else module._parameters)[attribute] = given[name]
        arguments = [value for name, value in given.items() if name not in self.places]
        found = self.gm(*arguments)
        return found if isinstance(found, tuple) else (found,)


# -- torch functions, as Dynamo writes them ----------------------------------------------------------------------------


class _Examples(fx.Interpreter):
    """Runs a graph on fake tensors and leaves what each node makes in `example_value`, as Dynamo does."""

    def run_node(self, node: fx.Node) -> Any:
        found = super().run_node(node)
        if node.op != "output":
            node.meta["example_value"] = found
        return found


def fakes(program: Program) -> list[Tensor]:
    """The program's tensors without values. Call it under a FakeTensorMode."""
    return [
        torch.empty(spec.shape, dtype=DTYPES[spec.dtype], requires_grad=spec.trains)
        for spec in program.tensors.values()
    ]


def functions(program: Program, examples: bool = True) -> Rendered:
    """Every tensor a placeholder, every call torch's own function or a method."""
    graph = fx.Graph()
    given = {name: graph.placeholder(name) for name in program.tensors}
    _write(program, graph, given, lambda step, values: None)
    gm = fx.GraphModule(nn.Module(), graph)
    if examples:
        with FakeTensorMode():
            _Examples(gm).run(*fakes(program))
    return Rendered(gm, {})


def _write(
    program: Program,
    graph: fx.Graph,
    given: dict[str, fx.Node],
    as_module: Callable[[Any, list[fx.Node]], fx.Node | None],
) -> None:
    values: list[fx.Node] = []

    def node_of(value: Any) -> fx.Node:
        return values[value.index] if isinstance(value, V) else given[value.name]

    for step in program.steps:
        node = as_module(step, values)
        if node is None and isinstance(step, Conv):
            x, weight, bias = (substitute(value, node_of) for value in (step.x, step.weight, step.bias))
            if step.padding_mode != "zeros":
                x = graph.call_function(F.pad, (x, padding_of(step)), {"mode": step.padding_mode})
            node = graph.call_function(*spell_conv(step, x, weight, bias))
        elif node is None and isinstance(step, Norm):
            tensors = (step.x, step.mean, step.var, step.weight, step.bias)
            node = graph.call_function(*spell_norm(step, *(substitute(value, node_of) for value in tensors)))
        elif node is None:
            assert isinstance(step, Call)
            args, kwargs = substitute(step.args, node_of), substitute(step.kwargs, node_of)
            if step.function.startswith("."):
                node = graph.call_method(step.function[1:], args, kwargs)
            else:
                node = graph.call_function(FUNCTIONS[step.function], args, kwargs)
        values.append(node)
    graph.output(tuple(node_of(value) for value in program.outputs))


# -- module calls, as symbolic_trace writes them -----------------------------------------------------------------------


def modules(program: Program, shapes: bool = True) -> Rendered:
    """Convolutions and BatchNorms that read their tensors as they are given are modules, shared where they are equal.

    What has no module, a convolution with a computed weight for one, stays a function. Inputs are placeholders.
    """
    root, graph = nn.Module(), fx.Graph()
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    tensors = program.given()
    given: dict[str, fx.Node] = {}
    for name in program.tensors:
        if name.startswith("x"):
            given[name] = graph.placeholder(name)
    for name, spec in program.tensors.items():
        if not name.startswith("x"):
            _place(root, name, name, tensors, places, buffer=not spec.trains)
            given[name] = graph.create_node("get_attr", name)
    made: dict[Any, str] = {}

    def as_module(step: Any, values: list[fx.Node]) -> fx.Node | None:
        if not isinstance(step, Conv | Norm) or not _is_module(step):
            return None
        key = replace(step, x=None, positional=0, general=False)
        if key not in made:
            made[key] = f"{type(step).__name__.lower()}{len(made)}"
            root.add_module(made[key], _module(program, step, tensors, places))
        x = values[step.x.index] if isinstance(step.x, V) else given[step.x.name]
        by_keyword = step.positional == 0
        return graph.call_module(made[key], () if by_keyword else (x,), {"input": x} if by_keyword else {})

    _write(program, graph, given, as_module)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    gm = fx.GraphModule(root, graph)
    # GraphModule copies only what the graph names; the places are of the modules it has taken.
    own = {id(module): module for module in gm.modules()}
    for name, found in places.items():
        places[name] = [(gm if module is root else module, attribute) for module, attribute in found]
        places[name] = [(m, a) for m, a in places[name] if id(m) in own and (m is not gm or hasattr(gm, a))]
    inputs = [name for name in program.tensors if name.startswith("x")]
    places = {name: found for name, found in places.items() if name not in inputs}
    if shapes:
        ShapeProp(gm).propagate(*(tensors[name].detach().clone() for name in inputs))
    return Rendered(gm, places)


def _place(
    module: nn.Module,
    attribute: str,
    name: str,
    tensors: dict[str, Tensor],
    places: dict[str, list[tuple[nn.Module, str]]],
    buffer: bool,
) -> None:
    tensor = tensors[name]
    module._parameters.pop(attribute, None)
    module._buffers.pop(attribute, None)
    if buffer:
        module.register_buffer(attribute, tensor)
    else:
        module.register_parameter(attribute, nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad))
    places.setdefault(name, []).append((module, attribute))


def _is_module(step: Conv | Norm) -> bool:
    given = (step.weight, step.bias) if isinstance(step, Conv) else (step.weight, step.bias, step.mean, step.var)
    if any(isinstance(value, V) for value in given) or step.general:
        return False
    if isinstance(step, Norm):  # a module has both affine parameters or none, and keeps both statistics or none
        pairs = (step.weight, step.bias), (step.mean, step.var)
        return all((a is None) == (b is None) for a, b in pairs) and (step.mean is not None or step.training)
    return step.weight is not None


_CONV_MODULES = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}


def _module(program: Program, step: Conv | Norm, tensors: dict[str, Tensor], places: Any) -> nn.Module:
    if isinstance(step, Conv):
        shape = tensors[step.weight.name].shape
        if not step.dims:
            module: nn.Module = nn.Linear(shape[1], shape[0], bias=False)
        else:
            first, second = (shape[0], shape[1]) if step.transposed else (shape[1], shape[0])
            extra: dict[str, Any] = {"output_padding": step.output_padding} if step.transposed else {}
            inner, outer = (first, second * step.groups) if step.transposed else (first * step.groups, second)
            module = _CONV_MODULES[step.transposed][step.dims - 1](
                inner,
                outer,
                tuple(shape[2:]),
                stride=step.stride,
                padding=step.padding,
                dilation=step.dilation,
                groups=step.groups,
                bias=False,
                padding_mode=step.padding_mode,
                **extra,
            )
        names = {"weight": step.weight, "bias": step.bias}
    else:
        rank = _norm_rank(program, step)
        kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank, nn.BatchNorm1d)
        channels = 1 if step.mean is None else tensors[step.mean.name].shape[0]
        tracks = step.mean is not None
        module = kind(channels, eps=step.eps, affine=False, track_running_stats=tracks).train(step.training)
        module.affine = step.weight is not None
        names = {"weight": step.weight, "bias": step.bias, "running_mean": step.mean, "running_var": step.var}
    for attribute, value in names.items():
        if value is not None:
            buffer = attribute.startswith("running") or not tensors[value.name].is_floating_point()
            _place(module, attribute, value.name, tensors, places, buffer)
    return module


def _norm_rank(program: Program, step: Norm) -> int:
    """How many dimensions the BatchNorm's input has, from a run without values."""
    return ranks(program)[step.x.index] if isinstance(step.x, V) else len(program.tensors[step.x.name].shape)


def ranks(program: Program) -> list[int]:
    from programs import perform

    with FakeTensorMode(), torch.no_grad():
        given = dict(zip(program.tensors, (tensor.detach() for tensor in fakes(program)), strict=True))
        values: list[Any] = []
        for step in program.steps:
            values.append(perform(step, lambda v: values[v.index] if isinstance(v, V) else given[v.name]))
    return [value.ndim if isinstance(value, Tensor) else 0 for value in values]


# -- aten --------------------------------------------------------------------------------------------------------------


def aten(program: Program, mode: str = "real", pre_dispatch: bool = True) -> Rendered:
    """As make_fx traces it on `real` tensors, which leave metadata that shares no memory, or `fake` ones."""
    return _traced(program, tracing_mode=mode, pre_dispatch=pre_dispatch)


def decomposed(program: Program, functional: bool = False) -> Rendered:
    """aten after decomposition; with every write taken out where `functional`."""
    return _traced(program, functional, tracing_mode="fake", decomposition_table=core_aten_decompositions())


def _traced(program: Program, functional: bool = False, **keywords: Any) -> Rendered:
    rendered = functions(program, examples=False)
    call = torch.func.functionalize(rendered.gm, remove="mutations_and_views") if functional else rendered.gm
    arguments = list(program.given().values())
    gm = make_fx(call, **keywords)(*arguments)
    if any(
        node.op == "get_attr" for node in gm.graph.nodes
    ):  # `.data` is traced so: a second run would find it changed
        raise ValueError("a tensor was traced as a constant, to which the graph writes")
    return Rendered(gm, {})


def exported(program: Program, decompose: bool) -> Rendered:
    """As torch.export writes it, every tensor an argument."""
    gm = functions(program, examples=False).gm

    class Model(nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return gm(*given)

    ep = torch.export.export(Model(), tuple(program.given().values()), strict=False)
    return Rendered((ep.run_decompositions() if decompose else ep).module(), {})


def copied(rendered: Rendered) -> Rendered:
    """The same again, to be rewritten. Tensors are arguments."""
    assert not rendered.places
    return Rendered(copy.deepcopy(rendered.gm), {})
