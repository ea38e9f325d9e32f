"""Add what is between and around the pairs: harmless calls, writes, other readers, regions, other functions."""

from collections.abc import Callable
from typing import Any

import torch
from blocks import CARRIES, GRADIENTS
from builder import SMOOTH, Builder
from hypothesis import strategies as st
from programs import Block, Call, P, V, substitute, used
from torch import Tensor


def add(b: Builder, near: V | P | None = None) -> None:
    """Add something. near: a convolution, whose output and arguments are preferred."""
    kind = b.one_of("harmless", "write", "write", "write through", "use", "region", *("function",) * b.blocks)
    if kind == "harmless":
        ref = b.activation()
        if ref is not None:
            b.keep(b.emit(_harmless(b, ref)))
    elif kind == "use" and near is not None:
        b.keep(b.emit(Call(b.one_of(*SMOOTH), (near,))))
    elif kind == "region":
        _region(b)
    elif kind == "function":
        in_block(b, lambda: _read_and_write(b, near))
    else:
        write(b, through=kind == "write through", near=near)


def _harmless(b: Builder, ref: V | P) -> Call:
    other = b.activation(lambda t: t.shape == b.values[ref].shape) or ref
    return b.one_of(
        Call("torch.tanh", (ref,)),
        Call("operator.add", (ref, other)),
        Call("torch.mul", (), {"input": ref, "other": 0.5}),
        Call("torch.cat", ([ref, other],)),
        Call(".transpose", (ref, 0, 1)),
        Call(".flatten", (ref, 0, 1)),
        Call("F.dropout", (ref, 0.5)),
        Call(".float" if b.dtype != "float64" else ".double", (ref,)),
    )


def _writable(b: Builder, ref: V | P) -> bool:
    """Return whether autograd allows a write: not to a leaf that trains, and not to a view of one."""
    root, value = b.roots[ref], b.values[ref]
    trains = isinstance(root, P) and b.tensors[root.name].trains
    return isinstance(value, Tensor) and value.is_floating_point() and not trains


def write(b: Builder, through: bool, near: V | P | None, only_near: bool = False) -> None:
    """Write to a tensor, or to a view of it if `through`.

    near: A convolution, whose arguments are preferred. only_near: Write to one of these.
    """
    recent = list(used(b.steps[near.index])) if isinstance(near, V) else []
    candidates = recent if only_near else [*recent, *b.values]
    ref: V | P | None = b.draw(st.sampled_from(candidates)) if candidates else None
    if ref is None or not isinstance(b.values[ref], Tensor):
        return
    if through:
        seen = b.one_of(
            Call(".view", (ref, -1)),
            Call(".detach", (ref,)),
            Call("operator.getitem", (ref, 0)),
            Call("torch.flatten", (ref,)),
            Call(".transpose", (ref, 0, -1)),
            Call("getattr", (ref, "data")),
            Call(".unsqueeze", (ref, 0)),
            Call(".contiguous", (ref,)),
        )
        free = seen.function in (".detach", "getattr")
        view = b.emit(seen, None if free else ref)
        if view is None:
            return
        ref = view
    if not _writable(b, ref):
        if not b.chance(3):
            return
        writing = _writing(b, ref)
        b.emit(Call("torch._C._set_grad_enabled", (False,)))
        b.emit(writing)
        b.emit(Call("torch._C._set_grad_enabled", (True,)))
        return
    b.emit(_writing(b, ref))


