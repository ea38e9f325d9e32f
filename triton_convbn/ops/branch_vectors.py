"""Read the vectors of a sum of branches, and compute the scale and shift of its BatchNorms and their gradients.

A sum is described by an expression of nested tuples. Its numbers are positions in a list of tensors:

    ("conv", weight, bias)                  a convolution; bias may be None
    ("input",)                              the input itself
    ("norm", inner, bn_weight, bn_bias, running_mean, running_var, eps)
    ("factor", inner, factor)               times a tensor of one element or one per channel, or a number ``(2.0,)``
    ("sum", (sign, inner), ...)             the sign is 1 or -1
"""

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import arithmetic
from .registration import gradients_of

Expression = tuple[Any, ...]


class Norms(NamedTuple):
    """BatchNorms of one kind, see `kind_of`: ``norm(inner) = scale * inner + shift``, the inner value without its bias.

    Attributes:
        norms: Their expressions.
        inverse: ``rsqrt(running_var + eps)``. This and the others are (C_out,), or a row for each of several.
        mean: The running mean less the convolution's bias.
        scale, shift: As in the formula.
    """

    norms: Sequence[Expression]
    inverse: Tensor
    mean: Tensor
    scale: Tensor
    shift: Tensor

    def gradients(self, of_scale: Tensor | None, of_shift: Tensor | None) -> Iterator[tuple[Sequence[Any], Tensor]]:
        """Yield the gradients of the BatchNorms' parameters and of the biases, each with their positions."""
        _, inner, bn_weights, bn_biases, *_ = zip(*self.norms, strict=True)
        if of_shift is not None:
            if bn_biases[0] is not None:
                yield bn_biases, of_shift.contiguous()  # the rows of a sum's gradient share their memory
            if _has_bias(inner[0]):
                yield [bias for _, _, bias in inner], of_shift * self.scale
            from_shift = of_shift * self.mean
            of_scale = -from_shift if of_scale is None else of_scale - from_shift
        if bn_weights[0] is not None and of_scale is not None:
            yield bn_weights, of_scale * self.inverse


class Vectors:
    """The vectors and factors of a sum, in the dtype of the arithmetic.

    Args:
        tensors, expression: See `branches.fold_branches`.
        stacks: Compute BatchNorms of one kind together, as rows of one tensor. A block of MobileOne has six, and one
            by one each takes 5 operations. Under Inductor they fuse, and a stack would be a copy of its rows.
        flags: Which tensors need a gradient, for `gradients`. Autograd then records only what follows the BatchNorms.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        expression: Expression,
        stacks: bool = False,
        flags: Sequence[bool] | None = None,
    ) -> None:
        self.tensors, self.expression, self.stacks, self.flags = tensors, expression, stacks, flags
        self.wide = arithmetic(tensors)
        self._norms: list[Norms] = []
        self._leaves: list[tuple[int, Tensor]] = []

    @cached_property
    def ones(self) -> Tensor:
        """The scale of a convolution or an input without a BatchNorm, (C_out,)."""
        weight = self.tensors[weights_of(self.expression)[0]]
        return torch.ones(weight.shape[0], dtype=self.wide, device=weight.device)

    def read(self, position: int) -> Tensor:
        """Return a factor or a bias."""
        if self.flags is None:
            return self._stack((position,))
        leaf = self.tensors[position].detach().to(self.wide).requires_grad_(self.flags[position])
        self._leaves.append((position, leaf))
        return leaf

    def _stack(self, positions: Sequence[int]) -> Tensor:
        own = [self.tensors[position] for position in positions]
        return (own[0] if len(own) == 1 else torch.stack(own)).to(self.wide)

    def norms(self, norms: Sequence[Expression]) -> Norms:
        """Return scale and shift of BatchNorms of one kind."""
        if self.flags is None:
            return self._compute(norms)
        with torch.no_grad():
            found = self._compute(norms)
        _, inner, bn_weights, bn_biases, *_ = zip(*norms, strict=True)
        scale_trains = self._trains(bn_weights)
        biases = [each[2] for each in inner if _has_bias(each)]
        found.scale.requires_grad_(scale_trains)
        found.shift.requires_grad_(scale_trains or self._trains(bn_biases) or self._trains(biases))
        self._norms.append(found)
        return found

    def _trains(self, positions: Sequence[int | None]) -> bool:
        return self.flags is not None and any(each is not None and self.flags[each] for each in positions)

    def _compute(self, norms: Sequence[Expression]) -> Norms:
        _, inner, bn_weights, bn_biases, means, variances, eps = zip(*norms, strict=True)
        inverse = torch.rsqrt(self._stack(variances) + eps[0])
        scale = inverse if bn_weights[0] is None else self._stack(bn_weights) * inverse
        mean = self._stack(means)
        if _has_bias(inner[0]):
            mean = mean - self._stack([bias for _, _, bias in inner])
        if bn_biases[0] is None:
            return Norms(norms, inverse, mean, scale, -mean * scale)
        return Norms(norms, inverse, mean, scale, torch.addcmul(self._stack(bn_biases), mean, scale, value=-1))

    def gradients(self, outputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradient of each tensor but the weights, None where not needed, from those of combined vectors."""
        assert self.flags is not None
        leaves = [leaf for _, leaf in self._leaves]
        leaves += [each for norms in self._norms for each in (norms.scale, norms.shift)]
        wanted = [leaf.requires_grad for leaf in leaves]
        of_leaves = iter(gradients_of(outputs, grads, leaves, wanted, differentiable=False))
        found: list[Tensor | None] = [None] * len(self.tensors)

        def add(position: int, grad: Tensor) -> None:
            if self.flags is not None and self.flags[position]:
                before, grad = found[position], grad.to(self.tensors[position].dtype)
                found[position] = grad if before is None else before + grad

        for position, _ in self._leaves:
            grad = next(of_leaves)
            if grad is not None:
                add(position, grad)
        for norms in self._norms:
            for positions, rows in norms.gradients(next(of_leaves), next(of_leaves)):
                for position, row in zip(positions, [rows] if len(positions) == 1 else rows.unbind(), strict=True):
                    add(position, row)
        return found


def kind_of(expression: Expression) -> tuple[Any, ...] | None:
    """Return what has to be equal in BatchNorms that are computed together. None if it follows another one or a sum."""
    if expression[0] != "norm" or expression[1][0] not in ("conv", "input"):
        return None
    _, inner, bn_weight, bn_bias, _, _, eps = expression
    return _has_bias(inner), bn_weight is None, bn_bias is None, eps


def _has_bias(inner: Expression) -> bool:
    return inner[0] == "conv" and inner[2] is not None


@lru_cache(maxsize=1024)
def weights_of(expression: Expression) -> tuple[int, ...]:
    """Return the position of each convolution's weight, in order."""
    kind, *rest = expression
    if kind == "conv":
        return (rest[0],)
    return tuple(position for each in _inner(kind, rest) for position in weights_of(each))


@lru_cache(maxsize=1024)
def statistics_of(expression: Expression) -> tuple[int, ...]:
    """Return the positions of the running means and variances."""
    kind, *rest = expression
    own = tuple(rest[3:5]) if kind == "norm" else ()
    return own + tuple(position for each in _inner(kind, rest) for position in statistics_of(each))


def _inner(kind: str, rest: Sequence[Any]) -> list[Expression]:
    if kind == "sum":
        return [each for _, each in rest]
    return list(rest[:1]) if kind in ("norm", "factor") else []
