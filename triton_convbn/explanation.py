"""Explain what happens to each BatchNorm of a model: the convolution that it is folded into, or why it is not."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from .export import findings_of, module_of
from .graph.calls import requires_grad, tensor_of
from .graph.findings import Findings, norms_of
from .graph.profitability import select
from .graph.reasons import Reason
from .inductor import current_options

if TYPE_CHECKING:
    import pandas


_FORWARD = "folds forward into the layer after it"


@dataclass(frozen=True)
class Row:
    """One call of a BatchNorm, or a sum of branches that is one convolution.

    Attributes:
        batch_norm: The module's path. For a sum, the paths of all its BatchNorms; the sum's own name if it has none.
        conv: The convolution's path; empty if declined. For a sum or a concatenation, the paths of all convolutions.
        reason: The value of a `Reason`; empty if folded.
        why: The reason in words.
        detail: The node that is the cause, if there is one. For a sum, how many branches it has. For a BatchNorm that
            folds into the convolution after it, that it does so.
        kept: The bytes that backward keeps of the layer if it could fold: those of its output. 0 in inference.
        folded: The number of BatchNorms that fold.
    """

    batch_norm: str
    conv: str
    reason: str
    why: str
    detail: str
    kept: int = 0
    folded: int = 0


@dataclass(frozen=True)
class Explanation:
    """Every BatchNorm call of a model, in the order of execution. Modules that no graph calls come last."""

    rows: tuple[Row, ...]

    @property
    def folded(self) -> int:
        """Return the number of BatchNorm calls that fold."""
        return sum(row.folded for row in self.rows)

    @property
    def calls(self) -> int:
        """Return the number of BatchNorm calls."""
        return sum(row.folded or 1 for row in self.rows if row.folded or row.reason)

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row per BatchNorm call, with the columns batch_norm, conv, reason, why, detail and kept."""
        import pandas

        columns = [name for name in Row.__dataclass_fields__ if name != "folded"]
        return pandas.DataFrame([asdict(row) for row in self.rows], columns=columns)

    def __str__(self) -> str:
        width = max([len(row.batch_norm) for row in self.rows], default=0)
        lines = [
            f"{row.batch_norm:{width}}  "
            + (
                f"declined: {row.reason}: {row.why}"
                if row.reason
                else f"{'->' if row.detail == _FORWARD else '<-'} {row.conv}"
            )
            + (f" ({row.detail})" if row.detail and not row.reason else "")
            + (f", keeps {row.kept:,} bytes" if row.kept else "")
            for row in self.rows
        ]
        return "\n".join([*lines, f"{self.folded} of {self.calls} fold"])


def explain(model: nn.Module | ExportedProgram, *inputs: Any, **keywords: Any) -> Explanation:
    """Run a copy of the model once under Dynamo, and report what the pass does with each BatchNorm.

    Call ``model.eval()`` first: a BatchNorm in training mode does not fold. Under ``torch.no_grad()`` the report is
    about inference. The options are those of `patch`, or the defaults. Resets Dynamo, like `torch._dynamo.explain`, so
    compiled models compile again.

    Args:
        model: A module, or an exported program. The report of a program is about `fold_exported`.
        inputs, keywords: The arguments of the model's forward. A program needs none.

    Raises:
        TypeError: the model is neither.
        ValueError: the model has lazy modules without shapes.
    """
    if isinstance(model, ExportedProgram):
        return Explanation(tuple(_rows(*findings_of(model), module_of)))
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: {type(model).__name__} is no module and no exported program")
    model = _without_compile(model)
    rows: list[Row] = []
    options = current_options()

    def visit(gm: fx.GraphModule) -> Callable[[Namer], None]:
        order = {node: index for index, node in enumerate(gm.graph.nodes)}
        findings = select(gm.graph, options)
        return lambda name: rows.extend(_rows(findings, order, name))

    captured(model, inputs, keywords, visit)
    seen = {name for row in rows for name in row.batch_norm.split(", ")}
    for path, module in model.named_modules():
        name = path or type(module).__name__
        if isinstance(module, _BatchNorm) and name not in seen:
            rows.append(Row(name, "", Reason.NOT_REACHED.value, Reason.NOT_REACHED.text, ""))
    return Explanation(tuple(rows))


Namer = Callable[[fx.Node], str]


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
    with _unchanged(_without_compile(model)) as model:
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


def _without_compile(model: nn.Module) -> nn.Module:
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


def _rows(findings: Findings, order: Mapping[fx.Node, int], name: Namer) -> list[Row]:
    rows: list[tuple[fx.Node, Row]] = []

    def kept(output: fx.Node) -> int:
        example = tensor_of(output, output.graph)
        known = example is not None and requires_grad(example) and all(isinstance(size, int) for size in example.shape)
        return example.nbytes if example is not None and known else 0

    for pairs in findings.folded().values():
        convs = ", ".join(name(pair.conv.node) for pair in pairs)
        for bn in norms_of(pairs):
            size = 0 if any(bn is each.bn for pair in pairs for each in pair.inner) else kept(bn.output)
            rows.append((bn.node, Row(name(bn.node), convs, "", "", "", size, 1)))
    for branch in findings.sums:
        norms = ", ".join(name(bn.node) for bn in branch.norms) or branch.node.name
        convs = ", ".join(name(conv.node) for conv, _ in branch.convs)
        detail = f"{branch.terms} branches become one convolution"
        rows.append((branch.node, Row(norms, convs, "", "", detail, kept(branch.node), len(branch.norms))))
    for norm in findings.input_norms:
        size = kept(norm.bn.input)
        rows.append((norm.bn.node, Row(name(norm.bn.node), name(norm.conv.node), "", "", _FORWARD, size, 1)))
    for decline in findings.declines:
        reason = decline.reason
        size = kept(decline.bn.output) if reason is Reason.DOES_NOT_PAY else 0
        rows.append((decline.bn.node, Row(name(decline.bn.node), "", reason.value, reason.text, decline.detail, size)))
    return [row for _, row in sorted(rows, key=lambda each: order.get(each[0], len(order)))]


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
