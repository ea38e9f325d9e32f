"""Call the function of a block through higher-order operators, custom autograd functions and transforms.

Dynamo captures each in its own way: with a graph inside the graph (checkpoint, cond, nested regions, autograd
functions, loops), or flat, between calls that begin and end a transform.
"""

from collections.abc import Callable
from typing import Any

import torch
from programs import Block
from torch import Tensor, nn
from torch._higher_order_ops import map as torch_map
from torch._higher_order_ops import scan, while_loop
from torch.utils.checkpoint import checkpoint

Function = Callable[..., Any]
"""A block's function, of its operands."""

Operands = tuple[Any, ...]


def _checkpoint(call: Function, operands: Operands, block: Block) -> Any:
    return checkpoint(call, *operands, use_reentrant=False)


def _reentrant_checkpoint(call: Function, operands: Operands, block: Block) -> Any:
    return checkpoint(call, *operands, use_reentrant=True)


def _cond(call: Function, operands: Operands, block: Block) -> Any:
    return torch.cond(operands[0].sum() > 0, call, lambda *values: call(*values).neg(), operands)


def _autograd_function(call: Function, over: int) -> Function:
    """Call it in the forward of a custom function, whose backward is not the derivative."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Tensor) -> Tensor:
            ctx.save_for_backward(values[over])
            ctx.count = len(values)
            return call(*values)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            (value,) = ctx.saved_tensors
            return tuple(value * grad.sum() if i == over else None for i in range(ctx.count))

    return Custom.apply


def _stacked(value: Tensor) -> Tensor:
    return torch.stack([value, value * 0.5])


def _with(operands: Operands, over: int, value: Any) -> Operands:
    return (*operands[:over], value, *operands[over + 1 :])


def _vmap(call: Function, operands: Operands, block: Block) -> Any:
    return torch.vmap(lambda value: call(*_with(operands, block.over, value)))(_stacked(operands[block.over])).sum(0)


def _gradient(call: Function, operands: Operands, block: Block) -> Function:
    return torch.func.grad(lambda value: call(*_with(operands, block.over, value)).sin().sum())


def _grad(call: Function, operands: Operands, block: Block) -> Any:
    return _gradient(call, operands, block)(operands[block.over])


def _vmap_of_grad(call: Function, operands: Operands, block: Block) -> Any:
    return torch.vmap(_gradient(call, operands, block))(_stacked(operands[block.over])).sum(0)


def _jvp(call: Function, operands: Operands, block: Block) -> Any:
    """Return the value plus the derivative.

    Statistics have no tangents, everything else has: Dynamo cannot trace a BatchNorm with some of the others only.
    """
    moving = [i for i in range(len(operands)) if i not in block.fixed]

    def of(*values: Any) -> Any:
        each = iter(values)
        return call(*[operands[i] if i in block.fixed else next(each) for i in range(len(operands))])

    points = tuple(operands[i] for i in moving)
    value, tangent = torch.func.jvp(of, points, tuple(each.cos() for each in points))
    return value + tangent.to(value.dtype)


def _vjp(call: Function, operands: Operands, block: Block) -> Any:
    value, pull = torch.func.vjp(lambda each: call(*_with(operands, block.over, each)), operands[block.over])
    return pull(value.cos())[0]


def _scan(call: Function, operands: Operands, block: Block) -> Any:
    """Carry the result from step to step."""

    def step(carry: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return call(carry, *operands[1:]), factor * 2

    return scan(step, operands[0], torch.ones(2, 1, dtype=operands[0].dtype))[0]


def _while_loop(call: Function, operands: Operands, block: Block) -> Any:
    def step(count: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        return count + 1, call(carry, *operands[1:])

    return while_loop(lambda count, _: count < 2, step, (torch.zeros((), dtype=torch.int64), operands[0]))[1]


def _map(call: Function, operands: Operands, block: Block) -> Any:
    return torch_map(lambda value: call(value, *operands[1:]), _stacked(operands[0])).sum(0)


HOWS: dict[str, Callable[[Function, Operands, Block], Any]] = {
    "checkpoint": _checkpoint,
    "reentrant checkpoint": _reentrant_checkpoint,
    "cond": _cond,
    "vmap": _vmap,
    "grad": _grad,
    "vmap of grad": _vmap_of_grad,
    "jvp": _jvp,
    "vjp": _vjp,
    "scan": _scan,
    "while_loop": _while_loop,
    "map": _map,
}
"""By name, how to call a function with operands."""

MARKED: dict[str, Callable[[Function, int], Function]] = {
    "nested_compile_region": lambda call, over: torch.compiler.nested_compile_region(call),
    "autograd.Function": _autograd_function,
}
"""By name, how to mark a function, which is then called as usual."""

GRADIENTS = ("grad", "vmap of grad", "vjp")
"""These return something of the shape of the operand `over`."""

CARRIES = ("scan", "while_loop")
"""These need a function whose result looks like its first operand."""


class Caller(nn.Module):
    """A block as a module, which a graph calls. body: its function, a module that returns a tuple of one."""

    def __init__(self, block: Block, body: nn.Module) -> None:
        super().__init__()
        self.body, self.block = body, block

        def call(*values: Any) -> Any:
            return body(*values)[0]

        self.call = MARKED[block.how](call, block.over) if block.how in MARKED else call
        self.how = HOWS.get(block.how)

    def forward(self, *operands: Any) -> Any:
        return self.call(*operands) if self.how is None else self.how(self.call, operands, self.block)
