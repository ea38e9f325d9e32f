"""Inductor's generated code for a planned GPU, and its fold kernels run in Triton's interpreter."""

import importlib.util
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_convbn.perf import plan as planner
from triton_convbn.perf.planned_code import move_to_gpu
from triton_convbn.perf.planned_gpu import planned_h100

from triton_convbn.dispatch import planned_for
from triton_convbn.post_grad import lower_to_triton


class Stop(BaseException):
    """Ends Inductor where the code is there. No Exception: Inductor catches those."""

    def __init__(self, graph: GraphLowering, text: str) -> None:
        self.graph, self.text, self.kernels = graph, text, []


@contextmanager
def _stopping() -> Iterator[None]:
    def compile_to_module(self: GraphLowering) -> Any:
        code, _ = self.codegen()
        raise Stop(self, code.value)

    with mock.patch.object(GraphLowering, "compile_to_module", compile_to_module):
        yield


def of_model(model: torch.nn.Module, x: Tensor, provider: str = "triton_convbn", **keywords: Any) -> list[Stop]:
    """Return what Inductor generates for the model on a planned H100: forward and, with ``train=True``, backward.

    inductor: options of Inductor's; the others are those of `perf.plan.plan`.
    """
    found: list[Stop] = []
    options = keywords.pop("inductor", {})

    @contextmanager
    def keeping() -> Iterator[None]:
        try:
            with _stopping():
                yield
        except Stop as stop:
            found.append(stop)
            raise

    with (
        mock.patch.object(planner, "generating", keeping),
        mock.patch.object(planner, "Generated", Stop),
        config.patch(options),
    ):
        planner.plan(model, x, provider, **keywords)
    return found


def of_operator(target: Any, arguments: Sequence[Any]) -> str:
    """Return what Inductor generates for one call of an operator on a planned H100."""
    from torch._inductor.compile_fx import compile_fx_inner

    mode = FakeTensorMode()
    graph = fx.Graph()
    inputs: list[Tensor] = []

    def placeholder(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        inputs.append(mode.from_tensor(value))
        node = graph.placeholder(f"arg{len(inputs) - 1}")
        node.meta["val"] = inputs[-1]
        return node

    nodes = torch.utils._pytree.tree_map(placeholder, tuple(arguments), is_leaf=lambda v: isinstance(v, Tensor))
    call = graph.call_function(target, nodes)
    with mode:
        call.meta["val"] = target(*fx.map_arg(nodes, lambda node: node.meta["val"]))
    results = []
    for index, value in enumerate(call.meta["val"]):
        results.append(graph.call_function(operator.getitem, (call, index)))
        results[-1].meta["val"] = value
    graph.output(tuple(results))
    module = fx.GraphModule(torch.nn.Module(), graph)
    lower_to_triton.register()
    with planned_for("cuda"), config.patch(fx_graph_cache=False, compile_threads=1):
        moved = move_to_gpu(module, inputs)
        with planned_h100(), _stopping():
            try:
                compile_fx_inner(module, moved, cudagraphs=None)
            except Stop as stop:
                return stop.text
    raise AssertionError("Inductor did not come to an end")


_numbers = itertools.count()


def run(text: str, tensors: Sequence[Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Run generated code on CPU tensors, its Triton kernels in the interpreter; outputs are filled with NaN first."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def user_autotune(**_: Any) -> Callable[[Any], Any]:
        return _Kernel

    def triton(self: AsyncCompile, name: str, source: str, **_: Any) -> Any:
        return getattr(_module(source, folder), name)

    def empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype).fill_(torch.nan)

    with (
        mock.patch.object(triton_heuristics, "user_autotune", user_autotune),
        mock.patch.object(AsyncCompile, "triton", triton),
        mock.patch.object(torch.cuda, "_DeviceGuard", return_value=nullcontext()),
        mock.patch.object(torch.cuda, "set_device"),
    ):
        module = _module(text, folder)
        module.empty_strided_cuda = empty
        module.get_raw_stream = module.get_raw_cuda_stream = lambda index: 0
        return list(module.call(list(tensors)))


class _Kernel:
    """A kernel as generated code calls it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def run(self, *arguments: Any, stream: int) -> None:
        *tensors, x, y, z = arguments
        self.kernel[(x, y, z)](*tensors)


def _module(text: str, folder: Path) -> ModuleType:
    path = folder / f"generated_{next(_numbers)}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
