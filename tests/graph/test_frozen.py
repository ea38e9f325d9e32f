"""FrozenBatchNorm as arithmetic: it folds however it is spelled, and what only looks like it stays, with a reason."""

import copy

import pytest
import torch
from checking import (
    TOLERANCES,
    capture_aten,
    capture_decomposed,
    check,
    counted,
    dynamo,
    errors,
    reasons,
    results,
    scramble,
)
from frozen import SPELLINGS, Frozen, applied, casts_last, centred, scale_of, up, vectors_first
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from triton_convbn import ConvBNPass, explain
from triton_convbn.graph.match import find
from triton_convbn.graph.reasons import Reason
from triton_convbn.ops.reference import fold_reference


def capture_traced(model, _x):
    """symbolic_trace, but with buffers in the graph: its tracer computes with them while it traces otherwise."""
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    return fx.GraphModule(model, tracer.trace(model))


CAPTURES = {"traced": capture_traced, "aten": capture_aten, "decomposed": capture_decomposed}


def net(call, **options):
    torch.manual_seed(0)
    return scramble(nn.Sequential(nn.Conv2d(3, 6, 3), Frozen(6, call, **options), nn.ReLU()).eval(), eps=1e-3)


def image(dtype=torch.float32):
    return torch.randn(2, 3, 8, 7).to(dtype)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_dynamo(spelling):
    model = net(SPELLINGS[spelling])
    check(dynamo(model), model, image())
    assert counted() == (1, {})


@pytest.mark.parametrize("spelling", ["vectors first", "detectron2"])
def test_eps_that_the_graph_computes(spelling):
    """As Dynamo's first attempt under dynamic=True has it. Adding it is all that is done with it."""
    model = net(SPELLINGS[spelling])
    with torch._dynamo.config.patch(assume_static_by_default=False):
        found = []
        check(dynamo(model, found), model, image())
    assert isinstance(found[0].pairs[0].bn.eps, fx.Node)
    assert counted() == (1, {})


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_captured(spelling, capture):
    if (spelling, capture) == ("detectron2", "traced"):
        pytest.skip("it asks whether x needs a gradient, which no symbolic trace knows")
    model, x = net(SPELLINGS[spelling]), image()
    gm = CAPTURES[capture](copy.deepcopy(model), x.requires_grad_())
    ConvBNPass()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert counted() == (1, {})
    assert not {"mul", "rsqrt", "sqrt", "sub"} & {node.name for node in gm.graph.nodes}, "the arithmetic is gone"
    check(gm, model, x, params_of=gm)
    before = gm.code
    ConvBNPass()(gm.graph)
    gm.recompile()
    assert gm.code == before


@pytest.mark.parametrize(
    "trained", [(), ("weight",), ("weight", "bias"), ("running_mean", "running_var", "weight", "bias")]
)
@pytest.mark.parametrize("interpret", [False, True])
def test_gradients_reach_vectors_that_train(trained, interpret, monkeypatch):
    if interpret:
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    for call in (vectors_first, casts_last, centred):
        model = net(call)
        model[1].trainable(*trained)
        check(dynamo(model, kernel="triton" if interpret else "torch"), model, image())
    assert counted() == (3, {})


CONVS = {
    "linear": (nn.Linear(3, 6), (4, 3)),
    "conv1d": (nn.Conv1d(3, 6, 3, stride=2), (2, 3, 9)),
    "conv3d": (nn.Conv3d(3, 6, 2), (2, 3, 4, 5, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 8, 7)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 4)),
}


@pytest.mark.parametrize("kind", CONVS)
def test_other_convolutions(kind):
    conv, shape = CONVS[kind]
    bn = Frozen(6, vectors_first, rank=len(shape)).trainable("weight")
    model = scramble(nn.Sequential(copy.deepcopy(conv), bn).eval())
    check(dynamo(model), model, torch.randn(shape))
    assert counted() == (1, {})


def test_its_differences_are_no_sums_of_branches():
    model = net(centred)
    check(dynamo(model), model, image())
    assert not [name for name in counters["triton_convbn"] if name.startswith("not_merged")]


def test_gate_after_it():
    """What follows a normalization is its weight only if it is one number a channel."""
    model = net(lambda m, x: SPELLINGS["centred, no weight"](m, x) * x.mean((2, 3), keepdim=True).sigmoid())
    x = image()
    ran = dynamo(model)
    check(ran, model, x)
    assert counted() == (0, {"conv_shared": 1})


