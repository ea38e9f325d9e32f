"""The operators in graphs that the pass has changed: their groups, layouts, dtypes and kernels."""

import pytest
import torch
from checking import CAPTURES, TOLERANCES, check, counted, errors, results, scramble
from torch import fx, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.utils import run_fw_bw_and_get_code

from triton_convbn import ConvBNPass, OptionError, Options, patched
from triton_convbn.graph.match import find
from triton_convbn.ops import library, reference
from triton_convbn.ops.packed_pairs import PackedPairs


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def net(depth=5):
    layers = []
    for i in range(depth):
        conv = [nn.Conv2d(4, 4, 3, padding=1, bias=i % 2 == 0), nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2)][
            i % 3 == 2
        ]
        layers += [conv, nn.BatchNorm2d(4, affine=i != 1), nn.ReLU()]
    return scramble(nn.Sequential(*layers).eval(), 1e-3), torch.randn(2, 4, 6, 5)


def folds(graph):
    return [node for node in graph.nodes if node.target is library.fold_op]


@pytest.mark.parametrize(("most", "want"), [(16, [5]), (2, [2, 2, 1]), (1, [1] * 5)])
@pytest.mark.parametrize("capture", CAPTURES)
def test_pairs_are_folded_in_groups(interpreted, capture, most, want):
    model, x = net()
    gm = CAPTURES[capture](model, x)
    ConvBNPass(pairs_per_launch=most)(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert [len(node.args[0]) for node in folds(gm.graph)] == want
    check(gm, model, x, params_of=gm)
    before = gm.code
    ConvBNPass(pairs_per_launch=most)(gm.graph)
    gm.recompile()
    assert gm.code == before
    assert counted() == (5, {})


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recompute", [True, False])
def test_through_compile(interpreted, backend, recompute):
    """Kernels, launcher, operators and pass work together, on CPU tensors."""
    model, x = net()
    if backend == "inductor":
        run = torch.compile(
            model, backend="triton_convbn", options={"kernel": "triton", "recompute": recompute, "when": "always"}
        )
        check(run, model, x)
        assert counted() == (5, {})
        return
    gm = CAPTURES["aten"](model, x)
    ConvBNPass(recompute=recompute)(gm.graph)
    gm.recompile()
    check(torch.compile(gm, backend=backend), model, x, params_of=gm)


def test_computed_weight_is_folded_after_it_is_computed(interpreted):
    model, x = net(3)
    nn.utils.parametrizations.weight_norm(model[3])
    gm = CAPTURES["aten"](model, x)
    assert len(find(gm.graph).pairs) == 3
    ConvBNPass(when="always")(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert sorted(len(node.args[0]) for node in folds(gm.graph)) == [1, 2]
    check(gm, model, x, params_of=gm)


class Written(nn.Module):
    """The second BatchNorm's statistics are written after the first pair, so one fold cannot serve both."""

    def __init__(self):
        super().__init__()
        self.pairs = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(3))

    def forward(self, x):
        y = self.pairs[0](x)
        self.pairs[1][1].running_mean.add_(1)
        return self.pairs[2](self.pairs[1](y))


def test_write_to_a_parameter_ends_a_group(interpreted):
    model, x = scramble(Written().eval(), 1e-3), torch.randn(2, 4, 6, 5)
    sizes = []

    def backend(gm, _inputs):
        ConvBNPass(when="always")(gm.graph)
        sizes.extend(len(node.args[0]) for node in folds(gm.graph))
        gm.recompile()
        return gm.forward

    with torch.no_grad():
        want = model(x)
        model.pairs[1][1].running_mean.sub_(1)
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), want, rtol=1e-4, atol=1e-4)
    assert sizes == [1, 2]


def test_statistics_that_require_gradients_use_plain_torch(interpreted):
    model, x = net(2)
    mean = model[1].running_mean
    del model[1].running_mean
    model[1].running_mean = nn.Parameter(mean)  # BatchNorm refuses this, but its fold has a gradient
    gm = fx.symbolic_trace(model)
    ConvBNPass(when="always")(gm.graph)
    gm.recompile()
    assert [node.target for node in gm.graph.nodes if node.target in (library.fold_op, reference.fold_reference)] == [
        reference.fold_reference,
        library.fold_op,
    ]
    gm(x).sum().backward()
    assert gm.get_parameter("1.running_mean").grad is not None


