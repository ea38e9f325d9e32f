"""What may stand between a convolution and its BatchNorm, and what may not. What folds everywhere is in cases.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import Calls, concatenated, flattened
from checking import TOLERANCES, capture_aten, check, counted, dynamo, errors, reasons, results, scramble
from test_match import Builder
from torch import fx, nn

from triton_convbn import ConvBNPass, explain
from triton_convbn.graph.match import find
from triton_convbn.graph.reasons import Reason
from triton_convbn.ops.library import fold_op

SHAPE = (2, 4, 9, 8)


def conv(channels=6, **options):
    return nn.Conv2d(4, channels, 3, **options)


def bn2d(channels):
    return nn.BatchNorm2d(channels)


def make(call, **modules):
    torch.manual_seed(0)
    return scramble(Calls(call, **modules).eval(), 1e-3)


def same_as_eager(model, x):
    """Also where a run writes to the model, and so each gets a copy."""
    ran, eager = copy.deepcopy(model), copy.deepcopy(model)
    for name, error in errors(results(dynamo(ran), ran, x), results(eager, eager, x)).items():
        assert error < TOLERANCES[torch.float32], f"{name}: {error:.2e}"


# -- what folds -------------------------------------------------------------------------------------------------------


def test_explain_names_every_convolution():
    model = make(concatenated, a=nn.Conv2d(2, 6, 3), b=nn.Conv2d(2, 4, 3), bn=bn2d(10))
    explanation = explain(model, torch.randn(SHAPE))
    assert [(row.batch_norm, row.conv, row.reason) for row in explanation.rows] == [("bn", "a, b", "")]
    assert explanation.folded == 1
    assert str(explanation).splitlines()[-1] == "1 of 1 fold"


@pytest.mark.parametrize("dim", [2, -1])
def test_concatenation_along_another_dim(dim):
    """Every part has all the channels."""
    model = make(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], dim)), a=conv(), b=conv(), bn=bn2d(6))
    check(dynamo(model), model, torch.randn(SHAPE))
    assert counted() == (1, {})


FOLDS = {
    "flatten behind the channels": (lambda m, x: m.bn(m.a(x).flatten(2)), {"bn": nn.BatchNorm1d(6)}),
    "view and back": (lambda m, x: m.bn(m.a(x).view(-1, 6, 42).view(2, 6, 7, 6)), {"bn": bn2d(6)}),
    "split channels of a part": (
        lambda m, x: m.bn(torch.cat((m.a(x), m.b(x).reshape(2, 4, 7, 6)), 1)),
        {"bn": bn2d(10)},
    ),
    "a concatenation of one": (lambda m, x: m.bn(torch.cat([m.a(x)], 1)), {"bn": bn2d(6)}),
    "then in place": (lambda m, x: m.bn(m.a(x).flatten(2)).relu_(), {"bn": nn.BatchNorm1d(6)}),
    "dropouts": (
        lambda m, x: m.bn(F.dropout2d(F.alpha_dropout(F.dropout(m.a(x), 0.5, False, True), 0.5, False), 0.5, False)),
        {"bn": bn2d(6)},
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds(name):
    call, modules = FOLDS[name]
    model = make(call, a=conv(), b=conv(4), **copy.deepcopy(modules))
    check(dynamo(model), model, torch.randn(SHAPE))
    assert counted() == (1, {})


@pytest.mark.parametrize("make_model", ["concatenation", "linear"])
def test_dynamic_shapes(make_model):
    if make_model == "linear":
        model, shapes = make(flattened, linear=nn.Linear(8, 5), bn=nn.BatchNorm1d(5)), [(n, 7, 8) for n in (3, 5, 6)]
    else:
        model = make(concatenated, a=nn.Conv2d(2, 6, 3), b=nn.Conv2d(2, 4, 3), bn=bn2d(10))
        shapes = [(n, 4, 9, 8) for n in (3, 5, 6)]
    captured = []
    compiled = dynamo(model, captured)
    for shape in shapes:
        check(compiled, model, torch.randn(shape))
    assert len(captured) == 2, "once for the first size, once for any size"
    assert counted() == (2, {})


def test_layout_of_the_result():
    """A copy that lays out anew is made of the folded convolution, too."""
    model = make(lambda m, x: m.bn(m.a(x).contiguous()), a=conv(), bn=bn2d(6)).to(memory_format=torch.channels_last)
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    want, found = model(x), dynamo(model)(x)
    assert counted() == (1, {})
    assert found.stride() == want.stride() != model.a(x).stride()


@pytest.mark.parametrize("group", [1, 2, 16])
def test_kernels(group, monkeypatch):
    """Each convolution of a concatenation is a pair of its own to the kernels, wherever the groups end."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def call(m, x):
        return concatenated(m.second, concatenated(m.first, x)[:, :4])

    def mixed():
        return Calls(concatenated, a=nn.Conv2d(2, 6, 3), b=nn.Conv2d(2, 4, 1, padding=0), bn=bn2d(10))

    for each in (first := mixed(), second := mixed()):
        each.b = nn.Conv2d(2, 4, 3, groups=2, bias=False)
    model = make(call, first=first, second=second)
    gm = capture_aten(copy.deepcopy(model), x := torch.randn(SHAPE))
    ConvBNPass(kernel="triton", pairs_per_launch=group)(gm.graph)
    gm.graph.lint()
    gm.recompile()
    launches = [len(node.args[0]) for node in gm.graph.nodes if node.target is fold_op]
    assert launches == {1: [1] * 4, 2: [2, 2], 16: [4]}[group]
    check(gm, model, x, params_of=gm)


