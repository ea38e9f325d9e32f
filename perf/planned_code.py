"""What Inductor generates for a partitioned graph on a GPU that is not there, kernel by kernel. See `plan`."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Kernel:
    """One step of the generated code.

    kind: triton, fold, convolution, or other (a matmul, say). launches: usually 1; combo kernels can be several. bytes:
    what it reads and writes.
    """

    name: str
    kind: str
    launches: int
    bytes: int

    @property
    def is_operator(self) -> bool:
        """Return whether it is a call of an operator of this package, which is Python."""
        return self.name.startswith("triton_convbn")


def launches_of(kernels: Sequence[Kernel], *kinds: str) -> int:
    return sum(kernel.launches for kernel in kernels if kernel.kind in kinds)


class Generated(BaseException):
    """Carries the graph whose code has been generated out of Inductor. No Exception: Inductor catches those."""

    def __init__(self, graph: Any, kernels: list[Kernel], text: str) -> None:
        self.graph, self.kernels, self.text = graph, kernels, text


def move_to_gpu(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Move the graph's fake tensors to the planned device, in place; returns the inputs, moved.

    Views of one storage stay views of one storage, for Inductor asks what aliases what.
    """
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # by id; with the original, so that no id is used again

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
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(move, node.meta["val"])
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each)  # a copy of its own
        node.args, node.kwargs = pytree.tree_map(move, (node.args, node.kwargs))
    gm.recompile()
    return [pytree.tree_map(move, each) for each in inputs]


def report_strides(graph: Any) -> None:
    """Tell AOTAutograd the strides of what the forward returns, as Inductor does: backward is given those."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None or context.output_strides is None:
        return
    for output in graph.graph_outputs:
        known = getattr(output, "has_tensor_output", bool)()
        context.output_strides.append(tuple(map(int, output.get_stride())) if known else None)


@contextmanager
def generating() -> Iterator[None]:
    """Let Inductor end with the generated code, and raise `Generated` there."""
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.graph import GraphLowering

    calls: list[tuple[Any, str]] = []
    call = PythonWrapperCodegen.generate_kernel_call

    def generate_kernel_call(self: Any, kernel_name: str, *arguments: Any, **keywords: Any) -> Any:
        from torch._inductor.virtualized import V

        calls.append((V.graph.scheduler.current_node, kernel_name))
        return call(self, kernel_name, *arguments, **keywords)

    def compile_to_module(self: Any) -> Any:
        code, _ = self.codegen()
        kernels = [kernel for node in self.scheduler.nodes if (kernel := _kernel(node, calls)) is not None]
        launches, text = launches_of([each for each in kernels if not each.is_operator], "triton", "fold"), code.value
        if launches != len(calls) or launches != text.count(".run("):
            raise RuntimeError(f"{text.count('.run(')} calls in the generated code, {launches} found in its plan")
        raise Generated(self, kernels, text)

    with (
        mock.patch.object(PythonWrapperCodegen, "generate_kernel_call", generate_kernel_call),
        mock.patch.object(GraphLowering, "compile_to_module", compile_to_module),
    ):
        yield


def _kernel(node: Any, calls: list[tuple[Any, str]]) -> Kernel | None:
    """What a node of the scheduler became; None, where nothing is launched for it."""
    from torch._inductor.ir import UserDefinedTritonKernel

    moved = int(node.get_read_write_buffers_sizes())
    names = [name for of, name in calls if of is node]
    if names and isinstance(node.node, UserDefinedTritonKernel):
        # Inductor takes what such a kernel writes for read as well. A fold only writes it.
        written = sum(math.prod(map(int, box.get_size())) * box.get_dtype().itemsize for box in node.node.mutable_args)
        return Kernel(" + ".join(names), "fold", len(names), moved - written)
    if names:
        return Kernel(" + ".join(names), "triton", len(names), moved)
    if not node.is_extern() or not moved:
        return None
    operator = getattr(node.node, "op_overload", None)
    name = str(operator or getattr(node.node, "python_kernel_name", None) or type(node.node).__name__)
    kind = "fold" if name.startswith("triton_convbn") else "convolution" if "convolution" in name else "other"
    return Kernel(name, kind, 1, moved)
