"""What Inductor would launch on an H100 and how many bytes that moves, read off its generated code. Nothing is run.

The model is traced on the CPU with fake tensors, differentiated and partitioned as always. What is different begins
where Inductor is given a partitioned graph: its fake tensors are moved to an H100 that is not there, Inductor lowers
the graph and generates the code, and that is where it ends. So every figure is *planned*: launches are calls in the
generated code, bytes are what Inductor's scheduler counts for each of them (every buffer read or written once).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import decomposition
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from triton_convbn import ConvBNPass
from triton_convbn.kernel_choice import planned_for
from triton_convbn.layout_pass import FoldLayoutPass

from .planned_gpu import check, planned_h100

_DEVICE = torch.device("cuda", 0)


def _ours(**options: Any) -> dict[str, Any]:
    passes = {"pre_grad_custom_pass": [ConvBNPass(**options)], "post_grad_custom_post_pass": [FoldLayoutPass()]}
    return passes | {"efficient_conv_bn_eval_fx_passes": False}


_UPSTREAM = {"efficient_conv_bn_eval_fx_passes": True}
PROVIDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "inductor": dict,
    "inductor_efficient_conv_bn": lambda: _UPSTREAM,
    "inductor_efficient_conv_bn_combo": lambda: _UPSTREAM | {"combo_kernels": True},
    "triton_convbn": _ours,
    "triton_convbn_no_recompute": lambda: _ours(recompute=False),
}
"""Inductor's configuration for each."""


@dataclass(frozen=True)
class Kernel:
    """One step of the generated code. kind: triton, fold, convolution, or other (a matmul, say). launches: usually 1;
    combo kernels can be several. bytes: what it reads and writes."""

    name: str
    kind: str
    launches: int
    bytes: int


@dataclass
class Plan:
    """What one provider's compiled model would do, forward and backward (empty for inference)."""

    provider: str
    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)
    saved: dict[str, int] = field(default_factory=dict)
    """The bytes of each buffer that is kept for backward; parameters and buffers of the model are not."""

    def figures(self) -> dict[str, int]:
        """The metrics. Launches are Triton kernels and folds; convolutions and matmuls are counted apart."""
        return {
            "launches_forward": _launches(self.forward, "triton", "fold"),
            "launches_backward": _launches(self.backward, "triton", "fold"),
            "folds_forward": _launches(self.forward, "fold"),
            "folds_backward": _launches(self.backward, "fold"),
            "convolutions": _launches([*self.forward, *self.backward], "convolution"),
            "other_calls": _launches([*self.forward, *self.backward], "other"),
            "bytes_forward": sum(kernel.bytes for kernel in self.forward),
            "bytes_backward": sum(kernel.bytes for kernel in self.backward),
            "saved_for_backward": sum(self.saved.values()),
        }


def _launches(kernels: Sequence[Kernel], *kinds: str) -> int:
    return sum(kernel.launches for kernel in kernels if kernel.kind in kinds)


def plan(model: nn.Module, x: Tensor, provider: str, train: bool = False, autocast: torch.dtype | None = None) -> Plan:
    """Plan a forward of the model, with ``train`` a backward too, for the parameters that require gradients.

    Args: the model in eval mode, one input, a key of PROVIDERS. Neither is changed or run; only shapes, strides, dtypes
        and requires_grad matter.
    Raises: UsageError, where torch or triton is not suitable.
    """
    check()
    found = Plan(provider)
    mode = FakeTensorMode()
    fake, example = _faked(model, x, mode)
    kept = {id(tensor) for tensor in (*fake.parameters(), *fake.buffers())}

    def backend(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        # The passes edit the graph in place, and Dynamo goes on with what it has captured.
        own = [id(tensor) in kept for tensor in inputs]
        recorder = _Recorder(found, own)
        patches = PROVIDERS[provider]()
        compile_fx(copy.deepcopy(gm), inputs, inner_compile=recorder, config_patches=patches)  # type: ignore[arg-type]
        return gm.forward

    quiet = {"fx_graph_cache": False, "compile_threads": 1, "pre_grad_custom_pass": None}
    with ExitStack() as stack:
        stack.enter_context(inductor_config.patch(quiet | {"post_grad_custom_post_pass": None}))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True))
        stack.enter_context(planned_for(_DEVICE.type))
        # Of the decompositions that ask for the device one matters here: on a GPU the gradient of a convolution's bias
        # is a sum of its own, on the CPU a part of the convolution's backward.
        stack.enter_context(mock.patch.object(decomposition, "is_gpu", return_value=True))
        stack.enter_context(torch.set_grad_enabled(train))
        stack.enter_context(torch.autocast("cpu", autocast, enabled=autocast is not None))
        stack.callback(torch._dynamo.reset)
        torch._dynamo.reset()
        with mode:
            torch.compile(fake, backend=backend)(example)
    return found