def test_decomposed_by_inductors_table():
    """Inductor decomposes `batch_norm`: it centres first."""
    from torch._inductor.decomposition import select_decomp_table

    model = scramble(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)).eval())
    table = {op: to for op, to in select_decomp_table().items() if "batch_norm" in str(op)}
    gm = torch.export.export(model, (image(),)).run_decompositions(table).module()
    ConvBNPass()(gm.graph)
    gm.recompile()
    assert counted() == (2, {})
    check(gm, model, image(), params_of=gm)


@pytest.mark.parametrize("spelling", ["centred", "vectors first"])
def test_arithmetic_keeps_the_strides_of_its_input(spelling):
    """A view of the output works as in eager. The kernel of a BatchNorm would return it contiguous."""
    torch.manual_seed(0)
    model = scramble(nn.Sequential(nn.Conv2d(3, 6, 3), Frozen(6, SPELLINGS[spelling])).eval(), eps=1e-3)

    def run(x):
        y = model[1](model[0](x).transpose(-1, -2))
        return y.transpose(-1, -2).view(2, 6, -1)

    x = image()
    torch.testing.assert_close(dynamo(run, codegen=False)(x), run(x), rtol=1e-4, atol=1e-5)
    assert counted() == (1, {})


@pytest.mark.slow
def test_libraries():
    from timm.layers import FrozenBatchNormAct2d
    from torchvision.ops.misc import FrozenBatchNorm2d

    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6), nn.Conv2d(6, 6, 3), FrozenBatchNormAct2d(6), nn.Conv2d(6, 4, 1)
    )
    scramble(model.eval(), eps=1e-3)
    check(dynamo(model), model, image())
    assert counted() == (2, {})
    check(torch.compile(model, backend="triton_convbn", options={"when": "always"}), model, image())
    assert counted() == (4, {})


def test_names_of_the_modules():
    rows = explain(nn.Sequential(net(vectors_first), nn.MaxPool2d(2), Frozen(6, casts_last)), image()).rows
    assert [(row.batch_norm, row.conv, row.reason) for row in rows] == [
        ("0.1", "", "does_not_pay"),
        ("2", "", "input_not_conv"),
    ]


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("spelling", ["vectors first", "casts last", "computed in float", "centred"])
def test_dtypes(spelling, dtype):
    """All in one dtype. The fold computes in fp32 what 16-bit vectors are multiplied and added up in here. But vectors
    that are narrower than what is computed with them would be another result."""
    model = net(SPELLINGS[spelling]).to(dtype)
    narrow = spelling == "computed in float" and dtype == torch.float64
    if narrow:
        x = image(dtype)
        torch.testing.assert_close(dynamo(model)(x), model(x))
    else:
        check(dynamo(model), model, image(dtype))
    assert counted() == ((0, {"dtype": 1}) if narrow else (1, {}))


def test_narrow_vectors():
    """Their arithmetic, done in 16 bit, is repeated by no fold; cast before anything else, they are the same."""
    for call, want in (
        (vectors_first, (0, {"dtype": 1})),
        (centred, (0, {"dtype": 1})),
        (SPELLINGS["computed in float"], (1, {})),
    ):
        counters.clear()
        model = net(call)
        model[1].half()
        eager = copy.deepcopy(model)
        for name, error in errors(results(dynamo(model), model, x := image()), results(eager, eager, x)).items():
            assert error < TOLERANCES[torch.float32], f"{name}: {error:.2e}"
        assert counted() == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_vectors(dtype):
    """Cast to the dtype of x, it folds. Uncast, the result is fp32, which no 16-bit convolution returns."""
    for call, want in ((casts_last, (1, {})), (vectors_first, (0, {"dtype": 1})), (centred, (0, {"dtype": 1}))):
        counters.clear()
        model = net(call)
        model[0].to(dtype)
        check(dynamo(model), model, image(dtype))
        assert counted() == want


@pytest.mark.parametrize("capture", CAPTURES)
def test_wide_vectors_in_other_dialects(capture):
    for call, want in ((casts_last, []), (vectors_first, [Reason.DTYPE])):
        model = net(call)
        model[0].bfloat16()
        gm = CAPTURES[capture](model, image(torch.bfloat16).requires_grad_())
        assert reasons(find(gm.graph)) == want


