"""BatchNorms that fold into the convolution after them: what is checked, what pays, and how it is reported."""

import copy
import operator

import pytest
import torch
from checking import TOLERANCES, capture_modules, check, counted, dynamo, inductor, randn_like_model, reasons, scramble
from frozen import Frozen, vectors_first
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import export
from torch.fx.experimental.proxy_tensor import make_fx

from triton_convbn import ConvBNPass, bn_conv_eval, explain, fold_exported
from triton_convbn.graph.findings import Findings
from triton_convbn.graph.input_norms import fold_input_norms
from triton_convbn.graph.match import find
from triton_convbn.graph.profitability import select
from triton_convbn.graph.reasons import Reason
from triton_convbn.measure import saved_for_backward
from triton_convbn.options import Options

X = (2, 4, 6, 5)


def head(*more: nn.Module, **options: object) -> nn.Module:
    """A BatchNorm of no convolution's output, and a convolution that reads it."""
    return scramble(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, **options), *more).eval())


def selected(model: nn.Module, x: Tensor, **options: object) -> Findings:
    """Return what the pass does under a compiler."""
    found: list[Findings] = []

    def backend(gm, _inputs):
        found.append(select(gm.graph, Options.of(**options)))
        return gm.forward

    torch.compile(model, backend=backend)(x)
    return found[0]


class Broadcasting(nn.Module):
    """A frozen BatchNorm that turns one channel into four."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = Frozen(4, vectors_first), nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x.tanh()))


def test_a_batch_norm_that_broadcasts_stays() -> None:
    model, x = scramble(Broadcasting().eval()), randn_like_model((2, 1, 6, 5))
    check(dynamo(model), model, x)
    assert counted() == (0, {"channels": 1})


class Added(nn.Module):
    """What is added to the product is a matrix, which `addmm` takes and a fold does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 6)
        self.added = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.added, self.norm(x.tanh()), self.linear.weight.t()) + self.linear.bias


def test_a_matrix_as_the_bias_stays() -> None:
    model = scramble(Added().eval())
    check(dynamo(model), model, randn_like_model((3, 4)))
    assert counted() == (0, {"channels": 1})


class Wider(nn.Module):
    """Under autocast the convolution rounds the BatchNorm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.conv(self.norm(x.tanh()))


def test_where_autocast_rounds_between_the_two_stays() -> None:
    model = scramble(Wider().eval())
    dynamo(model)(randn_like_model(X))
    assert counted() == (0, {"dtype": 1})


def test_fold_under_autocast() -> None:
    """x is of the autocast dtype already, and the folded weight is rounded to it."""
    model, x = scramble(Wider().eval()), randn_like_model(X).bfloat16()
    run = dynamo(model)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        want = exact.conv(exact.norm(x.double().tanh()))
        found = run(x)
    assert counted() == (1, {})
    assert found.dtype == torch.bfloat16
    assert (found.double() - want).abs().max() < TOLERANCES[torch.bfloat16] * want.abs().max()


def test_hooks_and_subclasses_stay() -> None:
    model = head()
    model[1].register_forward_hook(lambda *_: None)
    gm = capture_modules(model, randn_like_model(X))
    assert reasons(fold_input_norms(find(gm.graph), gm.graph)) == [Reason.HOOKS]


@pytest.mark.parametrize("which", ["BatchNorm", "convolution"])
def test_a_decline_of_the_pair_before_keeps_its_reason(which: str) -> None:
    """A convolution before the BatchNorm is shared, and the one after it pads: the first is what is reported."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.b = nn.Conv2d(4, 6, 3, padding=int(which == "convolution"))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x)
            return self.b(self.bn(y)), y

    model = scramble(Net().eval())
    check(dynamo(model), model, randn_like_model(X))
    assert counted() == ((0, {"conv_shared": 1}) if which == "convolution" else (1, {}))


def test_of_a_folded_weight_stays() -> None:
    """A second pass finds the same graph."""
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3))
    gm = capture_modules(scramble(model.eval()), randn_like_model(X))
    ConvBNPass()(gm.graph)
    before = str(gm.graph)
    ConvBNPass()(gm.graph)
    assert str(gm.graph) == before
    assert counted() == (1, {"input_not_conv": 1, "already_folded": 1})


