"""Explain what happens to each BatchNorm of a model: the convolution that it is folded into, or why it is not."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm

from .capture import Namer, captured, without_compile
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
class UnmergedSum:
    """A sum of branches that stays a sum.

    Attributes:
        sum: The path of the module that adds the branches up, or the node's name.
        reason: The value of a `Reason`.
        why: The reason in words.
        detail: The path of the module that is the cause, or the node's name; empty if there is none.
    """

    sum: str
    reason: str
    why: str
    detail: str


@dataclass(frozen=True)
class Explanation:
    """Every BatchNorm call of a model, in the order of execution. Modules that no graph calls come last.

    Attributes:
        rows: One for each call of a BatchNorm that folds alone or stays, and for each sum that is one convolution.
        unmerged: The sums of branches that read one tensor and are not merged. Their BatchNorms are among the rows.
    """

    rows: tuple[Row, ...]
    unmerged: tuple[UnmergedSum, ...] = ()

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
        lines = [f"{row.batch_norm:{width}}  {_outcome(row)}" for row in self.rows]
        lines += [f"{each.sum}: the sum is not merged: {_because(each)}" for each in self.unmerged]
        return "\n".join([*lines, f"{self.folded} of {self.calls} fold"])


def _outcome(row: Row) -> str:
    """Return what happens to a BatchNorm, as part of a line."""
    folds = f"{'->' if row.detail == _FORWARD else '<-'} {row.conv}" + (f" ({row.detail})" if row.detail else "")
    kept = f", keeps {row.kept:,} bytes" if row.kept else ""
    return (f"declined: {_because(row)}" if row.reason else folds) + kept


def _because(declined: Row | UnmergedSum) -> str:
    return f"{declined.reason}: {declined.why}" + (f" ({declined.detail})" if declined.detail else "")


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
        findings, order = findings_of(model)
        return Explanation(tuple(_rows(findings, order, module_of)), tuple(_unmerged(findings, module_of)))
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: {type(model).__name__} is no module and no exported program")
    model = without_compile(model)
    rows: list[Row] = []
    unmerged: list[UnmergedSum] = []
    options = current_options()

    def visit(gm: fx.GraphModule) -> Callable[[Namer], None]:
        order = {node: index for index, node in enumerate(gm.graph.nodes)}
        findings = select(gm.graph, options)

        def report(name: Namer) -> None:
            rows.extend(_rows(findings, order, name))
            unmerged.extend(_unmerged(findings, name))

        return report

    captured(model, inputs, keywords, visit)
    seen = {name for row in rows for name in row.batch_norm.split(", ")}
    for path, module in model.named_modules():
        name = path or type(module).__name__
        if isinstance(module, _BatchNorm) and name not in seen:
            rows.append(Row(name, "", Reason.NOT_REACHED.value, Reason.NOT_REACHED.text, ""))
    return Explanation(tuple(rows), tuple(unmerged))


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


def _unmerged(findings: Findings, name: Namer) -> Iterator[UnmergedSum]:
    """Yield the sums that are not merged. Terms of several tensors, as in a residual block, are no sum of branches."""
    for decline in findings.sum_declines:
        if decline.reason is not Reason.OTHER_INPUT:
            cause = "" if decline.cause is None else name(decline.cause)
            yield UnmergedSum(name(decline.node), decline.reason.value, decline.reason.text, cause)
