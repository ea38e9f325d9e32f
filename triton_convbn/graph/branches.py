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

from torch import fx

from .branch import Branch, SumDecline, parts
from .branch_checks import CannotMerge, changes_layout, check, grid_of, is_factor, vectors_fit
from .calls import BatchNormCall, FactorCall, PassthroughCall, SumCall, rank_of
from .dialects import read_batch_norm, read_conv, read_factor, read_passthrough, read_sum
from .findings import Findings, Pair, norms_of
from .fit import has_backward
from .match import removable_nodes, unfit, uses
from .mutation import Mutations
from .reasons import Reason
from .symbols import number, with_values


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
            own[0].bn.output: own[0] for own in findings.folded().values() if len(own) == 1 and own[0].is_plain
        }
        every = (*norms_of(findings.pairs), *(decline.bn for decline in findings.declines))
        self.norms = {bn.output: bn for bn in every}
        self.parts = {part for bn in every for part in bn.parts}  # ``x - mean`` is no sum of branches
        self.branches: dict[fx.Node, Branch] = {}
        self.partial: dict[fx.Node, Branch] = {}  # sums whose largest kernel may be still to come
        self.declines: list[SumDecline] = []

    def match(self) -> None:
        """Build every branch of the graph."""
        for node in self.graph.nodes:
            try:
                branch = self._branch(node)
            except CannotMerge as error:
                self.declines.append(SumDecline(node, error.reason, error.node))
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
            except CannotMerge as error:
                self.declines.append(SumDecline(branch.node, error.reason, error.node))
                continue
            sums.append(replace(branch, expression=with_values(branch.expression)))
            taken.update(branch.own)
        norms = {bn.node for branch in sums for bn in branch.norms}
        return Findings(
            [pair for pair in self.found.pairs if pair.bn.node not in norms],
            [decline for decline in self.found.declines if decline.bn.node not in norms],
            self.found.mutations,
            sums[::-1],
            [decline for decline in self.declines if decline.node not in taken],
        )

    def _input(self, x: fx.Node) -> Branch:
        """Return the branch that is the input itself."""
        before = self.branches.get(x)
        first_norm = self.norms.get(x) or (before.first_norm if before is not None else None)
        return Branch(x, x, ("input",), reads_input=True, first_norm=first_norm)

    def _branch(self, node: fx.Node) -> Branch | None:
        """Return the branch that ends at the node, if there is one. Raise CannotMerge for a sum that declines."""
        if node in self.parts:
            return None
        if node in self.pairs:
            return self._pair(self.pairs[node])
        conv = read_conv(node)
        if conv is not None:
            grid = grid_of(conv, self.graph)
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
        if product is not None:
            return self._multiplied(product)
        step = read_passthrough(node)
        return None if step is None or step.kind != "same" else self._passed_on(step)

    def _pair(self, pair: Pair) -> Branch | None:
        """Return the branch of a pair, which is checked already."""
        branch = self.branches.get(pair.conv.node)
        return None if branch is None else self._behind_norm(branch, pair.bn)

    def _behind_norm(self, branch: Branch, bn: BatchNormCall) -> Branch | None:
        eps = number(bn.eps)
        if eps is None:
            return None
        expression = ("norm", branch.expression, bn.weight, bn.bias, bn.running_mean, bn.running_var, eps)
        found = branch.inside(bn.output, expression, sorted(removable_nodes(bn)), (bn,))
        return None if found is None else replace(found, first_norm=bn)

    def _normalized(self, bn: BatchNormCall) -> Branch | None:
        """Return the branch of a BatchNorm that follows a sum, or reads the input itself."""
        if bn.obstacle or unfit(bn) is not None:
            return None
        before = self.branches.get(bn.input)
        if before is None or not before.sums or not self._only_reader(before, removable_nodes(bn)):
            before = self._input(bn.input)
        if not vectors_fit(bn, self.graph):
            return None
        return self._behind_norm(before, bn)

    def _added(self, call: SumCall) -> Branch | None:
        """Return the branch of a sum. Its terms are branches of one tensor, or that tensor."""
        nodes = [node for _, node in call.terms]
        found = [self.branches.get(node) or self.partial.get(node) for node in nodes]
        candidates = list(dict.fromkeys(branch.input for branch in found if branch is not None))
        if not candidates:
            return None
        convolved = any(branch is not None and branch.convs for branch in found)
        if call.obstacle is not None and convolved:
            raise CannotMerge(call.obstacle)
        x = next((x for x in candidates if all(map(lambda n, b: n is x or _reads(b, x), nodes, found))), None)
        if x is None and convolved:
            raise CannotMerge(Reason.OTHER_INPUT)
        if x is None or call.obstacle is not None:
            return None
        terms: list[tuple[int, Branch]] = []
        for (sign, node), branch in zip(call.terms, found, strict=True):
            if branch is None or not _reads(branch, x):
                branch = self._input(x)
            elif not self._only_reader(branch, {call.node}):
                raise CannotMerge(Reason.BRANCH_SHARED, node)
            terms.append((sign, branch))
        if call.writes and terms[0][1].node is x:
            raise CannotMerge(Reason.MUTATED, x)
        merged = Branch(
            call.node,
            x,
            ("sum", *(part for sign, branch in terms for part in parts(sign, branch.expression))),
            tuple(conv for _, branch in terms for conv in branch.convs),
            tuple(norm for _, branch in terms for norm in branch.norms),
            (*(node for _, branch in terms for node in branch.own), call.node),
            1 + sum(branch.sums for _, branch in terms) if len(terms) > 1 else terms[0][1].sums,
            any(branch.reads_input for _, branch in terms),
            max(branch.depth for _, branch in terms),
            terms[0][1].first_norm,
        )
        try:
            if merged.convs:
                check(merged, self.graph)
        except CannotMerge as error:
            if error.reason is Reason.KERNEL_GROWS:
                self.partial[call.node] = merged
            raise
        return merged

    def _multiplied(self, call: FactorCall) -> Branch | None:
        """Return the branch of a branch, or of the input itself, times a number per channel."""
        first, second = call.operands
        for factor, node in ((first, second), (second, first)):
            if not isinstance(node, fx.Node) or (call.writes and call.node.args[0] is not node):
                continue
            branch = self.branches.get(node)
            if branch is None or not self._only_reader(branch, {call.node}):
                if call.writes:
                    continue
                branch = self._input(node)
            known = number(factor)
            if known is not None or (isinstance(factor, fx.Node) and is_factor(factor, branch, self.graph)):
                expression = ("factor", branch.expression, factor if known is None else (known,))
                return branch.inside(call.node, expression, (call.node,))
        return None

    def _passed_on(self, call: PassthroughCall) -> Branch | None:
        """Return the branch behind a call that changes nothing, such as a dropout in eval mode."""
        before = self.branches.get(call.inputs[0])
        if before is None or not self._only_reader(before, {call.node}):
            return None
        first_norm = None if changes_layout(call.node) else before.first_norm
        return replace(before, node=call.node, own=(*before.own, call.node), first_norm=first_norm)

    def _only_reader(self, branch: Branch, readers: set[fx.Node]) -> bool:
        """Return whether the branch's result is read by these nodes alone, and once."""
        users = list(branch.node.users)
        return readers.issuperset(users) and len(users) == 1 and uses(branch.node, users[0]) == 1

    def _check_writes(self, branch: Branch) -> None:
        """Raise CannotMerge if a write makes the merged convolution read, or its readers compute, something else."""
        mutations = self.found.mutations = self.found.mutations or Mutations(self.graph)
        read = (branch.input, *branch.values())
        first = min(branch.own)
        moved = mutations.obstacle(first, branch.node, read, own=frozenset(branch.own))
        if moved is not None:
            raise CannotMerge(*moved)
        if branch.node in mutations.stride_dependent:
            raise CannotMerge(Reason.VIEW_OR_COPY, mutations.stride_dependent[branch.node])
        if not has_backward(branch.node, read, self.graph):
            return
        written = mutations.written(branch.node, read, self.inputs_are_kept)
        if written is not None:
            raise CannotMerge(Reason.MUTATED, written)


def _reads(branch: Branch | None, x: fx.Node) -> bool:
    return branch is not None and branch.input is x
