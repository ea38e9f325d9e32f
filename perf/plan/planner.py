"""Plan what Inductor would launch on an H100 and how many bytes that moves. Nothing runs.

The model is traced on the CPU with fake tensors, differentiated and partitioned as usual. Then the fake tensors of each
partitioned graph move to a pretended H100, and Inductor lowers the graph and generates code. Launches are calls in
that code. Bytes are what Inductor's scheduler counts for each call: every buffer read or written once.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor import decomposition
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_convbn import ConvBNPass
from triton_convbn.dispatch import planned_for
from triton_convbn.post_grad.manager import PostGradPass

from ..providers import PROVIDERS, Compiled
from .code import DEVICE, Generated, Launch, generate
from .h100 import check

CALLS = {"operator": "operator_calls", "convolution": "convolutions", "other": "other_calls"}
METRICS = (
    *("launches_forward", "launches_backward", "folds_forward", "folds_backward"),
    *(*CALLS.values(), "bytes_forward", "bytes_backward"),
)


@dataclass
class Plan:
    """What one provider's compiled model would do.

    Attributes:
        generated: The code of each graph, forward before backward.
        saved: The bytes kept for backward, without the model's parameters and buffers.
    """

    provider: str
    generated: list[Generated] = field(default_factory=list)
    saved: int = 0

    @property
    def launches(self) -> list[Launch]:
        return [launch for each in self.generated for launch in each.launches]

    def figures(self) -> dict[str, int]:
        """Return the metrics by name. Launches are Triton kernels and folds, without convolutions and matmuls."""
        count: Counter[str] = Counter()
        for each in self.launches:
            count[CALLS.get(each.kind, each.kind)] += each.launches
            count[f"bytes_{each.direction}"] += each.bytes
            if each.kind in ("fold", "operator"):
                count[f"folds_{each.direction}"] += each.launches
            if each.kind in ("fold", "operator", "triton"):
                count[f"launches_{each.direction}"] += each.launches
        return {metric: count[metric] for metric in METRICS} | {"saved_for_backward": self.saved}


def plan(
    model: nn.Module,
    x: Tensor,
    provider: str,
    train: bool = False,
    autocast: torch.dtype | None = None,
) -> Plan:
    """Plan a forward of the model and, with ``train``, a backward for the parameters that require gradients.

    Args:
        model: In eval mode. It is neither changed nor run: only shapes, strides, dtypes and requires_grad matter.
        x: Its input.
        provider: A name in `cli.Provider`.

    Raises:
        UsageError: If torch or triton is not suitable.
    """
    check()
    found = Plan(provider)
    mode = FakeTensorMode()
    fakes = {id(tensor): mode.from_tensor(tensor) for tensor in (*model.parameters(), *model.buffers())}
    own = set(map(id, fakes.values()))
    fake = copy.deepcopy(model, dict(fakes))  # deepcopy takes the tensors from its memo

    def backend(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        static = {f"primals_{index}" for index, tensor in enumerate(inputs, 1) if id(tensor) in own}

        def inner_compile(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
            generated = generate(gm, inputs, **options)
            if generated.graph.is_backward:
                found.saved += _saved(found.generated[-1].graph, generated.graph, static)
            elif (context := TracingContext.try_get()) and context.output_strides is not None:
                # As Inductor does, because backward is traced with the strides of the forward's outputs.
                for output in generated.graph.graph_outputs:
                    known = getattr(output, "has_tensor_output", bool)()
                    context.output_strides.append(tuple(map(int, output.get_stride())) if known else None)
            found.generated.append(generated)
            return gm.forward

        # The passes edit the graph in place, and Dynamo still needs the graph that it has captured.
        compile_fx(copy.deepcopy(gm), inputs, inner_compile=inner_compile, config_patches=patches)  # type: ignore[arg-type]
        return gm.forward

    chosen = PROVIDERS[provider.removesuffix("_combo")]
    assert isinstance(chosen, Compiled)
    patches: dict[str, Any] = {"combo_kernels": provider.endswith("_combo")}
    if chosen.backend == "triton_convbn":
        patches |= {"pre_grad_custom_pass": ConvBNPass(**chosen.options), "post_grad_custom_post_pass": PostGradPass()}
    else:
        patches |= chosen.options
    with ExitStack() as stack:
        stack.enter_context(inductor_config.patch({"fx_graph_cache": False, "compile_threads": 1}))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True))
        stack.enter_context(planned_for(DEVICE.type))
        # On a GPU the gradient of a convolution's bias is decomposed into a sum of its own.
        stack.enter_context(mock.patch.object(decomposition, "is_gpu", return_value=True))
        stack.enter_context(torch.set_grad_enabled(train))
        stack.enter_context(torch.autocast("cpu", autocast, enabled=autocast is not None))
        stack.callback(torch._dynamo.reset)
        torch._dynamo.reset()
        with mode:
            torch.compile(fake, backend=backend)(mode.from_tensor(x))
    return found


def _saved(forward: Any, backward: Any, static: set[str]) -> int:
    """Return the bytes of the buffers that forward returns and backward reads, except the inputs in ``static``.

    They are the last that forward returns. Their names may differ: a pass after autograd has replaced a convolution.
    """
    count = sum(not name.startswith("tangents") for name in backward.graph_input_names)
    saved = forward.graph_outputs[len(forward.graph_outputs) - count :]
    names = {value.get_name() for value in saved if hasattr(value, "get_name")}
    buffers = [forward.get_buffer(name) for name in names - static]
    return sum(int(each.get_layout().storage_size()) * each.get_dtype().itemsize for each in buffers)
