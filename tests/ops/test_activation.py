"""Convolutions that save the input of the activation before them, in eager mode."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from cases import Calls
from checking import CAPTURES, TOLERANCES, errors, results, scramble
from torch import nn
from torch.utils.checkpoint import checkpoint

from triton_convbn import ConvBNPass
from triton_convbn.measure import peak_bytes, saved_for_backward
from triton_convbn.ops.activation import conv_of_activation

LAYERS = 4
SHAPE = (2, 4, 8, 8)
SAVES_INPUT = [
    nn.SiLU,
    nn.GELU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.ReLU6,
    nn.ELU,
    nn.SELU,
    nn.Softplus,
    nn.PReLU,
    nn.LeakyReLU,
]


def network(activation):
    torch.manual_seed(0)
    layers = [(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), activation()) for _ in range(LAYERS)]
    return scramble(nn.Sequential(*(module for layer in layers for module in layer)).eval(), 1e-3)


def eager(model, **options):
    return torch.compile(model, backend="triton_convbn_eager", options=options)


VECTORS = LAYERS * 4 * 20
"""The bytes of scales and statistics: 20 for each of the four channels of a layer."""


def units(run, model):
    """How many tensors of an activation's size a forward keeps."""
    x = torch.randn(SHAPE, requires_grad=True)
    run(x)
    with saved_for_backward(model) as saved:
        run(x)
    return (sum(saved.storages.values()) - VECTORS) / x.nbytes


def same(found, want):
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("activation", [*SAVES_INPUT, lambda: nn.SiLU(inplace=True), lambda: nn.ReLU6(inplace=True)])
def test_one_tensor_a_layer(activation):
    """The gradients are those of a fold that saves both, bit for bit."""
    model = network(activation)
    both = eager(model, recompute_activations=False)
    x = torch.randn(SHAPE)
    want = results(both, model, x)
    assert units(both, model) == 2 * LAYERS
    torch._dynamo.reset()
    one = eager(model)
    same(results(one, model, x), want)
    assert units(one, model) == LAYERS + 1


def test_the_output_of_the_activation_is_freed():
    y = torch.randn(2, 3, requires_grad=True) * 2
    activated = F.silu(y)
    seen = weakref.ref(activated)
    z = conv_of_activation("linear", "silu", (y,), {}, activated, torch.randn(4, 3, requires_grad=True))
    del activated
    assert seen() is None
    z.sum().backward()


def test_peak_memory():
    model = network(nn.SiLU)
    x = torch.randn(SHAPE)
    peaks = []
    for recompute in (False, True):
        torch._dynamo.reset()
        run = eager(model, recompute_activations=recompute)
        run(x).sum().backward()
        peaks.append(peak_bytes(lambda run=run: run(x), torch.device("cpu")))
    assert peaks[1] <= peaks[0] - (LAYERS - 2) * x.nbytes


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh, lambda: nn.LeakyReLU(inplace=True)])
def test_activations_that_save_their_output_stay(activation):
    model = network(activation)
    assert units(eager(model), model) == LAYERS + 1


def residual(m, x):
    y = F.silu(m.bn(m.conv(x)))
    return F.silu(m.other(m.next(y))) + y


def read_by_a_product(m, x):
    y = F.silu(m.bn(m.conv(x)))
    return F.silu(m.other(m.next(y))) * y


def two_layers(call):
    torch.manual_seed(0)
    modules = {"conv": nn.Conv2d(4, 4, 3, padding=1), "next": nn.Conv2d(4, 4, 3, padding=1)}
    return scramble(Calls(call, **modules, bn=nn.BatchNorm2d(4), other=nn.BatchNorm2d(4)).eval(), 1e-3)


@pytest.mark.parametrize("call", [residual, read_by_a_product])
def test_other_readers(call):
    model = two_layers(call)
    want = results(eager(model, recompute_activations=False), model, x := torch.randn(SHAPE))
    torch._dynamo.reset()
    graphs = []

    def backend(gm, _inputs):
        ConvBNPass(codegen=False)(gm.graph)
        gm.recompile()
        graphs.append(gm)
        return gm.forward

    run = torch.compile(model, backend=backend)
    same(results(run, model, x), want)
    calls = [node for node in graphs[0].graph.nodes if node.target is conv_of_activation]
    assert len(calls) == (call is residual)


