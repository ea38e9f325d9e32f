"""List every minimal program that ever failed, with the dialect in which it did and what was wrong."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from programs import Block, Call, Conv, Later, Norm, P, Program, T, V


@dataclass(frozen=True)
class Regression:
    """A program that failed. options: Those of the pass with which it did. since: The oldest torch that captures it."""

    what: str
    dialect: str
    program: Program
    host: str = "by hand"
    options: dict[str, Any] = field(default_factory=dict)
    since: tuple[int, int] = (0, 0)


def pair(*between: Call, after: tuple[Call, ...] = (), normalized: int = 1, **trains: bool) -> Program:
    """Return ``x = x0 * 1; y = conv(x, w); between; z = bn(y); after``. V(0) is x, V(1) is y.

    normalized: The number of the value that the BatchNorm reads.
    """
    tensors = {
        "x0": T((2, 3, 4, 4)),
        "w": T((3, 3, 1, 1), trains=trains.get("w", False)),
        **{name: T((3,), trains=trains.get(name, False)) for name in ("g", "h", "m")},
        "v": T((3,), variance=True),
    }
    x, y = Call("torch.mul", (P("x0"), 1.0)), Conv(V(0), P("w"), dims=2)
    z = Norm(V(normalized), P("m"), P("v"), P("g"), P("h"))
    return Program(tensors, (x, y, *between, z, *after), (V(2 + len(between)),))


def norm_of_a_sum_in_vmap() -> Program:
    """Return a function under `vmap` that adds a convolution to its transposed input, and normalizes the sum."""
    tensors = {name: T((2,), "float64") for name in ("g", "h", "m")}
    tensors |= {
        "x0": T((2, 2, 2, 3), "float64"),
        "w": T((2, 2, 3, 3), "float64"),
        "v": T((2,), "float64", variance=True),
    }
    steps = (
        Call(".transpose", (P("a0"), -2, -1)),
        Conv(V(0), P("a1"), dims=2, padding=1),
        Call("operator.add", (V(0), V(1))),
        Norm(V(2), P("a2"), P("a3"), P("a4"), P("a5")),
    )
    reads = V(0), P("w"), P("m"), P("v"), P("g"), P("h")
    block = Block("vmap", reads, steps, V(3), over=0, fixed=(2, 3))
    return Program(tensors, (Call("torch.mul", (P("x0"), 1.5)), block), (V(1),))


def vmap_of_norms_under_autocast() -> Program:
    """Return a `vmap` under autocast, over the scale of a BatchNorm that is written out as arithmetic."""
    tensors = {name: T((2,), "bfloat16", variance=name == "v") for name in ("g", "h", "m", "v")}
    tensors |= {"x0": T((2, 2, 2, 2), "float32"), "w": T((2, 2, 1, 1), "float32")}
    reads = V(0), P("w"), P("g"), P("h"), P("m"), P("v")
    steps = (
        Conv(P("a0"), P("a1"), dims=2),
        *(Call(".reshape", (P(f"a{number}"), 1, -1, 1, 1)) for number in (2, 3, 4, 5)),
        Call("operator.add", (V(4), 1e-05)),
        Call(".rsqrt", (V(5),)),
        Call("operator.mul", (V(1), V(6))),
        Call("operator.mul", (V(3), V(7))),
        Call("operator.sub", (V(2), V(8))),
        Call("operator.mul", (V(0), V(7))),
        Call("operator.add", (V(10), V(9))),
    )
    begin = Call("torch.amp.autocast_mode._enter_autocast", ("cpu", torch.bfloat16, True, None))
    block = Block("vmap", reads, steps, V(11), over=2, fixed=(4, 5))
    end = Call("torch.amp.autocast_mode._exit_autocast", (V(1),))
    return Program(tensors, (Call("torch.mul", (P("x0"), 1.5)), begin, block, end), (V(2),))


def written_subclass() -> Program:
    """Return a pair whose variance, of a subclass, is written to before backward. Autograd does not see that."""
    first = pair(w=True)
    tensors = first.tensors | {"v": T((3,), variance=True, subclass="wrapper")}
    return replace(first, tensors=tensors, later=(Later("v", "foreach"),))


def sum_with_a_subclass() -> Program:
    """Return a pair whose variance is of a subclass, minus a smaller convolution of the same tensor."""
    first = pair(w=True)
    tensors = first.tensors | {"u": T((3, 3, 1, 1), trains=True)}
    tensors |= {"w": T((3, 3, 3, 3), trains=True), "v": T((3,), variance=True, subclass="wrapper")}
    x, y, z = Call("torch.mul", (P("x0"), 1.5)), Conv(V(0), P("w"), dims=2, padding=1), first.steps[-1]
    return Program(tensors, (x, y, z, Conv(V(0), P("u"), dims=2), Call("operator.sub", (V(2), V(3)))), (V(4),))


def frozen_beside_what_trains() -> Program:
    """Return a pair that trains, and one that does not, whose input is written to afterwards."""
    first = pair(w=True)
    tensors = first.tensors | {"u": T((3, 3, 1, 1))}
    x, y, z = Call("torch.mul", (P("x0"), 2.0)), Conv(V(3), P("u"), dims=2), Norm(V(4), P("m"), P("v"), P("g"), P("h"))
    return Program(tensors, (*first.steps, x, y, z, Call(".add_", (V(3), 0.5))), (V(5),))


def chain_by_torch_batch_norm() -> Program:
    """Return two pairs in a row, the second BatchNorm spelled `torch.batch_norm`."""
    first = pair()
    steps = (*first.steps, Conv(V(2), P("w"), dims=2), Norm(V(3), P("m"), P("v"), P("g"), P("h"), general=True))
    return Program(first.tensors, steps, (V(4),))


def batch_norms_in_a_row() -> Program:
    first = pair()
    vectors = {f"next_{name}": spec for name, spec in first.tensors.items() if name in "mvgh"}
    norm = Norm(V(2), P("next_m"), P("next_v"), P("next_g"), P("next_h"), eps=1e-3)
    return Program(first.tensors | vectors, (*first.steps, norm), (V(3),))


def flattened(*after: Call) -> Program:
    """Return a Linear on three dimensions, flattened for its BatchNorm and put back after it, which V(3) is."""
    tensors = pair().tensors | {"x0": T((2, 2, 3), trains=True), "w": T((3, 3))}
    steps = (
        Conv(P("x0"), P("w"), dims=0),
        Call(".flatten", (V(0), 0, 1)),
        Norm(V(1), P("m"), P("v"), P("g"), P("h")),
        Call(".reshape_as", (V(2), V(0))),
        *after,
    )
    return Program(tensors, steps, (V(3),))


def under_autocast() -> Program:
    """Return a pair under autocast, spelled `torch.convolution`."""
    tensors = {name: spec._replace(dtype="float32") for name, spec in pair().tensors.items()}
    steps = (
        Call("torch.amp.autocast_mode._enter_autocast", ("cpu", torch.bfloat16, True, None)),
        Conv(P("x0"), P("w"), dims=2, general=True),
        Norm(V(1), P("m"), P("v"), P("g"), P("h")),
        Call("torch.amp.autocast_mode._exit_autocast", (V(0),)),
    )
    return Program(tensors, steps, (V(2),))


def chain_around_a_write() -> Program:
    """Return two pairs in a row. Inside the second, something writes to the input of the first."""
    first = pair()
    steps = (*first.steps, Conv(V(2), P("w"), dims=2))
    return Program(
        first.tensors,
        (*steps, Call(".add_", (P("x0"), 0.5)), Norm(V(3), P("m"), P("v"), P("g"), P("h"))),
        (V(5),),
    )


def sum_under_autocast() -> Program:
    """Return the sum of a convolution that autocast rounds and of one that it leaves alone."""
    tensors = {name: spec._replace(dtype="float32") for name, spec in pair().tensors.items()}
    steps = (
        Call("torch.amp.autocast_mode._enter_autocast", ("cpu", torch.bfloat16, True, None)),
        Conv(P("x0"), P("w"), dims=2),
        Norm(V(1), P("m"), P("v"), P("g"), P("h")),
        Conv(P("x0"), P("w"), dims=2, general=True),
        Norm(V(3), P("m"), P("v"), P("g"), P("h")),
        Call("operator.add", (V(2), V(4))),
        Call("torch.amp.autocast_mode._exit_autocast", (V(0),)),
    )
    return Program(tensors, steps, (V(5),))


def linear_after_autocast() -> Program:
    """Return a BatchNorm between two Linears in bf16, of which only the first is under autocast."""
    vectors = {name: T((2,), "bfloat16", variance=name == "v") for name in "ghmv"}
    last = {name + "2": T((3,), "bfloat16", variance=name == "v") for name in "ghmv"}
    tensors = {"x0": T((2, 2), "float32"), "w": T((2, 2), "float32")} | vectors
    tensors |= {"w2": T((3, 2), "bfloat16")} | last
    steps = (
        Call("torch.amp.autocast_mode._enter_autocast", ("cpu", torch.bfloat16, True, None)),
        Conv(P("x0"), P("w"), dims=0),
        Call("torch.amp.autocast_mode._exit_autocast", (V(0),)),
        Norm(V(1), P("m"), P("v"), P("g"), P("h")),
        Conv(V(3), P("w2"), dims=0),
        Norm(V(4), P("m2"), P("v2"), P("g2"), P("h2")),
    )
    return Program(tensors, steps, (V(5),))


def rounding_alone() -> Program:
    """Return a pair whose output is one value a channel, in front of a BatchNorm that removes its mean."""
    first = pair()
    tensors = first.tensors | {"x0": T((2, 3, 3, 3))}
    x = Call("torch.mul", (P("x0"), 0.0))
    norm = Norm(V(2), P("m"), P("v"), P("g"), None, training=True)
    return Program(tensors, (x, *first.steps[1:], norm), (V(3),))


REGRESSIONS = [
    Regression(
        "make_fx on real tensors leaves metadata that shares no memory: the write through a view went unseen",
        "aten",
        pair(Call(".view", (V(0), -1)), Call(".mul_", (V(2), 2.0))),
    ),
    Regression(
        "a name with `norm` in it was taken for a BatchNorm, which writes only to its statistics",
        "functions",
        pair(Call("nn.init.normal_", (P("w"),))),
    ),
    Regression("renorm_ as well", "functions", pair(Call("torch.Tensor.renorm_", (P("w"), 2, 0, 0.5)))),
    Regression(
        "an assignment by its method, called as a function",
        "functions",
        pair(Call("torch.Tensor.__setitem__", (P("w"), 0, 0.25))),
    ),
    Regression(
        "+= by its method, called as a function", "functions", pair(Call("torch.Tensor.__iadd__", (P("w"), 0.25)))
    ),
    Regression(
        "frozen weights: the convolution did not keep its input for backward, the fold does, and then it is written to",
        "functions",
        pair(after=(Call("nn.init.constant_", (P("x0"), 0.25)), Call("nn.init.constant_", (V(0), 0.25))), g=True),
    ),
    Regression(
        "the same with the weight",
        "functions",
        pair(after=(Call(".mul_", (P("w"), 2.0)),), g=True),
    ),
    Regression(
        "torch.batch_norm in eval mode was taken for one that trains: the first pair folded in a second pass only",
        "modules",
        chain_by_torch_batch_norm(),
    ),
    Regression(
        "metadata of make_fx and export is detached: a trained bias was taken for a frozen one and lost its gradient",
        "aten",
        pair(g=True, h=True),
        "kernels",
    ),
    Regression(
        "one launch folded a pair that trains and a frozen one, whose convolution then kept its input for backward",
        "functions",
        frozen_beside_what_trains(),
        "kernels",
    ),
    Regression(
        "a Linear on three dimensions returns a view, and autograd forbids writes to views from a custom function",
        "functions",
        flattened(Call("torch.relu_", (V(3),))),
        options={"codegen": False, "when": "always"},
    ),
    Regression(
        "a part of the convolution's output that nothing reads came before the folded convolution that it read",
        "functions",
        pair(Call("operator.getitem", (V(1), 0))),
    ),
    Regression(
        "autocast leaves torch.convolution alone on a CPU",
        "functions",
        under_autocast(),
        options={"codegen": False, "when": "always"},
    ),
    Regression(
        "the results of aten.native_batch_norm counted as unknown memory: the second pair folded in a second pass only",
        "aten after dispatch",
        chain_around_a_write(),
    ),
    Regression(
        "autocast rounds one of two convolutions whose sum was merged, which a graph of make_fx does not show",
        "aten",
        sum_under_autocast(),
    ),
    Regression(
        "the vectors of two BatchNorms in a graph of make_fx are fake tensors of two modes, which were computed with",
        "aten",
        batch_norms_in_a_row(),
        "kernels",
    ),
    Regression(
        "rounding was compared with rounding: a BatchNorm in training mode of what is constant",
        "functions",
        rounding_alone(),
    ),
    Regression(
        "the example of a Linear in bf16 was fp32, as autocast does not reach fakes: its fold was rounded to fp32",
        "aten of fakes",
        linear_after_autocast(),
    ),
    Regression(
        "the weights of a sum were merged by writes to views of a tensor subclass, which a graph of make_fx hides",
        "aten",
        sum_with_a_subclass(),
        options={"codegen": False, "when": "always"},
    ),
    Regression(
        "a view of a chunk took the place of a BatchNorm's output, and autograd forbids writes to it",
        "functions",
        pair(
            Call(".chunk", (V(1), 2, 0)),
            Call("operator.getitem", (V(2), 0)),
            after=(Call("torch.relu_", (V(4),)),),
            w=True,
            normalized=3,
        ),
        options={"codegen": False, "when": "always"},
    ),
    Regression(
        "not the fold: the original graph read what was written to a subclass, and the fold what the forward had read",
        "aten",
        written_subclass(),
    ),
    Regression(
        "a folded weight that vmap batches was rounded as autocast rounds, which does not round the input beside it",
        "captured",
        vmap_of_norms_under_autocast(),
        options={"when": "always"},
        since=(2, 12),
    ),
    Regression(
        "the layout of a tensor under vmap was asked for, which torch does not tell",
        "captured",
        norm_of_a_sum_in_vmap(),
        options={"when": "always"},
    ),
]