def _faked(model: nn.Module, x: Tensor, mode: FakeTensorMode) -> tuple[nn.Module, Tensor]:
    """The model and its input with fake tensors, which need no memory and compute nothing."""

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    tensors = {id(tensor): fake(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors), fake(x)  # deepcopy takes from its memo what is there already


class _Generated(BaseException):
    """Carries the graph whose code has been generated out of Inductor. No Exception: Inductor catches those."""

    def __init__(self, graph: Any, kernels: list[Kernel]) -> None:
        self.graph, self.kernels = graph, kernels


class _Recorder:
    """In the place of Inductor's `compile_fx_inner`, which takes a partitioned graph.

    own: which inputs of the graph before autograd are parameters or buffers of the model.
    """

    def __init__(self, plan: Plan, own: Sequence[bool]) -> None:
        self.plan = plan
        self.forward: Any = None
        self.own = frozenset(f"primals_{index}" for index, mine in enumerate(own, 1) if mine)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx_inner

        backward = bool(options.get("is_backward"))
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        moved = _move(gm, inputs)
        if backward:
            self._count_saved({name for name in names if not name.startswith("tangents")})
        try:
            with planned_h100(), _generating():
                compile_fx_inner(gm, moved, **options | {"cudagraphs": None})
        except _Generated as generated:
            (self.plan.backward if backward else self.plan.forward).extend(generated.kernels)
            if not backward:
                self.forward = gm, generated.graph
                _report_strides(generated.graph)
        return _not_run

    def _count_saved(self, wanted: set[str]) -> None:
        """The buffers behind those outputs of the forward graph that the backward graph takes in."""
        gm, graph = self.forward
        (outputs,) = gm.graph.output_node().args
        for node, value in zip(outputs, graph.graph_outputs, strict=True):
            if not isinstance(node, fx.Node) or node.name not in wanted or not hasattr(value, "get_name"):
                continue
            name = value.get_name()
            if name not in self.own:
                buffer = graph.get_buffer(name)
                self.plan.saved[name] = int(buffer.get_layout().storage_size()) * buffer.get_dtype().itemsize


def _not_run(*_arguments: Any) -> Any:
    raise RuntimeError("a plan cannot be run")


def _move(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Move the graph's fake tensors to the planned device, in place; returns the inputs, moved.

    Views of one storage stay views of one storage, for Inductor asks what aliases what.
    """
    moved: dict[int, tuple[Tensor, Tensor]] = {}  # by id; with the original, so that no id is used again

    def move(value: Any) -> Any:
        if isinstance(value, torch.device):
            return _DEVICE if value.type == "cpu" else value
        if not isinstance(value, FakeTensor) or value.device.type != "cpu":
            return value
        if id(value) not in moved:
            with in_kernel_invocation_manager(value.fake_mode):
                moved[id(value)] = FakeTensor(value.fake_mode, value, _DEVICE), value
        return moved[id(value)][0]

    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(move, node.meta["val"])
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each)  # a copy of its own
        node.args, node.kwargs = pytree.tree_map(move, (node.args, node.kwargs))
    gm.recompile()
    return [pytree.tree_map(move, each) for each in inputs]


def _report_strides(graph: Any) -> None:
    """Tell AOTAutograd the strides of what the forward returns, as Inductor does: backward is given those."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None or context.output_strides is None:
        return
    for output in graph.graph_outputs:
        known = getattr(output, "has_tensor_output", bool)()
        context.output_strides.append(tuple(map(int, output.get_stride())) if known else None)


@contextmanager
def _generating() -> Iterator[None]:
    """Let Inductor end with the generated code, and raise `_Generated` there."""
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
        launches, text = _launches(kernels, "triton"), code.value
        if launches != len(calls) or launches != text.count(".run("):
            raise RuntimeError(f"{text.count('.run(')} calls in the generated code, {launches} found in its plan")
        raise _Generated(self, kernels)

    with (
        mock.patch.object(PythonWrapperCodegen, "generate_kernel_call", generate_kernel_call),
        mock.patch.object(GraphLowering, "compile_to_module", compile_to_module),
    ):
        yield


def _kernel(node: Any, calls: list[tuple[Any, str]]) -> Kernel | None:
    """What a node of the scheduler became; None, where nothing is launched for it."""
    moved = int(node.get_read_write_buffers_sizes())
    names = [name for of, name in calls if of is node]
    if names:
        return Kernel(" + ".join(names), "triton", len(names), moved)
    if not node.is_extern() or not moved:
        return None
    operator = getattr(node.node, "op_overload", None)
    name = str(operator or getattr(node.node, "python_kernel_name", None) or type(node.node).__name__)
    kind = "fold" if name.startswith("triton_convbn") else "convolution" if "convolution" in name else "other"
    return Kernel(name, kind, 1, moved)