@pytest.mark.parametrize("frozen", [(), ("bn.weight",), ("bn.bias", "a.weight")])
def test_gradients_with_some_frozen(frozen):
    """A slice takes its part of the gradient, and the parts add up to that of the vector."""
    model = make(concatenated, a=nn.Conv2d(2, 6, 3), b=nn.Conv2d(2, 4, 3), bn=bn2d(10))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    check(dynamo(model), model, torch.randn(SHAPE))


def test_pays_as_one():
    """The BatchNorm of a concatenation folds into all of its convolutions or none."""
    model = make(concatenated, a=nn.Conv2d(2, 6, 3), b=nn.Conv2d(2, 4, 3), bn=bn2d(10))
    check(dynamo(model, when="profitable"), model, torch.randn(SHAPE))
    model.bn.weight.requires_grad_(False)
    check(dynamo(model, when="profitable"), model, torch.randn(SHAPE))
    assert counted() == (1, {"does_not_pay": 1})


def test_a_second_pass_changes_nothing():
    model = make(concatenated, a=nn.Conv2d(2, 6, 3), b=nn.Conv2d(2, 4, 3), bn=bn2d(10))
    gm = capture_aten(model, torch.randn(SHAPE))
    for _ in range(2):
        before = gm.code
        ConvBNPass()(gm.graph)
        gm.recompile()
    assert gm.code == before
    gm.register_buffer("again", torch.ones(10))  # a second BatchNorm is added after the first pass
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        ones = gm.graph.get_attr("again")
        gm.graph.call_function(F.batch_norm, (output.all_input_nodes[0], ones, ones))
    assert reasons(find(gm.graph)) == [Reason.ALREADY_FOLDED]


# -- what stays -------------------------------------------------------------------------------------------------------


def cat(m, *parts, dim=1):
    return m.bn(torch.cat(parts, dim))


def written(m, x):
    x = x * 1
    y = m.a(x)
    x.add_(1)
    return cat(m, y, m.b(x))


def part_used(m, x):
    y = m.a(x)
    return cat(m, y, m.b(x)) + y.mean()


def whole_used(m, x):
    y = torch.cat((m.a(x), m.b(x)), 1)
    return m.bn(y) + y


def step_used(m, x):
    y = m.a(x).flatten(2)
    return m.bn(y) + y


