"""Write a program with module calls, as `torch.fx.symbolic_trace` does."""

from dataclasses import replace
from typing import Any

from programs import Conv, Norm, Program, V
from render import Places, Rendered, fakes, write
from spelling import perform
from torch import Tensor, fx, nn, no_grad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp


def modules(program: Program, shapes: bool = True) -> Rendered:
    """Return a graph in which convolutions and BatchNorms are modules, equal ones the same module.

    A call that no module makes stays a function, a convolution with a computed weight say. Inputs are placeholders.
    """
    root, graph = nn.Module(), fx.Graph()
    places: Places = {}
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

    write(program, root, graph, given, as_module)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    gm = fx.GraphModule(root, graph)
    # GraphModule copies what the graph names. The places are in the modules that it has taken.
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
    """Return the number of dimensions of the BatchNorm's input."""
    return _ranks(program)[step.x.index] if isinstance(step.x, V) else len(program.tensors[step.x.name].shape)


def _ranks(program: Program) -> list[int]:
    """Return the number of dimensions of each step's result, from a run without values."""
    with FakeTensorMode(), no_grad():
        given = dict(zip(program.tensors, (tensor.detach() for tensor in fakes(program)), strict=True))
        values: list[Any] = []
        for step in program.steps:
            values.append(perform(step, lambda v: values[v.index] if isinstance(v, V) else given[v.name]))
    return [value.ndim if isinstance(value, Tensor) else 0 for value in values]
