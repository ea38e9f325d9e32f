"""Use a program as users do: differentiate it, transform it, and write to its tensors before the backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from programs import Later, Program
from subclasses import plain
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

Run = Callable[..., tuple[Any, ...]]
"""`render.Rendered.run`."""


@dataclass
class Outcome:
    """What a use leaves behind.

    Attributes:
        outputs: What the program returns, by name. The name has the class of a tensor subclass.
        state: What the program's tensors hold afterwards.
        gradients: By tensor, or what a transform returns. None if the backward raises.
        error: What the backward raises.
    """

    outputs: dict[str, Tensor]
    state: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] | None = field(default_factory=dict)
    error: str = ""

    def names(self) -> set[str]:
        """Return the names of the outputs, without the classes of subclasses."""
        return {name.partition(" (")[0] for name in self.outputs}


def outcome(run: Run, program: Program, backward: bool = True, given: dict[str, Tensor] | None = None) -> Outcome:
    """Use the program once, on new tensors unless some are given. Raises what the forward raises."""
    given = program.given() if given is None else given
    grad_mode = torch.is_grad_enabled()
    torch.manual_seed(0)
    try:
        if program.use != "backward":
            found = _transformed(run, program, given)
        else:
            found = _backward(run, program, given, backward)
    finally:
        torch.set_grad_enabled(grad_mode)
    found.state = {name: plain(value) for name, value in given.items()}
    return found


def _backward(run: Run, program: Program, given: dict[str, Tensor], backward: bool) -> Outcome:
    with modes_kept():
        outputs = _tensors(run(given))
    found = Outcome(_values(outputs))
    loss = _loss(outputs)
    for write in program.later:
        _write(given[write.name], write)
    if loss.requires_grad and backward:
        try:
            loss.backward()
        except RuntimeError as error:
            found.gradients, found.error = None, str(error)
    if found.gradients is not None:
        found.gradients = {k: plain(v.grad) for k, v in given.items() if v.is_leaf and v.grad is not None}
    if program.later:  # what the next call returns
        with modes_kept():
            found.outputs |= _values(_tensors(run(given)), "next output")
    return found


@contextmanager
def modes_kept() -> Iterator[None]:
    """Restore grad mode, which a program that raises may leave changed."""
    mode = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(mode)


def reset_modes() -> None:
    """End every mode that a program has begun and, because it raised, not ended."""
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", False)
    torch.clear_autocast_cache()
    while torch._C._functorch.maybe_current_level() is not None:
        torch._C._functorch.pop_dynamic_layer_stack()
    while forward_ad._current_level >= 0:
        forward_ad.exit_dual_level()
    torch._C._set_fwd_grad_enabled(True)
    torch._C._autograd._saved_tensors_hooks_enable()


def _tensors(returned: tuple[Any, ...]) -> list[Tensor]:
    return [value for value in returned if isinstance(value, Tensor)]


def _values(outputs: list[Tensor], name: str = "output") -> dict[str, Tensor]:
    return {
        f"{name} {i}" + (f" ({type(value).__name__})" if type(value) is not Tensor else ""): plain(value)
        for i, value in enumerate(outputs)
    }


def _loss(outputs: list[Tensor]) -> Tensor:
    """Return the sum of all elements that train, each with another weight."""
    loss = torch.zeros((), dtype=torch.float64)
    for value in outputs:
        if value.requires_grad:
            weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).reshape(value.shape)
            loss = loss + (value.double() * weights).sum()
    return loss


def _write(tensor: Tensor, write: Later) -> None:
    with torch.no_grad():
        match write.how:
            case "add_":
                tensor.add_(0.5)
            case "mul_":
                tensor.mul_(1.5)
            case "copy_":
                tensor.copy_(tensor.clone().flip(0))
            case "view":
                tensor.view(-1)[:1].fill_(0.25)
            case "detach":
                tensor.detach().mul_(1.5)
            case "foreach":
                torch._foreach_mul_([tensor], 1.5)
            case "setitem":
                tensor[0] = 0.25
            case "data":
                tensor.data.mul_(1.5)
            case "assigned data":
                tensor.data = tensor.data * 1.5


# -- transforms --------------------------------------------------------------------------------------------------------

Function = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
Values = dict[str, Tensor]


def _transformed(run: Run, program: Program, given: Values) -> Outcome:
    """Apply the transform to what trains, or to the inputs if nothing does."""
    inputs = {name: value.detach() for name, value in given.items() if name.startswith("x")}
    trained = {name: value.detach() for name, value in given.items() if value.requires_grad} or inputs
    everything = {name: value.detach() for name, value in given.items()}

    def f(changed: Values) -> tuple[Tensor, ...]:
        with modes_kept():
            found = run(everything | changed, False)
        return tuple(value for value in found if isinstance(value, Tensor) and value.is_floating_point())

    leaves = torch.utils._pytree.tree_leaves(TRANSFORMS[program.use](f, trained, inputs))
    # In fp64: torch's transforms promote mixed dtypes. A vmap of a bf16 BatchNorm with fp32 parameters returns fp32.
    tensors = {f"{program.use} {i}": value for i, value in enumerate(leaves) if isinstance(value, Tensor)}
    return Outcome({}, {}, {name: plain(value).double() for name, value in tensors.items()})


def _weighted(outputs: tuple[Tensor, ...]) -> Tensor:
    """Return a scalar of them all."""
    ramps = (torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape) for y in outputs)
    return torch.stack([(y.double() * ramp).sin().sum() for y, ramp in zip(outputs, ramps, strict=True)]).sum()


def _tangents(values: Values) -> Values:
    return {name: value.cos() for name, value in values.items()}


def _two(values: Values) -> Values:
    return {name: torch.stack([value, value * 0.5]) for name, value in values.items()}


_vmap = partial(vmap, randomness="same")


def _forward_mode(f: Function, t: Values, x: Values) -> Any:
    tangents = _tangents(t)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(value, tangents[name]) for name, value in t.items()}
        return [tuple(forward_ad.unpack_dual(y)) for y in f(duals)]


def _leaves(t: Values) -> Values:
    return {name: value.detach().requires_grad_() for name, value in t.items()}


def _batched_gradients(f: Function, t: Values, x: Values) -> Any:
    leaves = _leaves(t)
    loss = _weighted(f(leaves))
    grads = torch.stack([torch.ones_like(loss), -loss.detach()])
    return torch.autograd.grad(loss, list(leaves.values()), grads, is_grads_batched=True, allow_unused=True)


def _second_derivatives(f: Function, t: Values, x: Values) -> Any:
    leaves = _leaves(t)
    every = list(leaves.values())
    first = torch.autograd.grad(_weighted(f(leaves)), every, create_graph=True, allow_unused=True)
    penalty = torch.stack([g.double().cos().sum() for g in first if g is not None]).sum()
    return first, torch.autograd.grad(penalty, every, allow_unused=True)


def _gradient(f: Function) -> Callable[..., Values]:
    return grad(lambda t, x: _weighted(f(t | x)))


TRANSFORMS: dict[str, Callable[[Function, Values, Values], Any]] = {
    "grad": lambda f, t, x: _gradient(f)(t, {}),
    "vjp": lambda f, t, x: (pulled := vjp(f, t))[1](tuple(y.cos() for y in pulled[0])),
    "jvp": lambda f, t, x: jvp(f, (t,), (_tangents(t),)),
    "forward mode": _forward_mode,
    "vmap": lambda f, t, x: _vmap(f)(_two(x)),
    "vmap of models": lambda f, t, x: _vmap(f)(_two(t)),
    "vmap of grad": lambda f, t, x: _vmap(_gradient(f), in_dims=(None, 0))(
        {name: value for name, value in t.items() if name not in x} or t, _two(x)
    ),
    "jacrev": lambda f, t, x: jacrev(lambda t: _weighted(f(t)))(t),
    "jacfwd": lambda f, t, x: jacfwd(lambda t: _weighted(f(t)))(t),
    "jvp of grad": lambda f, t, x: jvp(lambda t: _gradient(f)(t, {}), (t,), (_tangents(t),)),
    "batched gradients": _batched_gradients,
    "second derivatives": _second_derivatives,
}
"""Transforms of a function `f` of tensors by name. t: the tensors that train. x: the inputs."""

USES = ("backward", *TRANSFORMS)