@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_follows_the_convolution(interpreted, channels_last):
    """The folded weight is channels_last if the convolution's output is."""
    model, x = net(3)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    layouts = []

    def backend(gm, _inputs):
        ConvBNPass(when="always")(gm.graph)
        layouts.extend(layout for node in folds(gm.graph) for layout in PackedPairs(*node.args).layouts)
        gm.recompile()
        return gm.forward

    got, want = torch.compile(model, backend=backend)(x), model(x)
    assert layouts == [int(channels_last)] * 3
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_kernel_option(monkeypatch):
    model, x = net(2)

    def targets(**options):
        gm = CAPTURES["modules"](model, x)
        ConvBNPass(**options)(gm.graph)
        return {node.target for node in gm.graph.nodes} & {library.fold_op, reference.fold_reference}

    assert targets() == targets(kernel="torch") == {reference.fold_reference}
    gm = CAPTURES["modules"](model, x)
    before = str(gm.graph)
    with pytest.raises(OptionError, match="set TRITON_INTERPRET=1"):
        ConvBNPass(kernel="triton")(gm.graph)
    assert str(gm.graph) == before
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert targets() == targets(kernel="triton") == {library.fold_op}
    assert targets(kernel="torch") == {reference.fold_reference}
    for wrong in (0, 65, True, 2.0, "16"):
        with pytest.raises(OptionError, match="choose a number from 1 to 64"):
            Options(pairs_per_launch=wrong)


def test_autocast_rounds_in_the_fold(interpreted):
    """The folded weight is not cast: the operator writes the dtype that the convolution needs."""
    model, x = net(2)
    eager = results(model, model, x)
    casts = []

    def count_casts(gm, _inputs):
        shapes = [n.meta["val"].shape for n in gm.graph.nodes if n.target is torch.ops.aten._to_copy.default]
        casts.extend(shape for shape in shapes if tuple(shape[2:]) == (3, 3))  # the images are 6 x 5
        return gm.forward

    def backend(gm, inputs):
        ConvBNPass(when="always")(gm.graph)
        assert [PackedPairs(*node.args).dtypes for node in folds(gm.graph)] == [
            [reference.FLOATING.index(torch.bfloat16)] * 2
        ]
        gm.recompile()
        return aot_module_simplified(gm, inputs, fw_compiler=count_casts)

    with torch.autocast("cpu", torch.bfloat16):
        found = results(torch.compile(model, backend=backend), model, x)
    assert casts == []
    assert counted()[0] == 2
    assert max(errors(found, eager).values()) < 5 * TOLERANCES[torch.bfloat16]


def weight_copies(**keywords):
    """Return how many 3 x 3 weights the forward code allocates besides the operator's."""
    torch._dynamo.reset()
    layers = [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)]
    model, x = scramble(nn.Sequential(*layers).eval(), 1e-3), torch.randn(2, 64, 8, 8)
    _, (forward, *_) = run_fw_bw_and_get_code(lambda: torch.compile(model, **keywords)(x))
    torch._dynamo.reset()
    check(torch.compile(model, **keywords), model, x)
    return forward.count("empty_strided_cpu((64, 64, 3, 3)")


@pytest.mark.slow
def test_inductor_copies_no_folded_weight(interpreted, monkeypatch):
    """Inductor runs these convolutions channels_last, and the fold writes channels_last weights.

    Without the passes after autograd there is a copy.
    """
    with monkeypatch.context() as context:
        context.setattr("triton_convbn.post_grad.manager.PASSES", [])
        assert weight_copies(backend="triton_convbn") == 1
    assert weight_copies(backend="triton_convbn") == 0
    assert weight_copies(options={"pre_grad_custom_pass": ConvBNPass()}) == 0
    with patched():
        assert weight_copies() == 0
