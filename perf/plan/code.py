"""Read what Inductor generates for a graph on a pretended GPU: its launches, the bytes they move, and its wrapper."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.utils import _pytree as pytree

from .h100 import pretended_h100

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Launch:
    """One step of the generated code.

    Attributes:
        direction: forward or backward.
        kind: triton, fold, operator (a fold by an operator of this package), convolution, or other (a matmul, say).
        launches: Usually 1. A combo kernel can take several.
        bytes: What it reads and writes.
    """

    direction: str
    name: str
    kind: str
    launches: int
    bytes: int


@dataclass
class Generated:
    """The graph that Inductor has lowered, the wrapper that it has generated, and the launches in it.

    Attributes:
        graph: Inductor's graph.
        text: The code of the wrapper.
        launches: The launches in it.
        results: For each library call of the wrapper, by name, a meta tensor like its result, or several by index.
    """

    graph: Any
    text: str
    launches: list[Launch]
    results: dict[str, Any]


def _move_to_gpu(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Move the graph's fake tensors to the pretended GPU, in place. Return the inputs, moved.

    Each tensor moves once, so views of one storage stay views of one storage: Inductor looks for aliases.
    """
    moved: dict[int, tuple[Any, Any]] = {}  # by id, with the original, so that no id is reused

    def move(value: Any) -> Any:
        if isinstance(value, torch.device):
            return DEVICE if value.type == "cpu" else value
        if not isinstance(value, FakeTensor) or value.device.type != "cpu":
            return value
        if id(value) not in moved:
            with in_kernel_invocation_manager(value.fake_mode):
                moved[id(value)] = FakeTensor(value.fake_mode, value, DEVICE), value
        return moved[id(value)][0]

    for node in gm.graph.nodes:
        arguments = fx.map_arg((node.args, node.kwargs), lambda each: each)  # plain containers, as tree_map needs
        node.args, node.kwargs = pytree.tree_map(move, arguments)
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(move, node.meta["val"])
    gm.recompile()
    return [pytree.tree_map(move, each) for each in inputs]


class _Generated(BaseException):
    """Ends Inductor, which catches every Exception, with what it has generated."""


def generate(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Generated:
    """Let Inductor lower a graph on a pretended H100. The graph moves there, in place. Nothing is compiled or run.

    options: Arguments of Inductor's inner compiler.
    """
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    calls: list[tuple[Any, str]] = []
    generate_call = PythonWrapperCodegen.generate_kernel_call

    def generate_kernel_call(self: Any, kernel_name: str, *arguments: Any, **keywords: Any) -> Any:
        calls.append((V.graph.scheduler.current_node, kernel_name))
        return generate_call(self, kernel_name, *arguments, **keywords)

    def compile_to_module(self: Any) -> Any:
        code, _ = self.codegen()
        direction = "backward" if self.is_backward else "forward"
        launches = [
            launch
            for node in self.scheduler.nodes
            if (launch := _launch(node, direction, [name for owner, name in calls if owner is node]))
        ]
        planned = sum(each.launches for each in launches if each.kind in ("triton", "fold"))
        written = code.value.count(".run(")
        if planned != written and not self.cpp_wrapper:
            raise RuntimeError(f"{written} calls in the generated code, {planned} found in its plan")
        raise _Generated(Generated(self, code.value, launches, _library_results(self)))

    moved = _move_to_gpu(gm, inputs)
    with (
        pretended_h100(),
        mock.patch.object(PythonWrapperCodegen, "generate_kernel_call", generate_kernel_call),
        mock.patch.object(GraphLowering, "compile_to_module", compile_to_module),
    ):
        try:
            compile_fx_inner(gm, moved, **options | {"cudagraphs": None})
        except _Generated as end:
            (generated,) = end.args
            return generated
    raise RuntimeError("Inductor has generated no code")


def _launch(node: Any, direction: str, kernels: list[str]) -> Launch | None:
    """Return what a node of Inductor's scheduler launches, if anything, by these kernels or by a call."""
    from torch._inductor.ir import UserDefinedTritonKernel

    moved = int(node.get_read_write_buffers_sizes())
    if kernels:
        # Inductor counts what a fold writes as read, too. A fold only writes it.
        written = node.node.mutable_args if isinstance(node.node, UserDefinedTritonKernel) else []
        moved -= sum(math.prod(map(int, box.get_size())) * box.get_dtype().itemsize for box in written)
        return Launch(direction, " + ".join(kernels), "fold" if written else "triton", len(kernels), moved)
    if not node.is_extern() or not moved:
        return None
    operator = getattr(node.node, "op_overload", None)
    name = str(operator or getattr(node.node, "python_kernel_name", None) or type(node.node).__name__)
    kind = "operator" if name.startswith("triton_convbn") else "convolution" if "convolution" in name else "other"
    return Launch(direction, name, kind, 1, moved)


def _library_results(graph: Any) -> dict[str, Any]:
    from torch._inductor.ir import MultiOutput

    def like(value: Any) -> Tensor:
        size, stride = ([int(each) for each in numbers] for numbers in (value.get_size(), value.get_stride()))
        return torch.empty_strided(size, stride, dtype=value.get_dtype(), device="meta")

    found: dict[str, Any] = {}
    for node in graph.operations:
        if isinstance(node, MultiOutput):
            name = node.input_name(0)
            if not node.indices:
                found[name] = like(node)
            for _, index in node.indices:
                found.setdefault(name, {})[index] = like(node)
        elif node.is_extern() and hasattr(node.get_output_spec(), "dtype"):
            found[node.get_name()] = like(node)
    return found