@pytest.mark.parametrize(("mean", "folds"), [(3.0, 1), (-3.0, 1), (8.0, 0), (-8.0, 0)])
def test_a_mean_of_many_deviations_stays(mean: float, folds: int) -> None:
    """Folded, the mean is subtracted from rounded products that are as large. Beside it little is left of 16 bits."""
    model, x = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6)).eval(), randn_like_model((8, 4)) + mean
    model[0].running_mean.fill_(mean)
    check(dynamo(model, codegen=False), model, x)
    assert counted() == ((1, {}) if folds else (0, {"cancels": 1}))
    with torch.no_grad():
        program = export(model, (x,))
    assert explain(program).folded == folds
    torch.testing.assert_close(fold_exported(program).module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_graph_without_statistics_folds() -> None:
    """Under Inductor too: a graph out of its cache was made for other statistics."""
    model, x = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6)).eval(), randn_like_model((8, 4)) + 8
    model[0].running_mean.fill_(8.0)
    assert len(selected(model, x).input_norms) == 1
    gm = make_fx(model, pre_dispatch=True)(x)
    for node in gm.graph.find_nodes(op="get_attr"):
        node.meta["val"] = FakeTensorMode().from_tensor(getattr(gm, node.target))
    assert len(select(gm.graph, Options.of(codegen=False, when="always")).input_norms) == 1


# -- what pays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "weight", "codegen", "folds"),
    [
        (True, True, True, True),
        (False, True, True, False),  # nothing but bn(x) is saved, and x takes its place
        (True, False, True, False),  # the gradient of the scale would need that of the weight
        (False, False, True, False),
        (True, True, False, True),
        (False, True, False, True),  # a pass over the activations less
        (True, False, False, False),
    ],
)
def test_what_pays_in_training(scale: bool, weight: bool, codegen: bool, folds: bool) -> None:
    model = head()
    model[1].requires_grad_(scale)
    model[2].weight.requires_grad_(weight)
    findings = selected(model, randn_like_model(X), codegen=codegen)
    assert len(findings.input_norms) == folds
    assert reasons(findings) == [Reason.DOES_NOT_PAY] * (not folds)


def test_what_pays_in_inference() -> None:
    model = head()
    with torch.no_grad():
        x = randn_like_model(X)
        assert reasons(selected(model, x)) == [Reason.DOES_NOT_PAY]
        assert selected(model, x, when="always").input_norms
        with torch._inductor.config.patch(freezing=True):
            assert selected(model, x).input_norms
        few = selected(model, x[:1], codegen=False)
        assert reasons(few) == [Reason.DOES_NOT_PAY], "the weight is larger"
        assert selected(model, randn_like_model((8, 4, 12, 12)), codegen=False).input_norms


@pytest.mark.slow
def test_inductor_keeps_one_activation_less() -> None:
    """Compiled code is exact, and bn(x) is not among what it saves."""
    layers = nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.ReLU()
    model, x = scramble(nn.Sequential(*layers).eval()), randn_like_model((8, 4, 32, 32))
    run = inductor(model)
    check(run, model, x)
    kept = {}
    for name, compiled in {"folded": run, "plain": torch.compile(copy.deepcopy(model))}.items():
        compiled(x)
        with saved_for_backward(model) as saved:
            compiled(x)
        kept[name] = saved.total
        torch._dynamo.reset()  # a copy of the model would run the same code
    assert kept["plain"] - kept["folded"] > 0.5 * x.nbytes, kept


@pytest.mark.slow
def test_a_write_to_a_parameter_before_is_not_lost() -> None:
    """Inductor drops a write to what a fold saves: such a BatchNorm stays."""

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.linear.weight.clamp_(-0.1, 0.1)
            return self.linear(self.bn(x.tanh()))

    model, x = scramble(Clamped().eval()), randn_like_model((5, 4))
    eager = copy.deepcopy(model)
    found = inductor(model)(x)
    torch.testing.assert_close(found, eager(x))
    assert model.linear.weight.abs().max() <= 0.1
    assert counted() == (0, {"mutated": 1})


# -- the other ways in ------------------------------------------------------------------------------------------------


