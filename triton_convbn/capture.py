"""Run a model once under Dynamo, and look at each graph that it captures, without changing the model."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

Namer = Callable[[fx.Node], str]
"""Return the path of the module that a call is written in, or the node's name."""


def captured(
    model: nn.Module,
    inputs: Sequence[Any],
    keywords: Mapping[str, Any],
    visit: Callable[[fx.GraphModule], Callable[[Namer], None]],
) -> None:
    """Run the model once. Call `visit` with each graph that Dynamo captures, and what it returns at each run.

    Graphs inside a graph, those of checkpoints and branches, count as run with it. The result is called with a function
    that names the module of a node. Modules that look alike share a graph, which runs once for each of them. A copy of
    the model runs. If the model cannot be copied, it runs itself, and its tensors and attributes are restored, but not
    the contents of a list. Resets Dynamo.
    """
    with _unchanged(without_compile(model)) as model:
        modules = {name or type(model).__name__: module for name, module in model.named_modules()}
        names = {id(module): name for name, module in modules.items()}
        owners: dict[int, list[str]] = {}
        for name, module in modules.items():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                owners.setdefault(id(tensor), []).append(name)

        def backend(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
            placeholders = gm.graph.find_nodes(op="placeholder")
            reports = [visit(module) for module in gm.modules() if isinstance(module, fx.GraphModule)]

            def run(*arguments: Any) -> Any:
                given = {node: owners.get(id(value), []) for node, value in zip(placeholders, arguments, strict=True)}
                for report in reports:
                    report(lambda node: _name(node, names, given))
                return gm.forward(*arguments)

            return run

        torch._dynamo.reset()
        try:
            with torch.random.fork_rng():
                torch.compile(model, backend=backend)(*inputs, **keywords)
        finally:
            torch._dynamo.reset()


def without_compile(model: nn.Module) -> nn.Module:
    """Return the module inside a ``torch.compile`` wrapper, whose backend would run otherwise, or the model."""
    from torch._dynamo.eval_frame import OptimizedModule

    return model._orig_mod if isinstance(model, OptimizedModule) else model


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy of the model. If it cannot be copied, yield the model, and restore its tensors and attributes."""
    try:
        copied = copy.deepcopy(model)
    except Exception:  # torch.nn.utils.weight_norm, a result of a forward that the model keeps, a lock
        if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
            raise ValueError("the model has lazy modules without shapes: call it once before you explain it") from None
        copied = None
    if copied is not None:
        yield copied
        return
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    # A module has its tensors, modules and hooks in tables of its own. Those of a scripted one are not Python's.
    owned = [vars(module) for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    owned += [each for own in owned for each in own.values() if isinstance(each, dict)]
    before = [dict(each) for each in owned]
    try:
        yield model
    finally:
        for each, own in zip(owned, before, strict=True):
            each.clear()
            each.update(own)
        with torch.inference_mode():  # some may have been made in it
            for tensor, value in zip(tensors, values, strict=True):
                if tensor.layout is not torch.strided or not torch.equal(tensor, value):
                    tensor.copy_(value)


def _name(node: fx.Node, names: Mapping[int, str], given: Mapping[fx.Node, Sequence[str]]) -> str:
    """Return the name of the module that a call is written in, or of the node if there is no such module.

    Dynamo keys its module stack by the id of the module, with a suffix if the module is called again. Modules that
    share a graph have the stack of the first. The tensors that the graph is called with tell which module it runs for.
    """
    stack = [
        int(number) for key in node.meta.get("nn_module_stack") or {} if (number := str(key).split("@")[0]).isdigit()
    ]
    captured = next((names[number] for number in reversed(stack) if number in names), None)
    for each in node.all_input_nodes:
        own = given.get(each, ())
        if own and captured not in own:
            return own[0]
        if own:
            break
    return captured or node.name