def test_autocast():
    for call, want in ((casts_last, (1, {})), (vectors_first, (0, {"dtype": 1})), (centred, (0, {"dtype": 1}))):
        counters.clear()
        model, x = net(call), image()
        with torch.autocast("cpu", torch.bfloat16):
            found, exact = results(dynamo(model), model, x), results(model, model, x)
        for name, error in errors(found, exact).items():
            assert error < TOLERANCES[torch.bfloat16], f"{name}: {error:.2e}"
        assert counted() == want


# -- what stays -------------------------------------------------------------------------------------------------------


def twice(m, x):
    product = x * scale_of(m).view(m.shape)
    return product + (m.bias - m.running_mean * scale_of(m)).view(m.shape) + product.sum()


def conv_used(m, x):
    return vectors_first(m, x) + x


def mean_written(m, x):
    scale = scale_of(m)
    shift = m.bias - m.running_mean * scale
    m.running_mean.add_(1)
    return x * scale.view(m.shape) + shift.view(m.shape)


def scale_written(m, x):
    scale = scale_of(m)
    scale.mul_(2)
    return applied(m, x, scale)


def without_grad(m, x):
    with torch.no_grad():
        scale = scale_of(m)
    return applied(m, x, scale)


def integers(m, x):
    return x * scale_of(m).view(m.shape).to(torch.int64) + (m.bias - m.running_mean * scale_of(m)).view(m.shape)


def last_dim(m, x):
    scale = scale_of(m)
    return x * scale + (m.bias - m.running_mean * scale)


def last_dim_by_index(m, x):
    return x * scale_of(m)[None, None] + (m.bias - m.running_mean * scale_of(m))[None, ...]


def last_dim_centred(m, x):
    return (x - m.running_mean) * scale_of(m) + m.bias


def two_dims(m, x):
    scale = scale_of(m)
    return x * scale.view(m.shape) + (m.bias - m.running_mean * scale)


def longer(m, x):
    return x * scale_of(m).view(1, 1, -1, 1, 1) + (m.bias - m.running_mean * scale_of(m)).view(m.shape)


def one_channel(m, x):
    return applied(m, x, m.weight * (m.running_var[:1] + m.eps).rsqrt())


def matrix(m, x):
    weight = m.weight.view(m.shape) * torch.ones(1, 1, 1, x.shape[3])
    scale = weight * (m.running_var.view(m.shape) + m.eps).rsqrt()
    return x * scale + (m.bias.view(m.shape) - m.running_mean.view(m.shape) * scale)


def normalized_used(m, x):
    normalized = (x - up(m, "running_mean")) * (up(m, "running_var") + m.eps).rsqrt()
    return normalized * up(m, "weight") + up(m, "bias") + normalized.sum()


def mean_written_when_centred(m, x):
    y = x - up(m, "running_mean")
    m.running_mean.add_(1)
    return y * scale_of(m).view(m.shape) + up(m, "bias")


STAY = {
    "normalized used": (normalized_used, Reason.PRODUCT_USED),
    "mean written when centred": (mean_written_when_centred, Reason.MUTATED),
    "product used": (twice, Reason.PRODUCT_USED),
    "convolution used": (conv_used, Reason.CONV_SHARED),
    "mean written": (mean_written, Reason.MUTATED),
    "scale written": (scale_written, Reason.MUTATED),
    "grad mode": (without_grad, Reason.OPAQUE_BETWEEN),
    "integers": (integers, Reason.DTYPE),
    "last dim": (last_dim, Reason.NOT_PER_CHANNEL),
    "last dim centred": (last_dim_centred, Reason.NOT_PER_CHANNEL),
    "last dim by index": (last_dim_by_index, Reason.NOT_PER_CHANNEL),
    "two dims": (two_dims, Reason.NOT_PER_CHANNEL),
    "a dim more": (longer, Reason.NOT_PER_CHANNEL),
    "one channel": (one_channel, Reason.CHANNELS),
    "matrix": (matrix, Reason.NOT_PER_CHANNEL),
}


@pytest.mark.parametrize("name", STAY)
def test_looks_like_it_and_stays(name):
    """The image is as wide as it has channels, so that a vector along the wrong dim fits."""
    call, reason = STAY[name]
    torch.manual_seed(0)
    bn = Frozen(6, call)
    if name == "grad mode":
        bn.trainable("weight")
    model = scramble(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), bn).eval())
    x = torch.randn(2, 3, 6, 6)
    rows = explain(model, x).rows
    assert [(row.batch_norm, row.reason, row.why) for row in rows] == [("1", reason.value, reason.text)]
    ran = copy.deepcopy(model)  # one that writes to its mean does so in each run
    found, exact = results(dynamo(ran), ran, x), results(model, model, x)
    for key, error in errors(found, exact).items():
        assert error < TOLERANCES[torch.float32], f"{key}: {error:.2e}"