@pytest.mark.parametrize("capture", ["aten", "decomposed"])
def test_graphs_by_hand(capture):
    model, x = network(nn.SiLU), torch.randn(SHAPE)
    gm = CAPTURES[capture](copy.deepcopy(model), x)
    ConvBNPass(codegen=False)(gm.graph)
    gm.graph.lint()
    gm.recompile()
    calls = [node for node in gm.graph.nodes if node.target is conv_of_activation]
    assert len(calls) == (LAYERS - 1) * (capture == "aten"), "a decomposed SiLU is a sigmoid and a product"
    for name, error in errors(results(gm, gm, x), results(model, model, x)).items():
        assert error < TOLERANCES[torch.float32], name


def test_second_derivatives():
    model = network(nn.SiLU).double()
    leaves = [x := torch.randn(SHAPE, dtype=torch.float64, requires_grad=True), *model.parameters()]

    def penalty(run):
        grads = torch.autograd.grad(run(x).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves, allow_unused=True)

    for found, want in zip(penalty(eager(model)), penalty(model), strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "batched"])
def test_transforms(transform):
    model = network(nn.SiLU).double()
    x = torch.randn(SHAPE, dtype=torch.float64)
    gm = CAPTURES["aten"](copy.deepcopy(model), x)
    ConvBNPass(codegen=False)(gm.graph)
    gm.recompile()

    def use(f):
        if transform == "grad":
            return torch.func.grad(lambda x: f(x).square().sum())(x)
        if transform == "jvp":
            return torch.func.jvp(f, (x,), (x.cos(),))[1]
        if transform == "vmap":
            return torch.func.vmap(f, randomness="same")(torch.stack([x, x.cos()]))
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        return torch.autograd.grad(y, leaf, torch.stack([y.detach(), y.cos().detach()]), is_grads_batched=True)[0]

    torch.testing.assert_close(use(gm), use(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(reentrant):
    model = network(nn.SiLU)
    run = eager(model)
    x = torch.randn(SHAPE)
    want = results(run, model, x)
    same(results(lambda x: checkpoint(run, x, use_reentrant=reentrant), model, x), want)


def test_save_on_cpu():
    model = network(nn.SiLU)
    run = eager(model)
    x = torch.randn(SHAPE)
    want = results(run, model, x)
    with torch.autograd.graph.save_on_cpu():
        found = results(run, model, x)
    same(found, want)


def test_hooks_on_gradients():
    model = network(nn.SiLU)
    found = []
    for run in (model, eager(model)):
        seen = []
        handle = model[0].weight.register_hook(lambda grad, seen=seen: seen.append(grad) or grad * 2)
        found.append((results(run, model, torch.ones(SHAPE)), seen))
        handle.remove()
    for name, error in errors(found[1][0], found[0][0]).items():
        assert error < TOLERANCES[torch.float32], name
    assert len(found[0][1]) == len(found[1][1]) == 1


@pytest.mark.parametrize("index", [0, 3])
def test_a_write_before_backward_raises(index):
    """Also to a convolution's weight, which torch does not check where there are hooks."""
    model = network(nn.SiLU)
    y = eager(model)(torch.randn(SHAPE))
    with torch.no_grad():
        model[index].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_compiled_autograd():
    """It traces the hooks, and knows no versions of the tensors that it traces with."""
    from torch._dynamo import compiled_autograd

    model, x = network(nn.SiLU), torch.randn(SHAPE)
    want = results(model, model, x)
    run = eager(model)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        found = results(run, model, x)
    for name, error in errors(found, want).items():
        assert error < TOLERANCES[torch.float32], name


def test_a_write_to_what_the_activation_reads_raises():
    y = torch.randn(2, 3, requires_grad=True) * 2
    weight = torch.randn(4, 3, requires_grad=True)
    z = conv_of_activation("linear", "silu", (y,), {}, F.silu(y), weight)
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(z.sum(), weight)


def test_autocast():
    model = network(nn.SiLU)
    x = torch.randn(SHAPE)

    def cast(run):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return run(x)

        return call

    want = results(cast(eager(model, recompute_activations=False)), model, x)
    torch._dynamo.reset()
    same(results(cast(eager(model)), model, x), want)


def test_no_gradient():
    model = network(nn.SiLU)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(eager(model)(x), model(x), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(eager(model)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_what_dynamo_compiles():
    model, x = network(nn.SiLU), torch.randn(SHAPE)
    gm = CAPTURES["aten"](copy.deepcopy(model), x)
    ConvBNPass(codegen=False)(gm.graph)
    gm.recompile()
    torch.testing.assert_close(torch.compile(gm, backend="aot_eager")(x), model(x), rtol=1e-4, atol=1e-4)