def _writing(b: Builder, ref: V | P) -> Call:
    return b.one_of(
        Call(".add_", (ref, 0.5)),
        Call(".mul_", (ref, 1.5)),
        Call("operator.iadd", (ref, 0.5)),
        Call("operator.imul", (ref, 1.5)),
        Call("operator.setitem", (ref, 0, 0.25)),
        Call("torch.add", (ref, 0.5), {"out": ref}),
        Call("torch._foreach_add_", ([ref], 0.5)),
        Call("torch.relu_", (ref,)) if b.dtype == "float64" else Call(".tanh_", (ref,)),
        Call(".fill_", (ref, 0.25)),
        Call("nn.init.constant_", (ref, 0.25)),
        Call("nn.init.normal_", (ref,)),
        Call("torch.Tensor.add_", (ref, 0.5)),
        Call("torch.Tensor.renorm_", (ref, 2, 0, 0.5)),
        Call("torch.Tensor.normal_", (ref,)),
        Call("torch.Tensor.__setitem__", (ref, 0, 0.25)),
        Call("torch.Tensor.__iadd__", (ref, 0.5)),
    )


def _region(b: Builder) -> None:
    """Enter autocast or no_grad, or end the region that is open."""
    if b.open:
        b.emit(b.open.pop())
    elif b.dtype == "float32" and b.chance(2):
        autocast(b)
    elif b.chance(2):
        b.emit(Call("torch._C._set_grad_enabled", (False,)))
        b.open.append(Call("torch._C._set_grad_enabled", (True,)))


def autocast(b: Builder) -> None:
    entered = b.emit(Call("torch.amp.autocast_mode._enter_autocast", ("cpu", torch.bfloat16, True, None)))
    b.open.append(Call("torch.amp.autocast_mode._exit_autocast", (entered,)))


# -- functions that are called through something else ------------------------------------------------------------------

COMMON = ("checkpoint", "checkpoint", "cond", "nested_compile_region", "autograd.Function", "vmap", "grad", "jvp")
RARE = ("reentrant checkpoint", "vmap of grad", "vjp", "scan", "while_loop", "map")


def in_block(b: Builder, build: Callable[[], None]) -> None:
    """Move the steps that `build` adds into a `Block`, if they can be a function."""
    start, regions = len(b.steps), list(b.open)
    build()
    while len(b.open) > len(regions) and b.open[: len(regions)] == regions:
        b.emit(b.open.pop())
    inside = b.steps[start:]
    made = [V(i) for i in range(start, len(b.steps)) if _is_floating(b.values.get(V(i)))]
    reads = list(dict.fromkeys(ref for ref in used(inside) if isinstance(ref, P) or ref.index < start))
    tensors = [i for i, ref in enumerate(reads) if _is_floating(b.values[ref])]
    if not made or len(tensors) < len(reads) or not reads or b.open != regions:
        return
    returned = next((each for each in reversed(made) if each in b.activations), made[-1])
    example = b.values[returned]
    how = b.one_of(*COMMON * 2, *RARE)
    first = b.values[reads[0]]
    fits = (first.shape, first.dtype) == (example.shape, example.dtype)
    if fits and b.chance(2):  # a loop, which few functions fit
        how = b.one_of(*CARRIES)
    elif how in CARRIES and not fits:
        how = "map"
    fixed = tuple(i for i, ref in enumerate(reads) if isinstance(ref, P) and ref.name[0] in "mv")
    over = b.one_of(*(set(tensors) - set(fixed) or tensors))
    if how in GRADIENTS:
        example = b.values[reads[over]].detach().clone()
    names = {ref: P(f"a{i}") for i, ref in enumerate(reads)}
    steps = substitute(inside, lambda ref: names[ref] if ref in names else V(ref.index - start))
    for index in range(start, len(b.steps)):
        for held in (b.values, b.roots):
            held.pop(V(index), None)
    del b.steps[start:]
    b.activations[:] = [each for each in b.activations if each in b.values]
    block = Block(how, tuple(reads), tuple(steps), V(returned.index - start), over, fixed)
    b.steps.append(block)
    b.values[V(start)], b.roots[V(start)] = example, V(start)
    b.keep(V(start))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _read_and_write(b: Builder, near: V | P | None) -> None:
    write(b, through=b.chance(3), near=near)
    read = near if near is not None and b.chance(2) else b.activation()
    if read is not None:
        b.emit(Call(b.one_of(*SMOOTH), (read,)))