def test_shapes_that_a_graph_does_not_know():
    """The var of a graph of placeholders without shapes could be anything."""
    model = net(vectors_first)
    gm = capture_traced(model, image())
    (var,) = (node for node in gm.graph.nodes if node.op == "get_attr" and str(node.target).endswith("running_var"))
    with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
        var.replace_all_uses_with(gm.graph.placeholder("var"))
    assert reasons(find(gm.graph)) == [Reason.UNKNOWN_SHAPE]


NO_BATCH_NORM = {
    "neither weight nor bias": lambda m, x: (x - up(m, "running_mean")) * (up(m, "running_var") + m.eps).rsqrt(),
    "only centred": lambda m, x: (x - up(m, "running_mean")) * up(m, "weight") + up(m, "bias"),
    "centred, root of the product": lambda m, x: (
        (x - up(m, "running_mean")) / (up(m, "weight") * (up(m, "running_var") + m.eps).sqrt()) + up(m, "bias")
    ),
    "scale and shift": lambda m, x: x * m.weight.view(m.shape) + m.bias.view(m.shape),
    "another scale": lambda m, x: x * scale_of(m).view(m.shape) + (m.bias - m.running_mean * m.weight).view(m.shape),
    "sum": lambda m, x: x * scale_of(m).view(m.shape) + (m.bias + m.running_mean * scale_of(m)).view(m.shape),
    "other exponent": lambda m, x: applied(m, x, m.weight * (m.running_var + m.eps) ** -0.25),
    "alpha": lambda m, x: torch.add(
        x * scale_of(m).view(m.shape), (m.bias - m.running_mean * scale_of(m)).view(m.shape), alpha=2
    ),
    "mean is scale": lambda m, x: (lambda s: x * s.view(m.shape) + (m.bias - s * s).view(m.shape))(scale_of(m)),
    "detached": lambda m, x: (
        x * scale_of(m).detach().view(m.shape) + (m.bias - m.running_mean * scale_of(m)).view(m.shape)
    ),
}


@pytest.mark.parametrize("name", NO_BATCH_NORM)
def test_no_batch_norm(name):
    model = net(NO_BATCH_NORM[name])
    model[1].trainable("weight")
    check(dynamo(model), model, image())
    assert counted() == (0, {})


def test_statistics_of_its_own_input():
    """A LayerNorm or a BatchNorm in training mode, written out, is no frozen BatchNorm and has no row."""

    def call(m, x):
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        return (x - mean.view(m.shape)) * (var.view(m.shape) + m.eps).rsqrt() * up(m, "weight") + up(m, "bias")

    assert not explain(net(call), image()).rows


def test_folded_by_hand():
    """The bias of a fold is computed as a BatchNorm's output would be, from vectors alone."""

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3), Frozen(6, centred)

        def forward(self, x):
            scale = scale_of(self.bn)
            bias = (self.conv.bias - self.bn.running_mean) * scale + self.bn.bias
            return nn.functional.conv2d(x, self.conv.weight * scale.view(-1, 1, 1, 1), bias)

    model = scramble(Folded().eval())
    assert not explain(model, image()).rows
    check(dynamo(model), model, image())


# -- what pays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "folds"),
    [((), False), (("bias", "running_mean"), False), (("weight",), True), (("running_var",), True)],
)
def test_pays_where_the_scale_trains(trained, folds):
    """Only the gradient of a scale needs the convolution's output; Inductor keeps it for nothing else."""
    model = net(vectors_first)
    model[1].trainable(*trained)
    check(dynamo(model, when="profitable"), model, image())
    assert counted() == ((1, {}) if folds else (0, {"does_not_pay": 1}))


def test_pays_under_freezing_and_by_hand():
    model = net(vectors_first)
    with torch.no_grad(), inductor_config.patch(freezing=True):
        dynamo(model, when="profitable")(image())
    assert counted() == (1, {})
    gm = capture_aten(model, image())
    ConvBNPass(when="profitable")(gm.graph)
    assert sum(node.target is fold_reference for node in gm.graph.nodes) == 1
