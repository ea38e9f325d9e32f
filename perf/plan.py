"""What Inductor would launch on an H100 and how many bytes that moves, read off its generated code. Nothing is run.

The model is traced on the CPU with fake tensors, differentiated and partitioned as always. What is different begins
where Inductor is given a partitioned graph: its fake tensors are moved to an H100 that is not there, Inductor lowers
the graph and generates the code, and that is where it ends. So every figure is *planned*: launches are calls in the
generated code, bytes are what Inductor's scheduler counts for each of them (every buffer read or written once).

There are two counts. ``gpu`` is what would be launched. ``traced`` leaves out two things that are different on a GPU,
as the first figures of this project did, which its targets are stated in: the gradients of biases stay in the
convolutions' backward, where a trace on the CPU has them, instead of being sums of their own; and backward is traced
with the strides that the model's operators return, not with those that Inductor gives their results in forward.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import decomposition
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_convbn import ConvBNPass
from triton_convbn.dispatch import planned_for
from triton_convbn.post_grad.manager import PostGradPass

from .planned_code import DEVICE, Generated, Kernel, generating, launches_of, move_to_gpu, report_strides
from .planned_gpu import check, planned_h100
from .planned_wrapper import Wrapper, wrapper_of


def _ours(**options: Any) -> dict[str, Any]:
    passes = {"pre_grad_custom_pass": ConvBNPass(**options), "post_grad_custom_post_pass": PostGradPass()}
    return passes | {"efficient_conv_bn_eval_fx_passes": False}


Count = Literal["gpu", "traced"]
COUNTS: tuple[Count, ...] = ("gpu", "traced")
"""What is counted, see above."""

_UPSTREAM = {"efficient_conv_bn_eval_fx_passes": True}
PROVIDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "inductor": dict,
    "inductor_efficient_conv_bn": lambda: _UPSTREAM,
    "inductor_efficient_conv_bn_combo": lambda: _UPSTREAM | {"combo_kernels": True},
    "triton_convbn": _ours,
    "triton_convbn_always": lambda: _ours(when="always"),
    "triton_convbn_keep": lambda: _ours(recompute=False),
}
"""Inductor's configuration for each."""


@dataclass
class Plan:
    """What one provider's compiled model would do, forward and backward (empty for inference)."""

    provider: str
    count: Count = "gpu"
    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)
    saved: dict[str, int] = field(default_factory=dict)
    """The bytes of each buffer that is kept for backward; parameters and buffers of the model are not."""
    wrappers: list[Wrapper] = field(default_factory=list)
    """The generated code, forward first, for `host_time`."""

    def figures(self) -> dict[str, int]:
        """The metrics. Launches are Triton kernels and folds; convolutions and matmuls are counted apart."""
        return {
            "launches_forward": launches_of(self.forward, "triton", "fold"),
            "launches_backward": launches_of(self.backward, "triton", "fold"),
            "folds_forward": launches_of(self.forward, "fold"),
            "folds_backward": launches_of(self.backward, "fold"),
            "operator_calls": sum(kernel.is_operator for kernel in (*self.forward, *self.backward)),
            "convolutions": launches_of([*self.forward, *self.backward], "convolution"),
            "other_calls": launches_of([*self.forward, *self.backward], "other"),
            "bytes_forward": sum(kernel.bytes for kernel in self.forward),
            "bytes_backward": sum(kernel.bytes for kernel in self.backward),
            "saved_for_backward": sum(self.saved.values()),
        }


def plan(
    model: nn.Module,
    x: Tensor,
    provider: str,
    train: bool = False,
    autocast: torch.dtype | None = None,
    count: Count = "gpu",
) -> Plan:
    """Plan a forward of the model, with ``train`` a backward too, for the parameters that require gradients.

    Args: the model in eval mode, one input, a key of PROVIDERS. Neither is changed or run; only shapes, strides, dtypes
        and requires_grad matter. count: one of COUNTS, see above.
    Raises: UsageError, where torch or triton is not suitable.
    """
    check()
    found = Plan(provider, count)
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
        stack.enter_context(planned_for(DEVICE.type))
        # Of the decompositions that ask for the device one matters here: on a GPU the gradient of a convolution's bias
        # is a sum of its own, on the CPU a part of the convolution's backward.
        if count == "gpu":
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
        moved = move_to_gpu(gm, inputs)
        if backward:
            self._count_saved({name for name in names if not name.startswith("tangents")})
        try:
            with planned_h100(), generating():
                compile_fx_inner(gm, moved, **options | {"cudagraphs": None})
        except Generated as generated:
            (self.plan.backward if backward else self.plan.forward).extend(generated.kernels)
            self.plan.wrappers.append(wrapper_of(generated.graph, generated.text))
            if not backward:
                self.forward = gm, generated.graph
                if self.plan.count == "gpu":
                    report_strides(generated.graph)
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
