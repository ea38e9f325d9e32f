"""Writes to what a fold reads, anywhere in a graph, and calls that only read."""

import copy

import pytest
import torch
import torch.nn.functional as F
from checking import check, counted, dynamo, scramble
from torch import fx, nn
from torch._dynamo.utils import counters
from torch.func import grad, vmap
from torch.fx.passes.shape_prop import ShapeProp

from triton_convbn import ConvBNPass
from triton_convbn.graph.reasons import Reason


def pair():
    return scramble(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).eval(), 1e-3)


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.m, self.call = pair(), forward

    def forward(self, x):
        return self.call(self.m, x)


def writing(write):
    def forward(m, x):
        with torch.no_grad():
            write(m)
        return F.silu(m(x))

    return forward


WRITES = {
    "weight": lambda m: m[0].weight.clamp_(-0.1, 0.05),
    "bias": lambda m: m[0].bias.add_(0.5),
}
# With torch 2.14 plain Inductor loses these writes too.
LOST_BY_INDUCTOR = {
    "view of weight": lambda m: m[0].weight[0].mul_(0.5),
    "bn.weight": lambda m: m[1].weight.mul_(0.5),
    "bn.bias": lambda m: m[1].bias.add_(0.5),
    "statistics": lambda m: m[1].running_mean.add_(0.5),
}


def state_after_a_step(model, compiled, x):
    """Output, gradients, and what parameters and buffers hold afterwards."""
    y = compiled(x)
    y.sin().sum().backward()
    return [y.detach(), *[p.grad for p in model.parameters()], *model.state_dict().values()]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_before_the_pair_is_not_lost(name, recompute):
    """A max-norm constraint in forward. AOTAutograd saves the written parameter, and Inductor drops the write."""
    model = Net(writing(WRITES[name]))
    other = copy.deepcopy(model)
    want = state_after_a_step(model, model, X)
    compiled = torch.compile(other, backend="triton_convbn", options={"recompute": recompute})
    torch.testing.assert_close(state_after_a_step(other, compiled, X), want, rtol=1e-4, atol=1e-4)
    assert counted() == (0, {"mutated": 1})


@pytest.mark.slow
@pytest.mark.parametrize("name", LOST_BY_INDUCTOR)
def test_a_write_before_the_pair_is_left_to_inductor(name):
    torch.compile(Net(writing(LOST_BY_INDUCTOR[name])), backend="triton_convbn")(X)
    assert counted() == (0, {"mutated": 1})


def test_a_write_before_the_pair_folds_in_inference():
    model = Net(writing(WRITES["weight"]))
    with torch.no_grad():
        torch.compile(model, backend="triton_convbn", options={"when": "always"})(X)
    assert counted() == (1, {})


def test_a_write_to_another_tensor_folds():
    def forward(m, x):
        return m(x.clone().mul_(2.0))

    check(dynamo(model := Net(forward)), model, X)
    assert counted() == (1, {})