def test_explain_and_counters() -> None:
    model, x = head(nn.BatchNorm2d(6)), randn_like_model(X)
    explanation = explain(model, x)
    assert [(row.batch_norm, row.conv, row.reason) for row in explanation.rows] == [("1", "2", ""), ("3", "2", "")]
    assert "folds forward" in explanation.rows[0].detail
    assert str(explanation).splitlines()[0].split()[:3] == ["1", "->", "2"]
    assert explanation.folded == explanation.calls == 2
    counters.clear()
    dynamo(model)(x)
    assert counters["triton_convbn"]["folded_forward"] == 1
    assert counted() == (2, {})


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_export_folds_once(both: bool, decomposed: bool) -> None:
    model, x = head(*[nn.BatchNorm2d(6)] * both), randn_like_model(X)
    if both:
        scramble(model)
    program = export(model, (x,), strict=False)
    program = program.run_decompositions() if decomposed else program
    folded = fold_exported(program)
    assert counted() == (1 + both, {})
    assert set(folded.state_dict) == {"2.folded_weight", "2.folded_bias"}
    torch.testing.assert_close(folded.module()(x), model(x), rtol=1e-4, atol=1e-4)
    names = {str(node.target) for node in folded.graph.nodes if node.op == "call_function"}
    assert not any("batch_norm" in name for name in names)
    assert operator.getitem not in {node.target for node in folded.graph.nodes}


def test_export_keeps_what_it_cannot_fold_to_finite_numbers() -> None:
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 6)).eval().half()
    with torch.no_grad():
        model[1].running_var.zero_()
        model[1].eps = 1e-7
        model[2].weight.fill_(100.0)
    program = export(model, (torch.zeros(2, 4).half(),), strict=False)
    assert fold_exported(program) is program
    assert counted() == (0, {"dtype": 1})


@pytest.mark.parametrize(
    ("bn", "conv", "shape"),
    [
        (nn.BatchNorm1d(4), nn.Linear(4, 6), (5, 4)),
        (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), X),
        (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), X),
    ],
)
def test_bn_conv_eval(bn: nn.Module, conv: nn.Module, shape: tuple[int, ...]) -> None:
    model = scramble(nn.Sequential(bn, conv).eval())
    check(lambda x: bn_conv_eval(bn, conv, x), model, randn_like_model(shape))


@pytest.mark.parametrize(
    ("bn", "conv", "shape", "reason"),
    [
        (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1), X, Reason.PADS_ZEROS),
        (nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3), X, Reason.TRANSPOSED),
        (nn.BatchNorm1d(4), nn.Linear(5, 6), (2, 4, 5), Reason.LINEAR_RANK),
        (nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 6, 3), X, Reason.NO_RUNNING_STATS),
        (nn.BatchNorm2d(3), nn.Conv2d(4, 6, 3), X, Reason.CHANNELS),
        (nn.BatchNorm2d(4).double(), nn.Conv2d(4, 6, 3), X, Reason.DTYPE),
    ],
)
def test_bn_conv_eval_declines(bn: nn.Module, conv: nn.Module, shape: tuple[int, ...], reason: Reason) -> None:
    with pytest.raises(ValueError, match="cannot fold") as error:
        bn_conv_eval(bn.eval(), conv, randn_like_model(shape))
    assert reason.text in str(error.value)


def test_bn_conv_eval_takes_a_batch_norm_and_a_layer() -> None:
    bn, conv, x = nn.BatchNorm2d(4).eval(), nn.Conv2d(4, 6, 3), randn_like_model(X)
    with pytest.raises(TypeError, match="Conv2d is no BatchNorm"):
        bn_conv_eval(conv, conv, x)
    with pytest.raises(TypeError, match="ReLU is no convolution"):
        bn_conv_eval(bn, nn.ReLU(), x)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="dtype"):
        bn_conv_eval(bn, conv, x)


def test_reads_at_every_call() -> None:
    """An optimizer step or new statistics take effect at the next call."""
    model, x = head(), randn_like_model(X)
    run = dynamo(model)
    check(run, model, x)
    scramble(model, seed=7)
    with torch.no_grad():
        model[2].weight.mul_(0.5)
    check(run, model, x)
