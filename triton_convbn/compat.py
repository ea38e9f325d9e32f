"""Bridge the differences between torch 2.11 and 2.14.

Before 2.13 a hook of Inductor's configuration takes one pass, not a list, and does not tell it whether the graph is for
inference. 2.11 drops what it knows of shapes where it freezes, and may write to a part of a tensor before it writes the
tensor.
"""

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._guards import TracingContext
from torch._inductor.custom_graph_pass import CustomGraphPass

try:
    from torch._inductor.custom_graph_pass import CustomInferenceAwareGraphPass, get_custom_graph_passes

    def hook_value(passes: Sequence[Any]) -> Any:
        return list(passes) or None

except ImportError:
    CustomInferenceAwareGraphPass = CustomGraphPass  # type: ignore[misc,assignment]

    class _Sequence(CustomGraphPass):
        """Run several passes as one."""

        def __init__(self, passes: Sequence[Any]) -> None:
            self.passes = tuple(passes)

        def __call__(self, graph: fx.Graph) -> None:
            for each in self.passes:
                each(graph)

        def uuid(self) -> Any:
            found = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
            return None if None in found else tuple(found)

        def __deepcopy__(self, memo: dict[int, Any]) -> "_Sequence":
            return self

    def get_custom_graph_passes(custom_pass: Any) -> tuple[Any, ...]:  # type: ignore[misc]
        if custom_pass is None:
            return ()
        return custom_pass.passes if isinstance(custom_pass, _Sequence) else (custom_pass,)

    def hook_value(passes: Sequence[Any]) -> Any:
        return _Sequence(passes) if len(passes) > 1 else passes[0] if passes else None


WRITES_IN_ORDER = torch.__version__ >= "2.14"
"""Inductor writes to a part of a tensor after it has written the tensor. Not in 2.11; between them it was not tried.

2.11 fuses the write to the part with what it is computed from, and then forgets that it depends on the tensor.
"""


# ---- exceptions ----------------------------------------------------------------------------------------------------


@contextmanager
def errors_pass_dynamo(*kinds: type[Exception]) -> Iterator[None]:
    """Let errors of these classes reach the caller of a compiled function as they are.

    Dynamo turns an error of a backend into BackendCompilerFailed. It lets instances of its ShortenTraceback pass. So an
    error leaves this block as an instance of both classes, with the same message.
    """
    try:
        yield
    except kinds as error:
        from torch._dynamo.exc import ShortenTraceback

        if TracingContext.try_get() is None or isinstance(error, ShortenTraceback):
            raise
        kind = type(error)
        both = type(kind.__name__, (ShortenTraceback, kind), {"__module__": kind.__module__})
        raise both(*error.args, first_useful_frame=None) from None


# ---- freezing ------------------------------------------------------------------------------------------------------


@functools.cache
def keep_shapes_when_freezing() -> None:
    """Let Inductor leave a graph without Identity as it is.

    torch 2.11 builds it anew to remove Identity, without `example_value`. The input's rank is unknown then, nothing
    folds, and Inductor folds transposed convolutions along the wrong dimension. From 2.13 on it edits the graph.
    """
    if CustomInferenceAwareGraphPass is not CustomGraphPass:  # 2.13 or later
        return
    from torch._inductor.fx_passes import pre_grad

    remove = pre_grad.remove_identity

    def remove_identity(gm: fx.GraphModule) -> fx.GraphModule:
        return remove(gm) if any(isinstance(module, nn.Identity) for module in gm.modules()) else gm

    pre_grad.remove_identity = remove_identity


# ---- Triton kernels in Inductor's graph ----------------------------------------------------------------------------

_WRITES = "triton_convbn_writes"


def declare_writes(kernel: Any, names: Sequence[str]) -> None:
    """Declare which arguments a jitted kernel writes. It only reads the others.

    Inductor finds that out by compiling the kernel: 0.66 s for 16 pairs.
    """
    setattr(kernel, _WRITES, tuple(names))
    _trust_declared_writes()


@functools.cache
def _trust_declared_writes() -> None:
    """Put an answer for declared kernels in front of Inductor's analysis of Triton kernels."""
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    if hasattr(wrap, "identify_accessed_tensors"):
        analyse = wrap.identify_accessed_tensors

        def accessed(kernel: Any, kwargs: dict[str, Any], *more: Any) -> Any:
            writes = getattr(kernel, _WRITES, None)
            if writes is None:
                return analyse(kernel, kwargs, *more)
            from torch._inductor.dependencies import ReadWrites, StarDep
            from torch.utils._ordered_set import OrderedSet

            read, written = (
                OrderedSet[Any](StarDep(name) for name in kwargs if (name in writes) is wanted)
                for wanted in (False, True)
            )
            return wrap.TensorAccesses(ReadWrites(read, written, OrderedSet()), False)

        wrap.identify_accessed_tensors = accessed  # type: ignore[assignment]
    else:  # torch 2.11
        analyse = wrap.identify_mutated_tensors  # type: ignore[attr-defined]

        def mutated(kernel: Any, kwargs: dict[str, Any], *more: Any) -> Any:
            writes = getattr(kernel, _WRITES, None)
            return analyse(kernel, kwargs, *more) if writes is None else list(writes)

        wrap.identify_mutated_tensors = mutated  # type: ignore[attr-defined]


def add_triton_kernel(index: int, programs: int, arguments: dict[str, Any]) -> None:
    """Launch a kernel of Inductor's side table in the graph that is being lowered."""
    from torch._inductor.ir import UserDefinedTritonKernel

    more: dict[str, Any] = {"launch_kwargs": ()}
    if "launch_kwargs" not in inspect.signature(UserDefinedTritonKernel.__init__).parameters:  # torch 2.11
        more = {}
    UserDefinedTritonKernel(
        kernel_idx=index, grid=[(programs, 1, 1)], tma_descriptor_metadata={}, kernel_args=arguments, **more
    )


__all__ = [
    "WRITES_IN_ORDER",
    "CustomGraphPass",
    "CustomInferenceAwareGraphPass",
    "add_triton_kernel",
    "declare_writes",
    "errors_pass_dynamo",
    "get_custom_graph_passes",
    "hook_value",
    "keep_shapes_when_freezing",
]
