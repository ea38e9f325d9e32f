"""Find sums of branches that read one tensor. One convolution replaces each of them.

Example: ``bn1(conv3x3(x)) + bn2(conv1x1(x)) + bn3(x)`` is one `Branch` with two convolutions, three BatchNorms and the
input x. `merge_sums` builds a branch for each node that is linear in some tensor, from the branches of its operands:
a convolution, a BatchNorm of a branch or of the input, a sum or difference, and a branch times a number per channel. It
keeps the largest branches that have a sum.

A sum declines, with a reason of its own, unless everything that makes the merged convolution exact is known to hold.
Its convolutions then fold one by one.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..ops.reference import FLOATING
from .branch import Branch, Grid, SumDecline
from .calls import (
    BatchNormCall,
    ConvCall,
    dtype_of,
    is_subclass,
    may_train,
    rank_of,
    requires_grad,
    shape_of,
    tensor_of,
)
from .dialects import read_batch_norm, read_conv
from .match import Findings, Pair, removable_nodes, unfit, uses
from .mutation import Mutations
from .reasons import Reason
from .sums import FactorCall, SumCall, read_factor, read_sum


class _CannotMerge(Exception):
    def __init__(self, reason: Reason, node: fx.Node | None = None) -> None:
        super().__init__(reason, node)
        self.reason, self.detail = reason, "" if node is None else node.name


def merge_sums(
    findings: Findings,
    graph: fx.Graph,
    wanted: Callable[[Branch], bool] = lambda branch: True,
    inputs_are_kept: bool = False,
) -> Findings:
    """Return the findings with the sums that one convolution replaces. Their BatchNorms are in no pair and no decline.

    Args:
        findings: Every BatchNorm of the graph.
        graph: The graph. It does not change.
        wanted: Which sums to merge of those that can be. Called with the largest first.
        inputs_are_kept: Decline a sum if an input of the graph that it reads is written to, see `match.drop_written`.
    """
    matcher = _Matcher(findings, graph, inputs_are_kept)
    matcher.match()
    return matcher.findings(wanted)


class _Matcher:
    def __init__(self, findings: Findings, graph: fx.Graph, inputs_are_kept: bool) -> None:
        self.found, self.graph, self.inputs_are_kept = findings, graph, inputs_are_kept
        self.pairs: dict[fx.Node, Pair] = {
            own[0].bn.output: own[0]
            for own in findings.folded().values()
            if len(own) == 1 and own[0].channels is None and not own[0].steps
        }
        self.branches: dict[fx.Node, Branch] = {}
        self.declines: list[SumDecline] = []

    def match(self) -> None:
        """Build every branch of the graph."""
        for node in self.graph.nodes:
            try:
                branch = self._branch(node)
            except _CannotMerge as error:
                self.declines.append(SumDecline(node, error.reason, error.detail))
                continue
            if branch is not None:
                self.branches[branch.node] = branch

    def findings(self, wanted: Callable[[Branch], bool]) -> Findings:
        """Return the findings with the largest branches that are wanted."""
        sums: list[Branch] = []
        taken: set[fx.Node] = set()
        for branch in sorted(self.branches.values(), key=lambda each: each.node, reverse=True):  # the largest first
            if not branch.sums or not branch.convs or branch.node in taken:
                continue
            if not wanted(branch):
                continue
            try:
                self._check_writes(branch)
            except _CannotMerge as error:
                self.declines.append(SumDecline(branch.node, error.reason, error.detail))
                continue
            sums.append(branch)
            taken.update(branch.own)
        norms = {bn.node for branch in sums for bn in branch.norms}
        return Findings(
            [pair for pair in self.found.pairs if pair.bn.node not in norms],
            [decline for decline in self.found.declines if decline.bn.node not in norms],
            self.found.mutations,
            sums[::-1],
            self.declines,
        )

    def _branch(self, node: fx.Node) -> Branch | None:
        """Return the branch that ends at the node, if there is one. Raises _CannotMerge for a sum that declines."""
        if node in self.pairs:
            return self._pair(self.pairs[node])
        conv = read_conv(node)
        if conv is not None:
            grid = _grid(conv, self.graph)
            if grid is None or rank_of(conv.input, self.graph) != len(grid.kernel) + 2:
                return None
            expression = ("conv", conv.weight, conv.bias)
            return Branch(node, conv.input, expression, ((conv, grid),), own=(node,))
        bn = read_batch_norm(node)
        if bn is not None:
            return self._normalized(bn)
        total = read_sum(node)
        if total is not None:
            return self._added(total)
        product = read_factor(node)
        return None if product is None else self._multiplied(product)

    def _pair(self, pair: Pair) -> Branch | None:
        """Return the branch of a pair, which is checked already."""
        branch = self.branches.get(pair.conv.node)
        if branch is None or isinstance(pair.bn.eps, fx.Node):
            return None
        return self._behind_norm(branch, pair.bn)

    def _behind_norm(self, branch: Branch, bn: BatchNormCall) -> Branch:
        vectors = bn.weight, bn.bias, bn.running_mean, bn.running_var
        own = (*branch.own, *sorted(removable_nodes(bn)))
        expression = ("norm", branch.expression, *vectors, bn.eps)
        return replace(branch, node=bn.output, expression=expression, norms=(*branch.norms, bn), own=own)

    def _normalized(self, bn: BatchNormCall) -> Branch | None:
        """Return the branch of a BatchNorm that follows a sum, or reads the input itself."""
        if bn.obstacle or any(True for _ in unfit(bn)) or isinstance(bn.eps, fx.Node):
            return None
        before = self.branches.get(bn.input)
        if before is None or not before.sums or not self._only_reader(before, removable_nodes(bn)):
            before = Branch(bn.input, bn.input, ("input",), reads_input=True)
        if not self._vectors_fit(bn):
            return None
        return self._behind_norm(before, bn)

    def _vectors_fit(self, bn: BatchNormCall) -> bool:
        """Return whether the BatchNorm acts on dim 1 and rounds nothing more coarsely than its result."""
        dtype, rank = dtype_of(bn.output, self.graph), rank_of(bn.input, self.graph)
        vectors = [tensor_of(each, self.graph) for each in (bn.running_mean, bn.running_var)]
        vectors += [tensor_of(each, self.graph) for each in (bn.weight, bn.bias) if each is not None]
        if dtype is None or rank is None or (bn.ranks is not None and rank not in bn.ranks):
            return False
        if bn.promotes is not None and torch.promote_types(dtype, bn.promotes) != dtype:
            return False
        if any(torch.promote_types(dtype, rounded) != rounded for rounded in bn.computed):
            return False
        return all(each is not None and each.ndim == 1 and _is_plain(each) for each in vectors)

    def _added(self, call: SumCall) -> Branch | None:
        """Return the branch of a sum. Its terms are branches of one tensor, or that tensor."""
        nodes = [node for _, node in call.terms]
        found = [self.branches.get(node) for node in nodes]
        candidates = list(dict.fromkeys(branch.input for branch in found if branch is not None))
        if not candidates:
            return None
        convolved = any(branch is not None and branch.convs for branch in found)
        if call.obstacle is not None and convolved:
            raise _CannotMerge(call.obstacle)
        x = next((x for x in candidates if all(map(lambda n, b: n is x or _reads(b, x), nodes, found))), None)
        if x is None and convolved:
            raise _CannotMerge(Reason.OTHER_INPUT)
        if x is None or call.obstacle is not None:
            return None
        terms: list[tuple[int, Branch]] = []
        for (sign, node), branch in zip(call.terms, found, strict=True):
            if branch is None or not _reads(branch, x):
                branch = Branch(x, x, ("input",), reads_input=True)
            elif not self._only_reader(branch, {call.node}):
                raise _CannotMerge(Reason.BRANCH_SHARED, node)
            terms.append((sign, branch))
        if call.writes and terms[0][1].node is x:
            raise _CannotMerge(Reason.MUTATED, x)
        merged = Branch(
            call.node,
            x,
            ("sum", *((sign, branch.expression) for sign, branch in terms)),
            tuple(conv for _, branch in terms for conv in branch.convs),
            tuple(norm for _, branch in terms for norm in branch.norms),
            (*(node for _, branch in terms for node in branch.own), call.node),
            1 + sum(branch.sums for _, branch in terms) if len(terms) > 1 else terms[0][1].sums,
            any(branch.reads_input for _, branch in terms),
        )
        if not merged.convs:
            return merged
        self._check(merged)
        return merged

    def _multiplied(self, call: FactorCall) -> Branch | None:
        """Return the branch of a branch times a number per channel."""
        first, second = call.operands
        for factor, node in ((first, second), (second, first)):
            branch = self.branches.get(node) if isinstance(node, fx.Node) else None
            if branch is None or (call.writes and call.node.args[0] is not node):
                continue
            if not self._only_reader(branch, {call.node}) or not self._is_factor(factor, branch):
                continue
            expression = ("factor", branch.expression, factor if isinstance(factor, fx.Node) else (factor,))
            own = (*branch.own, call.node)
            return replace(branch, node=call.node, expression=expression, own=own)
        return None

    def _is_factor(self, factor: Any, branch: Branch) -> bool:
        """Return whether a value is one number, or one number per channel, along dim 1."""
        if not isinstance(factor, fx.Node):
            return True
        tensor, shape = tensor_of(factor, self.graph), shape_of(branch.node, self.graph)
        dtype = dtype_of(branch.node, self.graph)
        if tensor is None or shape is None or dtype is None or not _is_plain(tensor) or tensor.ndim > len(shape):
            return False
        if factor in branch.own or factor is branch.input or _comes_from_call(factor):
            return False
        ones = (1,) * (len(shape) - 2)
        if (1,) * (len(shape) - tensor.ndim) + tuple(tensor.shape) not in ((1, 1, *ones), (1, shape[1], *ones)):
            return False
        return tensor.ndim == 0 or torch.promote_types(dtype, tensor.dtype) == dtype

    def _only_reader(self, branch: Branch, readers: set[fx.Node]) -> bool:
        """Return whether the branch's result is read by these nodes alone, and once."""
        users = list(branch.node.users)
        return readers.issuperset(users) and len(users) == 1 and uses(branch.node, users[0]) == 1

    def _check(self, branch: Branch) -> None:
        """Raise _CannotMerge unless one convolution has the terms' values."""
        largest, grid = branch.largest
        weight = tensor_of(largest.weight, self.graph)
        dtype, shape = dtype_of(largest.node, self.graph), shape_of(largest.node, self.graph)
        if weight is None or dtype is None or shape is None:
            raise _CannotMerge(Reason.UNKNOWN_SHAPE, largest.node)
        for conv, own in branch.convs:
            self._check_grid(own, grid, conv.node)
            taken = tensor_of(conv.weight, self.graph)
            if taken is None or (conv.bias is not None and tensor_of(conv.bias, self.graph) is None):
                raise _CannotMerge(Reason.UNKNOWN_SHAPE, conv.node)
            if conv.groups != largest.groups or taken.shape[1] != weight.shape[1]:
                raise _CannotMerge(Reason.OTHER_GROUPS, conv.node)
            if taken.shape[0] != weight.shape[0]:
                raise _CannotMerge(Reason.BROADCAST, conv.node)
            if dtype_of(conv.node, self.graph) != dtype:
                raise _CannotMerge(Reason.DTYPE, conv.node)
        if branch.reads_input:
            self._check_grid(Grid.of_input(len(grid.kernel)), grid, branch.input)
            if weight.shape[1] * largest.groups != weight.shape[0]:
                raise _CannotMerge(Reason.BROADCAST, branch.input)
            if dtype_of(branch.input, self.graph) != dtype:
                raise _CannotMerge(Reason.DTYPE, branch.input)
        for bn in branch.norms:
            vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
            if {len(each) for value in vectors if (each := tensor_of(value, self.graph)) is not None} != {len(weight)}:
                raise _CannotMerge(Reason.CHANNELS, bn.node)
        found = [tensor_of(node, self.graph) for node in (branch.input, largest.node, branch.node)]
        activations = [tensor for tensor in found if tensor is not None]
        for value in branch.values():
            tensor = tensor_of(value, self.graph)
            if tensor is None or is_subclass(tensor) or any(map(is_subclass, activations)):
                raise _CannotMerge(Reason.TENSOR_SUBCLASS, branch.node)
            if tensor.dtype not in FLOATING or dtype not in FLOATING:
                raise _CannotMerge(Reason.DTYPE, branch.node)
            if tensor.device != weight.device:
                raise _CannotMerge(Reason.DEVICE, branch.node)
        if dtype_of(branch.node, self.graph) != dtype:
            raise _CannotMerge(Reason.DTYPE, branch.node)
        if shape_of(branch.node, self.graph) != shape:
            raise _CannotMerge(Reason.BROADCAST, branch.node)

    def _check_grid(self, own: Grid, grid: Grid, node: fx.Node) -> None:
        reason = own.obstacle_in(grid)
        if reason is not None:
            raise _CannotMerge(reason, node)

    def _check_writes(self, branch: Branch) -> None:
        """Raise _CannotMerge if something that the merged convolution reads is written to too early or too late."""
        mutations = self.found.mutations = self.found.mutations or Mutations(self.graph)
        read = (branch.input, *branch.values())
        first = min(branch.own)
        moved = mutations.obstacle(first, branch.node, read, own=frozenset(branch.own))
        if moved is not None:
            raise _CannotMerge(*moved)
        if not self._has_backward(branch):
            return
        written = mutations.written_after(branch.node, read)
        if written is None and self.inputs_are_kept:
            written = mutations.written_input(branch.node, read)
        if written is not None:
            raise _CannotMerge(Reason.MUTATED, written)

    def _has_backward(self, branch: Branch) -> bool:
        output = branch.node.meta.get("example_value")
        if isinstance(output, Tensor):
            return requires_grad(output)
        return any(may_train(value, self.graph) for value in (branch.input, *branch.values()))


def _reads(branch: Branch | None, x: fx.Node) -> bool:
    return branch is not None and branch.input is x


def _comes_from_call(factor: fx.Node) -> bool:
    """Return whether a factor is computed in the graph, by more than a change of its shape."""
    while factor.op in ("call_function", "call_method"):
        if factor.target not in _RESHAPES or not isinstance(factor.args[0], fx.Node):
            return True
        factor = factor.args[0]
    return factor.op not in ("placeholder", "get_attr")


_RESHAPES = {"view", "reshape", "unsqueeze", torch.reshape, torch.unsqueeze}
_RESHAPES |= {torch.ops.aten.view.default, torch.ops.aten.unsqueeze.default, torch.ops.aten.reshape.default}


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATING and not is_subclass(tensor)


def _grid(conv: ConvCall, graph: fx.Graph) -> Grid | None:
    """Return where a convolution reads. None for one that is no term: transposed, Linear, or padded by F.pad."""
    weight = tensor_of(conv.weight, graph)
    if conv.obstacle or conv.transposed or conv.linear or conv.pad is not None or weight is None or weight.ndim < 3:
        return None
    options = [conv.options.get(name) for name in ("stride", "padding", "dilation")]
    return Grid.of(tuple(weight.shape[2:]), *options)