@torch.library.custom_op("triton_convbn_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


twice.register_autograd(lambda _ctx, grad: grad * 2)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def checkpointed(m, x):
    return torch.utils.checkpoint.checkpoint(lambda w: w.sin().sum(), m[0].weight, use_reentrant=False) + m(x)


READERS = {
    "padding": lambda m, x: m(torch._C._nn.pad(x, (1, 1, 1, 1))),
    "silu": lambda m, x: m(x) + torch._C._nn.silu(m[0].weight).sum(),
    "upsampling": lambda m, x: m(x) + torch._C._nn.upsample_nearest2d(m[0].weight, (6, 6)).sum(),
    "sigmoid": lambda m, x: m(x) + F.sigmoid(m[0].weight).sum(),
    "tanh": lambda m, x: m(x) + F.tanh(m[0].weight).sum(),
    "data": lambda m, x: m(x) + m[0].weight.data.sum(),
    "packet": lambda m, x: m(x) + torch.ops.aten.add(m[0].weight, 1).sum(),
    "custom packet": lambda m, x: m(x) + torch.ops.triton_convbn_tests.twice(m[0].weight).sum(),
    "custom operator": lambda m, x: m(x) + twice(m[0].weight).sum(),
    "checkpoint": checkpointed,
    "autograd.Function": lambda m, x: m(x) + Double.apply(m[0].weight).sum(),
    "vmap": lambda m, x: m(x) + vmap(lambda w: w.sin().sum())(m[0].weight).sum(),
    "func.grad": lambda m, x: m(x) + grad(lambda w: w.sin().sum())(m[0].weight).sum(),
    "cond": lambda m, x: m(x) + torch.cond(x.sum() > 1e9, lambda w: w.sum(), lambda w: w.sin().sum(), (m[0].weight,)),
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_is_no_writer(name):
    model = Net(READERS[name])
    check(dynamo(model), model, X)
    assert counted() == (1, {})


def test_a_gradient_asked_for_in_the_graph():
    def forward(m, x):
        y = m(x)
        (found,) = torch.autograd.grad(y.sin().sum(), [m[1].weight], retain_graph=True)
        return y + found.sum()

    model = Net(forward)
    compiled = torch.compile(model, backend="triton_convbn_eager")
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-4)
    assert counted() == (1, {})


WRITERS = {
    "data": lambda m, x: (m(x), m[0].weight.data.mul_(0.5))[0],
    "custom operator": lambda m, x: (m(x), torch.ops.aten.mul_(m[1].running_mean, 0.5))[0],
    "packet with out": lambda m, x: (m(x), torch.ops.aten.add(m[1].running_mean, 1, out=m[1].running_mean))[0],
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_after_the_pair(name):
    model = Net(WRITERS[name])
    torch.compile(model, backend="triton_convbn_eager")(X)
    assert counted() == (0, {"mutated": 1})


@pytest.mark.parametrize("step", ["add_", "view", "contiguous after"])
def test_long_chains_of_one_tensor(step):
    """600 operations in place were a RecursionError."""

    def forward(m, x):
        y = x.clone() if step != "contiguous after" else m[0](x)
        for _ in range(1200):
            y = y.add_(1e-6) if step == "add_" else y.view(2, 3, 8, 8) if step == "view" else y.contiguous()
        return m[1](y) if step == "contiguous after" else m(y)

    gm = fx.symbolic_trace(Net(forward).eval())
    ShapeProp(gm).propagate(X)
    counters.clear()
    ConvBNPass()(gm.graph)
    assert counted() == (1, {})


@pytest.mark.parametrize("where", ["0.weight", "1.bias"])
def test_tensor_subclasses(where):
    """A quantized weight has no elementwise product."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = pair()
    module, name = model.get_submodule(where.split(".")[0]), where.split(".")[1]
    value = getattr(module, name).detach()
    setattr(module, name, nn.Parameter(TwoTensor(value, value.clone())))
    torch.compile(model, backend="triton_convbn_eager")(X)
    assert counted() == (0, {Reason.TENSOR_SUBCLASS.value: 1})


class Coarse(torch.Tensor):
    """An activation whose convolutions round their weight, as dynamic quantization does."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, _context, _size, _stride):
        return Coarse(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = [each.inner if isinstance(each, Coarse) else each for each in args]
        if func is torch.ops.aten.convolution.default:
            args[1] = (args[1] * 4).round() / 4
        found = func(*args, **(kwargs or {}))
        return Coarse(found) if isinstance(found, torch.Tensor) else (Coarse(found[0]), *found[1:])


def test_an_activation_of_a_tensor_subclass():
    """The scale of a folded weight would be rounded with it."""
    model = pair()
    with torch.no_grad():
        got = torch.compile(model, backend="triton_convbn_eager", options={"when": "always"})(Coarse(X))
        assert torch.equal(got.inner, model(Coarse(X)).inner)
    assert counted() == (0, {Reason.TENSOR_SUBCLASS.value: 1})


class Product(nn.Module):
    def __init__(self, product):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
        self.bn, self.product = scramble(nn.Sequential(nn.BatchNorm1d(4)).eval(), 1e-3), product

    def forward(self, x):
        return self.bn(self.product(x, self.weight, self.bias))


PRODUCTS = {
    "addmm": (lambda x, w, b: torch.addmm(b, x, w.t()), 1),
    "addmm of T": (lambda x, w, b: torch.addmm(b, x, w.T), 1),
    "matmul": (lambda x, w, b: x @ w.t(), 1),
    "mm": (lambda x, w, b: torch.mm(x, w.mT), 1),
    "method": (lambda x, w, b: x.mm(w.transpose(0, 1)), 1),
    "beta": (lambda x, w, b: torch.addmm(b, x, w.t(), beta=2), 0),
    "no transpose": (lambda x, w, b: x @ (w.t() * 1.0), 0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_transposed_weight_is_a_linear(name):
    product, folds = PRODUCTS[name]
    model, x = Product(product).eval(), torch.randn(5, 3)
    check(dynamo(model), model, x)
    assert counted()[0] == folds


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*pair(), nn.ReLU())

    def forward(self, x):
        x = self.layers[0](x)
        return self.layers[1:](x)


def test_a_slice_of_a_sequential():
    """Dynamo records that torch counts how often a module is made."""
    model = Sliced().eval()
    check(dynamo(model), model, X)
    assert counted() == (1, {})