def shape_taken_before(m, x):
    y = m.a(x)
    other = x.flatten()[: y.numel() // 4 * 4].repeat(4)[: y.numel()].view_as(y)
    return m.bn(y) + other


def one_in_16_bit(m, x):
    return m.bn(torch.cat((m.a(x.bfloat16()), m.b(x)), 1))


STAYS = {
    "not all convolutions": (lambda m, x: cat(m, m.a(x), x[:, :, 1:8, 1:7]), Reason.CONCATENATION, bn2d(10)),
    "a pool among them": (lambda m, x: cat(m, m.a(x), F.max_pool2d(m.b(x), 1)), Reason.CONCATENATION, bn2d(10)),
    "one of them twice": (lambda m, x: (lambda y: cat(m, y, y))(m.a(x)), Reason.CONV_SHARED, bn2d(12)),
    "a part used": (part_used, Reason.CONV_SHARED, bn2d(10)),
    "the whole used": (whole_used, Reason.CONV_SHARED, bn2d(10)),
    "a step used": (step_used, Reason.CONV_SHARED, nn.BatchNorm1d(6)),
    "shape taken before": (shape_taken_before, Reason.CONV_SHARED, bn2d(6)),
    "written between": (written, Reason.MUTATED, bn2d(10)),
    "a part in 16 bit": (one_in_16_bit, Reason.DTYPE, bn2d(10)),
    "channels and positions flattened": (
        lambda m, x: m.bn(m.a(x).flatten(1)),
        Reason.CHANNELS_MOVED,
        nn.BatchNorm1d(252),
    ),
    "channels cut in two": (lambda m, x: m.bn(m.a(x).view(2, 3, 14, 6)), Reason.CHANNELS_MOVED, bn2d(3)),
    "positions for channels": (lambda m, x: m.bn(m.a(x).view(2, 42, 6)), Reason.CHANNELS_MOVED, nn.BatchNorm1d(42)),
    "positions as many as channels": (
        lambda m, x: m.bn(m.a(x).view(12, 7, 6)),
        Reason.CHANNELS_MOVED,
        nn.BatchNorm1d(7),
    ),
    "transposed": (lambda m, x: m.bn(m.a(x).transpose(1, 3)), Reason.CHANNELS_MOVED, bn2d(6)),
    "dropout that drops": (lambda m, x: m.bn(F.dropout(m.a(x), 0.0, True)), Reason.INPUT_NOT_CONV, bn2d(6)),
    "bits read anew": (
        lambda m, x: m.bn(m.a(x).view(torch.int32).view(torch.float32)),
        Reason.INPUT_NOT_CONV,
        bn2d(6),
    ),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name):
    call, reason, bn = STAYS[name]
    model = make(call, a=conv(), b=conv(4), bn=copy.deepcopy(bn))
    if name == "a part in 16 bit":
        model.a.bfloat16()
    (row,) = explain(model, x := torch.randn(SHAPE)).rows
    assert (row.batch_norm, row.reason, row.why) == ("bn", reason.value, reason.text)
    with torch.set_grad_enabled(call is not written):  # autograd refuses what eager computes there
        same_as_eager(model, x)
    assert counted() == (0, {reason.value: 1})


def test_linear_whose_rows_become_columns():
    """Seven rows of five: as five rows of seven the BatchNorm sees other numbers in every channel."""
    model = make(lambda m, x: m.bn(m.linear(x).reshape(-1, 7)), linear=nn.Linear(8, 5), bn=nn.BatchNorm1d(7))
    same_as_eager(model, torch.randn(3, 7, 8))
    assert counted() == (0, {"channels_moved": 1})
    model = make(lambda m, x: m.bn(m.linear(x).flatten(1)), linear=nn.Linear(8, 5), bn=nn.BatchNorm1d(35))
    same_as_eager(model, torch.randn(3, 7, 8))
    assert counted() == (0, {"channels_moved": 2})


def graph_of(mean, *, part=None, reshape=False):
    b = Builder()
    x, mean = b.input("x", 2, 4, 9, 9), b.input("mean", mean)
    ys = [b.call(torch.conv2d, x, b.input(f"w{i}", 6, 4, 3, 3), shape=(2, 6, 7, 7)) for i in range(2)]
    y = b.call(torch.cat, ys, 1, shape=(2, 12, 7, 7))
    if reshape:
        y = b.graph.call_method("view", (y, 2, 12, 7, 7))
    b.graph.output(b.call(F.batch_norm, y, mean, mean))
    return b.reasons()


def test_vectors_that_do_not_fit_the_concatenation():
    assert graph_of(12) == 2, "two pairs"
    for channels in (6, 11, 13):
        assert graph_of(channels) == [Reason.CHANNELS]
    assert graph_of(12, reshape=True) == [Reason.UNKNOWN_SHAPE]


def test_a_part_with_other_channels_than_the_rest():
    """Along the batch: twelve channels from two convolutions, and six that claim to be twelve."""
    b = Builder()
    x, mean = b.input("x", 2, 4, 9, 9), b.input("mean", 12)
    ys = [b.call(torch.conv2d, x, b.input(f"w{i}", 6, 4, 3, 3), shape=(2, 6, 7, 7)) for i in range(3)]
    y = b.call(torch.cat, [b.call(torch.cat, ys[:2], 1, shape=(2, 12, 7, 7)), ys[2]], 0, shape=(4, 12, 7, 7))
    b.graph.output(b.call(F.batch_norm, y, mean, mean))
    assert b.reasons() == [Reason.CHANNELS]


@pytest.mark.parametrize(("shape", "reason"), [(None, Reason.UNKNOWN_SHAPE), ((2, 6, 6, 6), Reason.NOT_PER_CHANNEL)])
def test_frozen_along_the_last_dim_behind_a_step(shape, reason):
    b = Builder()
    x, w = b.input("x", 2, 4, 8, 8), b.input("w", 6, 4, 3, 3)
    mean, var = b.input("mean", 6), b.input("var", 6)
    y = b.call(torch.clone, b.call(torch.conv2d, x, w, shape=(2, 6, 6, 6)), shape=shape)
    scale = b.call(torch.rsqrt, var)
    shift = b.call(torch.neg, b.call(torch.mul, mean, scale))
    b.graph.output(b.call(torch.add, b.call(torch.mul, y, scale), shift))
    assert b.reasons() == [reason]


def test_steps_of_modules():
    """In a traced module: in eval mode, without hooks, as torch has them."""

    def found(step, net=nn.Module.eval):
        gm = fx.symbolic_trace(net(nn.Sequential(conv(), step, bn2d(6))))
        return reasons(find(gm.graph))

    assert found(nn.Identity()) == found(nn.Dropout(0.5)) == found(nn.Dropout2d()) == []
    assert found(nn.Flatten(2)) == [Reason.UNKNOWN_SHAPE]
    hooked = nn.Identity()
    hooked.register_forward_hook(lambda _m, _x, y: y * 2)
    assert found(hooked) == [Reason.INPUT_NOT_CONV]
    net = nn.Sequential(conv(), nn.Dropout(0.5), bn2d(6)).eval()
    net[1].train()
    assert reasons(find(fx.symbolic_trace(net).graph)) == [Reason.INPUT_NOT_CONV]
