"""Generate code with Inductor for a pretended GPU, and run its fold kernels in Triton's interpreter."""

import importlib.util
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime import triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_convbn.perf.plan.code import Generated, generate
from triton_convbn.perf.plan.planner import plan

from triton_convbn.dispatch import planned_for
from triton_convbn.post_grad import lower_merge, lower_to_triton


def of_model(model: torch.nn.Module, x: Tensor, provider: str = "triton_convbn", **keywords: Any) -> list[Generated]:
    """Return what Inductor generates for the model on a pretended H100: forward and, with ``train=True``, backward.

    inductor: Options of Inductor. The other keywords are those of `plan`.
    """
    with config.patch(keywords.pop("inductor", {})):
        return plan(model, x, provider, **keywords).generated


def of_operator(
    target: Any,
    arguments: Sequence[Any],
    read: Sequence[int] | None = None,
    views: Mapping[int, tuple[Any, ...]] | None = None,
) -> str:
    """Return what Inductor generates for one call of an operator on a pretended H100.

    Args:
        read: Positions of the results that the graph returns; by default all.
        views: By position among the tensors, an operator and its further arguments. Its result is passed instead.
    """
    mode = FakeTensorMode()
    graph = fx.Graph()
    inputs: list[Tensor] = []

    def placeholder(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        inputs.append(mode.from_tensor(value))
        node = graph.placeholder(f"arg{len(inputs) - 1}")
        node.meta["val"] = inputs[-1]
        if views and len(inputs) - 1 in views:
            function, *more = views[len(inputs) - 1]
            node = graph.call_function(function, (node, *more))
            with mode:
                node.meta["val"] = function(inputs[-1], *more)
        return node

    nodes = torch.utils._pytree.tree_map(placeholder, tuple(arguments), is_leaf=lambda v: isinstance(v, Tensor))
    call = graph.call_function(target, nodes)
    with mode:
        call.meta["val"] = target(*fx.map_arg(nodes, lambda node: node.meta["val"]))
    results = []
    for index in range(len(call.meta["val"])) if read is None else read:
        value = call.meta["val"][index]
        results.append(graph.call_function(operator.getitem, (call, index)))
        results[-1].meta["val"] = value
    graph.output(tuple(results))
    module = fx.GraphModule(torch.nn.Module(), graph)
    lower_to_triton.register()
    lower_merge.register()
    with planned_for("cuda"), config.patch(fx_graph_cache=False, compile_threads=1):
        return generate(module, inputs).text


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
