"""The Python wrapper that Inductor generates for a planned graph, with all that is needed to call it elsewhere."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch._inductor import config

LAUNCHERS = (
    "use_static_triton_launcher",
    "use_fast_triton_launcher",
    "static_launch_user_defined_triton_kernels",
)
"""Inductor's options for how a kernel is launched. They are read when the code is loaded, not when it is generated."""


class Spec(NamedTuple):
    """A tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    device: str


@dataclass
class Wrapper:
    """Generated code, the tensors that it takes, and what the library calls in it return.

    results: by the name that the code gives the result: one tensor, or a list with None for what nobody takes.
    constants: tensors that the code reads as globals. options: Inductor's, as far as loading the code needs them.
    """

    text: str
    inputs: list[Spec]
    constants: dict[str, Spec] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def wrapper_of(graph: Any, text: str) -> Wrapper:
    """Return the wrapper of a graph that Inductor has generated code for. Raises: TypeError for a symbolic size."""
    found = Wrapper(text, [_of_layout(graph.graph_inputs[name]) for name in graph.graph_input_names])
    found.constants = {
        name: Spec(tuple(value.shape), value.stride(), _dtype(value.dtype), value.device.type)
        for name, value in graph.constants.items()
    }
    found.options = {name: getattr(config, name) for name in LAUNCHERS if hasattr(config, name)}
    for node in graph.operations:
        if type(node).__name__ == "MultiOutput":
            _take(found.results, node)
        elif node.is_extern() and hasattr(node.get_output_spec(), "dtype"):
            found.results[node.get_name()] = _of_layout(node)
    return found


def _take(results: dict[str, Any], output: Any) -> None:
    """Add one output of a call that returns several."""
    name = output.inputs[0].get_name()
    match [index for _, index in output.indices]:
        case []:
            results[name] = _of_layout(output)
        case [index]:
            every = results.setdefault(name, [])
            every += [None] * (index + 1 - len(every))
            every[index] = _of_layout(output)
        case nested:
            raise TypeError(f"the results of {name} are nested: {nested}")


def _of_layout(value: Any) -> Spec:
    sizes, strides = ([int(each) for each in numbers] for numbers in (value.get_size(), value.get_stride()))
    return Spec(tuple(sizes), tuple(strides), _dtype(value.get_dtype()), value.get_device().type)


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
