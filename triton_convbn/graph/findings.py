"""Describe what becomes of the BatchNorms of a graph: pairs that fold, and declines."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import fx

from .branch import Branch, SumDecline
from .calls import BatchNormCall, ConvCall, Value
from .mutation import Mutations
from .reasons import Reason

if TYPE_CHECKING:
    from .input_norms import InputNorm


class Inner(NamedTuple):
    """A BatchNorm between a convolution and the BatchNorm of its pair. It folds with them.

    channels: ``(start, length)`` of its channels that the convolution makes, see `Pair`.
    """

    bn: BatchNormCall
    channels: tuple[int, int] | None


@dataclass(frozen=True)
class Pair:
    """A convolution and the eval-mode BatchNorm, or the part of one, that folds into it.

    Attributes:
        conv, bn: The calls.
        dtype: The dtype to round the folded weight to if it is not the weight's own (autocast), else None.
        channels: ``(start, length)`` of the BatchNorm's channels that the convolution makes, if a concatenation is
            between the two. The BatchNorm then has one pair with each convolution. None: all channels.
        steps: All nodes between the convolutions and the BatchNorm that move elements, in the graph's order.
        inner: Other BatchNorms between the two, in the order in which they apply.
        twins: Later calls of the same BatchNorm on this convolution's output, or on other parts of it.
    """

    conv: ConvCall
    bn: BatchNormCall
    dtype: torch.dtype | None = None
    channels: tuple[int, int] | None = None
    steps: tuple[fx.Node, ...] = ()
    inner: tuple[Inner, ...] = ()
    twins: tuple[BatchNormCall, ...] = ()

    @property
    def vectors(self) -> tuple[Value, ...]:
        """Return the BatchNorm's bn_weight, bn_bias, running_mean and running_var, with all its channels."""
        return self.bn.vectors

    @property
    def norms(self) -> tuple[BatchNormCall, ...]:
        """Return all BatchNorm calls that the fold replaces."""
        return *(each.bn for each in self.inner), self.bn, *self.twins

    @property
    def parameters(self) -> tuple[Value, ...]:
        """Return all tensors that the fold reads."""
        inner = (value for each in self.inner for value in each.bn.vectors)
        return self.conv.weight, self.conv.bias, *inner, *self.vectors

    @property
    def is_plain(self) -> bool:
        """Return whether the BatchNorm reads the convolution's output itself, all of it, and is its only reader."""
        return self.channels is None and not (self.steps or self.inner or self.twins)


def norms_of(pairs: Iterable[Pair]) -> list[BatchNormCall]:
    """Return all BatchNorm calls that the pairs replace, each once, in the graph's order."""
    found = {bn.node: bn for pair in pairs for bn in pair.norms}
    return [found[node] for node in sorted(found)]


@dataclass(frozen=True)
class Decline:
    """A BatchNorm that is not folded, and why. `detail` names the node that is the cause, if there is one."""

    bn: BatchNormCall
    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        node, module = self.bn.node.name, module_path(self.bn.node)
        name = f"{module} ({node})" if module else node
        return f"{name}: {self.reason.text}" + (f" ({self.detail})" if self.detail else "")


def module_path(node: fx.Node) -> str:
    """Return the path of the module that a call is written in, as the capture names it, or "" if it names none.

    Dynamo's paths start at the local variable that holds the model, as in `L['self'].stem.1`. Those of export have a
    suffix where a module is called again.
    """
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack and isinstance(stack[-1], tuple) else ""
    return re.sub(r"^L\['\w+'\]\.?", "", path).split("@")[0]


class CannotFold(Exception):
    """A BatchNorm does not fold, for this reason, because of this node."""

    def __init__(self, reason: Reason, node: fx.Node) -> None:
        super().__init__(reason, node)
        self.reason, self.node = reason, node


@dataclass
class Findings:
    """Every BatchNorm of a graph, in its order: declined, or in one pair with each of its convolutions.

    Attributes:
        pairs: The pairs that fold.
        declines: The BatchNorms that stay.
        mutations: The effects of the graph; None if it has no BatchNorm.
        sums: The sums of branches that one convolution replaces, in the order of their last nodes. Their BatchNorms are
            in no pair and no decline.
        sum_declines: The sums of convolutions that are not merged.
        unprofitable: The pairs of BatchNorms that could fold and are among the declines.
        input_norms: The BatchNorms that fold into the convolution after them. They are in no pair and no decline.
    """

    pairs: list[Pair] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)
    mutations: Mutations | None = None
    sums: list[Branch] = field(default_factory=list)
    sum_declines: list[SumDecline] = field(default_factory=list)
    unprofitable: list[Pair] = field(default_factory=list)
    input_norms: list["InputNorm"] = field(default_factory=list)

    @property
    def changes_graph(self) -> bool:
        """Return whether anything folds or merges."""
        return bool(self.pairs or self.sums or self.input_norms)

    def folded(self) -> dict[fx.Node, list[Pair]]:
        """Return the pairs of each BatchNorm that folds, by its node. `norms_of` lists the BatchNorms of such pairs."""
        found: dict[fx.Node, list[Pair]] = {}
        for pair in self.pairs:
            found.setdefault(pair.bn.node, []).append(pair)
        return found

    def drop(self, decline: Callable[[list[Pair]], Decline | None]) -> "Findings":
        """Return the findings without the BatchNorms that `decline` declines, given all pairs of one.

        BatchNorms that fold together decline together.
        """
        if self.mutations is None:
            return self
        kept: list[Pair] = []
        declines = list(self.declines)
        for pairs in self.folded().values():
            declined = decline(pairs)
            if declined is None:
                kept += pairs
            else:
                declines += [replace(declined, bn=bn) for bn in norms_of(pairs)]
        order = self.mutations.order
        declines.sort(key=lambda each: order[each.bn.node])
        return replace(self, pairs=kept, declines=declines)
