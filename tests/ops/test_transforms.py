"""Transforms of torch.func, forward mode and batched gradients give what they give without a fold."""

import copy

import pytest
import torch
from checking import counted, scramble
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_leaves, tree_map

from triton_convbn import ConvBNPass, conv_bn_eval

LAYERS = {
    "conv": (lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)], (2, 3, 5, 5)),
    "linear": (lambda: [nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)], (6, 3)),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)], (2, 4, 3, 3)),
}


def model_and_input(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    return scramble(nn.Sequential(*make()).eval(), 1e-3).double(), torch.randn(shape, dtype=torch.float64)


def weighted(y):
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sin().sum()


def forward_mode(f, p, x, tangents):
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(value.detach(), tangents[0][name]) for name, value in p.items()}
        return forward_ad.unpack_dual(f(duals, forward_ad.make_dual(x, tangents[1]))).tangent


def batched(f, p, x):
    leaves = {name: value.detach().requires_grad_() for name, value in p.items()}
    y = f(leaves, x)
    grads = torch.stack([torch.ones_like(y), y.detach(), 2 * y.detach()])
    return torch.autograd.grad(y, list(leaves.values()), grads, is_grads_batched=True)


def stacked(p):
    return {name: torch.stack([value.detach(), 2 * value.detach(), value.detach() - 1]) for name, value in p.items()}


def tangents_of(p, x):
    return tree_map(lambda value: torch.cos(3 * value.detach()), (p, x))


TRANSFORMS = {
    "grad": lambda f, p, x: grad(lambda p, x: weighted(f(p, x)), argnums=(0, 1))(p, x),
    "vjp": lambda f, p, x: vjp(f, p, x)[1](torch.ones_like(f(p, x))),
    "jvp": lambda f, p, x: jvp(f, (p, x), tangents_of(p, x)),
    "jvp of parameters": lambda f, p, x: jvp(lambda p: f(p, x), (p,), (tangents_of(p, x)[0],)),
    "forward mode": lambda f, p, x: forward_mode(f, p, x, tangents_of(p, x)),
    "vmap of inputs": lambda f, p, x: vmap(lambda x: f(p, x))(torch.stack([x, 2 * x])),
    "vmap of models": lambda f, p, x: vmap(lambda p: f(p, x))(stacked(p)),
    "vmap of grad": lambda f, p, x: vmap(grad(lambda p: weighted(f(p, x))))(stacked(p)),
    "jacrev": lambda f, p, x: jacrev(lambda p: f(p, x))(p),
    "jacfwd": lambda f, p, x: jacfwd(lambda p: f(p, x))(p),
    "hessian": lambda f, p, x: hessian(lambda p: weighted(f(p, x)))(p),
    "batched gradients": batched,
}


def by_hand(model, p, x):
    conv, bn = (copy.copy(module) for module in model)
    conv._parameters = {name: p.get(f"0.{name}") for name in conv._parameters}
    bn._parameters = {name: p[f"1.{name}"] for name in bn._parameters}
    return conv_bn_eval(conv, bn, x)


def folded(form, model, p, x, **options):
    """Return the model as a function of its parameters, folded in one of the ways to get a graph."""
    if form == "by hand":
        return lambda p, x: by_hand(model, p, x)
    if form == "make_fx":
        gm = make_fx(lambda p, x: functional_call(model, p, (x,)))(p, x)
    else:
        gm = symbolic_trace(copy.deepcopy(model))
        ShapeProp(gm).propagate(x)
    ConvBNPass(**options)(gm.graph)
    gm.recompile()
    assert counted() == (1, {})
    return gm if form == "make_fx" else lambda p, x: functional_call(gm, p, (x,))


@pytest.mark.parametrize("codegen", [True, False])
@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("form", ["symbolic_trace", "make_fx", "by hand"])
@pytest.mark.parametrize("kind", LAYERS)
def test_transforms(kind, form, kernel, codegen, monkeypatch):
    """An operator on lists of tensors has no rules for forward mode and vmap. Its jvp was zero."""
    if kernel == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, x = model_and_input(kind)
    p = dict(model.named_parameters())
    f = folded(form, model, p, x, kernel=kernel, codegen=codegen)
    for name, transform in TRANSFORMS.items():
        want = tree_leaves(transform(lambda p, x: functional_call(model, p, (x,)), p, x))
        got = tree_leaves(transform(f, p, x))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("name", ["grad", "jvp", "vmap of models", "vmap of grad", "jacrev"])
def test_transforms_that_dynamo_captures(name, kernel, monkeypatch):
    """The layout of a wrapped tensor is unknown, also where kernels fold."""
    if kernel == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, x = model_and_input("conv")
    p = dict(model.named_parameters())

    def run(p, x):
        return TRANSFORMS[name](lambda p, x: functional_call(model, p, (x,)), p, x)

    def backend(gm, _example_inputs):
        ConvBNPass(kernel=kernel, when="always", codegen=False)(gm.graph)
        gm.recompile()
        return gm.forward

    want = tree_leaves(run(p, x))
    counters.clear()
    got = tree_leaves(torch.compile(run, backend=backend)(p, x))
    assert counted()[0] > 0
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_an_ensemble_that_trains_is_profitable():
    """A functorch wrapper has requires_grad=False, also if what it wraps requires a gradient."""
    model, x = model_and_input("conv")
    params = stacked(dict(model.named_parameters()))
    params = {name: value.requires_grad_() for name, value in params.items()}

    def run(params):
        return vmap(lambda p: functional_call(model, p, (x,)))(params)

    run = torch.compile(run, backend="triton_convbn_eager")
    torch.testing.assert_close(run(params), vmap(lambda p: functional_call(model, p, (x,)))(params))
    assert counted() == (1, {})


def test_conv_bn_eval_on_meta_tensors():
    model, x = model_and_input("conv")
    conv, bn = model.to("meta")
    assert conv_bn_eval(conv, bn, x.to("meta")).shape == (2, 4, 3, 3)


class Concatenated(nn.Module):
    """Two convolutions before one BatchNorm, each of which takes its part of the vectors."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(5)

    def forward(self, x):
        return self.bn(torch.cat([self.a(x), self.b(x)], 1))


@pytest.mark.parametrize("interpreted", [False, True])
def test_parts_of_batched_vectors(interpreted, monkeypatch):
    """An ensemble of BatchNorms behind a concatenation: its vectors are batched where the graph is rewritten."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    torch.manual_seed(0)
    model = scramble(Concatenated().eval(), 1e-3).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    weights = torch.stack([model.bn.weight.detach(), -2 * model.bn.weight.detach()])

    def each(model):
        return lambda weight, x: functional_call(model, {"bn.weight": weight}, (x,))

    def ensemble(weights, x):
        return vmap(each(model), in_dims=(0, None))(weights, x)

    expected = ensemble(weights, x)

    def backend(gm, _inputs):
        ConvBNPass(when="always")(gm.graph)
        gm.recompile()
        return gm.forward

    found = torch.compile(ensemble, backend=backend, fullgraph=True)(weights, x)
    assert counters["triton_convbn"]["folded"] == 1
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
