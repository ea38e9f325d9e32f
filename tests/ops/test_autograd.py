"""`conv_with_fold`, and the backend without Inductor."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from case_checks import agrees, found, make
from cases import CASES
from checking import CAPTURES, TOLERANCES, check, counted, errors, results, scramble
from torch import fx, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from triton_convbn import ConvBNPass, OptionError, conv_bn_eval, patched
from triton_convbn.inductor import eager_backend
from triton_convbn.measure import saved_for_backward
from triton_convbn.ops import plan
from triton_convbn.ops.autograd import conv_with_fold

KINDS = {
    "linear": (nn.Linear(4, 6), (3, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 7)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 6, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 3)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 4)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, padding=2), (2, 4, 5, 5)),
    "same": (nn.Conv2d(4, 6, (3, 2), padding="same", dilation=(1, 3)), (2, 4, 5, 6)),
    "valid": (nn.Conv1d(4, 6, 2, padding="valid"), (2, 4, 5)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 5, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 3, 3)),
    "transposed-grouped": (nn.ConvTranspose1d(4, 6, 2, groups=2, dilation=2, padding=1), (2, 4, 5)),
}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def pair(kind, affine=True):
    torch.manual_seed(0)
    conv, shape = KINDS[kind]
    conv = copy.deepcopy(conv)
    channels = conv.out_features if kind == "linear" else conv.out_channels
    bn = NORMS[len(shape)](channels, affine=affine)
    return scramble(nn.Sequential(conv, bn).eval(), 0.03), torch.randn(shape)


def by_hand(model):
    return partial(conv_bn_eval, model[0], model[1])


def without_codegen(model, **options):
    return torch.compile(model, backend="triton_convbn_eager", options={"when": "always"} | options)


# -- values and derivatives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [False, True], ids=["torch", "interpreted"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind, affine, kernel, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1" if kernel else "0")
    model, x = pair(kind, affine)
    check(by_hand(model), model, x)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    """Second derivatives of the function, and a gradient penalty, which involves all parameters."""
    model, x = pair(kind)
    model, x = model.double(), x.double().requires_grad_(True)
    conv, bn = model
    if kind in ("grouped", "linear"):
        inputs = [x, *[None if p is None else p.detach().requires_grad_(True) for p in (conv.weight, conv.bias)]]
        inputs += [bn.weight.detach().requires_grad_(True), bn.bias.detach().requires_grad_(True)]
        options = {} if kind == "linear" else {"groups": conv.groups}

        def function(*tensors):
            return conv_with_fold(*tensors, bn.running_mean, bn.running_var, bn.eps, **options)

        torch.autograd.gradcheck(function, inputs)
        torch.autograd.gradgradcheck(function, inputs)

    def penalty(run):
        model.zero_grad()
        (grad,) = torch.autograd.grad(run(x).sin().sum(), x, create_graph=True)
        grad.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    want = penalty(model)
    got = penalty(by_hand(model))
    assert {"0.weight", "1.weight"} <= set(want)
    for name, error in errors(got, {name: grad.clone() for name, grad in want.items()}).items():
        assert error < 1e-10, name


@pytest.mark.parametrize("wanted", ["x", "0.weight", "0.bias", "1.weight", "1.bias"])
def test_one_gradient_alone(wanted):
    model, x = pair("conv2d")
    model.requires_grad_(False)
    x.requires_grad_(wanted == "x")
    if wanted != "x":
        model.get_parameter(wanted).requires_grad_(True)
    leaf = x if wanted == "x" else model.get_parameter(wanted)
    (got,) = torch.autograd.grad(by_hand(model)(x).square().sum(), leaf)
    (want,) = torch.autograd.grad(model(x).square().sum(), leaf)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_statistics_have_gradients():
    model, x = pair("conv2d")
    model[1].running_var.requires_grad_(True)
    (got,) = torch.autograd.grad(by_hand(model)(x).square().sum(), model[1].running_var)
    conv, bn = model
    per_channel = (each[:, None, None] for each in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    mean, var, weight, bias = per_channel
    y = (conv(x) - mean) / (var + bn.eps).sqrt() * weight + bias  # F.batch_norm refuses
    (want,) = torch.autograd.grad(y.square().sum(), bn.running_var)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_dtypes(dtype):
    """A 16-bit convolution with an fp32 BatchNorm: each gradient has the dtype of its parameter."""
    model, x = pair("conv2d")
    model[0].to(dtype)
    check(by_hand(model), model, x.to(dtype))
    assert model[0].weight.grad.dtype == dtype
    assert model[1].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["conv2d", "linear", "transposed"])
@pytest.mark.parametrize("way", [by_hand, without_codegen], ids=["by hand", "compiled"])
def test_autocast(way, kind):
    """The folded weight is rounded once.

    The BatchNorm's gradients come from those of the folded weight and bias, which the convolution rounds to bf16. Eager
    sums them in fp32. So ours may have the error of one rounding more, 2^-9, whatever eager's own error is: that
    depends on the CPU, as the sums of its convolutions do.
    """
    model, _ = pair(kind)
    x = torch.randn({"linear": (512, 4)}.get(kind, (16, 4, 24, 24)))
    double = copy.deepcopy(model).double()
    exact = results(double, double, x.double())

    def error(run):
        def autocast(x):
            with torch.autocast("cpu", torch.bfloat16):
                return run(x)

        got = results(autocast, model, x)
        return {name: ((got[name] - want).norm() / want.norm()).item() for name, want in exact.items()}

    unfused, ours = error(model), error(way(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert way(model)(x).dtype == model(x).dtype == torch.bfloat16
    for name in exact:
        assert 0 < ours[name] < 1.5 * unfused[name] + (2**-9 if name.startswith("1.") else 1e-3), name


def test_fp64_weight_is_not_autocast():
    model, x = pair("conv2d")
    model, x = model.double(), x.double()
    with torch.autocast("cpu", torch.bfloat16):
        got = by_hand(model)(x)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, model(x))


def test_channels_last_is_kept():
    model, x = pair("conv2d")
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    got = by_hand(model)(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    got.sum().backward()
    assert model[0].weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_functional_transforms():
    """Per-sample gradients and ensembles by torch.func, compared with the modules."""
    model, x = pair("conv2d")
    conv, bn = model

    def loss(run, weight, sample):
        y = run(sample[None], weight)
        return y.square().sum()

    def ours(x, weight):
        arguments = conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps
        return conv_with_fold(x, weight, *arguments, stride=conv.stride, padding=conv.padding)

    def plain(x, weight):
        return bn(F.conv2d(x, weight, conv.bias, conv.stride, conv.padding))

    weight = conv.weight.detach()
    for transform in (
        lambda run: torch.func.vmap(torch.func.grad(partial(loss, run)), in_dims=(None, 0))(weight, x),
        lambda run: torch.func.vmap(run, in_dims=(None, 0))(x, torch.stack([weight, 2 * weight])),
        lambda run: torch.func.grad(lambda w: torch.func.grad(partial(loss, run))(w, x[0]).square().sum())(weight),
    ):
        torch.testing.assert_close(transform(ours), transform(plain), rtol=1e-4, atol=1e-3)


# -- saved tensors -----------------------------------------------------------------------------------------------------


def kept(model, run, x):
    run(x)  # compile first, or Dynamo traces the hooks that count
    with saved_for_backward(model) as saved:
        run(x)
    return saved.total


def test_only_the_input_is_saved():
    model, x = pair("conv2d")
    assert kept(model, by_hand(model), x) == x.nbytes
    assert kept(model, model, x) > x.nbytes + model(x).nbytes - 1
    without_grad = by_hand(copy.deepcopy(model).requires_grad_(False))
    assert kept(model, without_grad, x) == 0


def test_tensors_saved_by_the_graph():
    """Two pairs with an in-place ReLU save two inputs, and 20 bytes of scales and statistics for each of 12 channels.

    Without recompute they save the folded weights too.
    """
    layers = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    model, x = scramble(nn.Sequential(*layers).eval()), torch.randn(2, 4, 12, 12)
    between = model[:3](x).nbytes
    ours = without_codegen(model)
    check(ours, model, x)
    assert kept(model, ours, x) == x.nbytes + between + 12 * 20
    torch._dynamo.reset()
    ours = without_codegen(model, recompute=False)
    check(ours, model, x)
    assert kept(model, ours, x) >= x.nbytes + between + model[0].weight.nbytes + model[3].weight.nbytes
    assert kept(model, model, x) > x.nbytes + 2 * between
    assert counted() == (8, {}), "two graphs each: what requires a gradient of the input is another"


def test_parameter_changed_before_backward_raises():
    """Backward folds again, so the parameters must be unchanged."""
    model, x = pair("conv2d")
    y = by_hand(model)(x)
    with torch.no_grad():
        model[1].running_var.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("assigned", [False, True])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_var"])
def test_a_write_through_data_is_reported_if_asked(name, assigned, monkeypatch):
    """Autograd does not see it. The gradient of bn.weight would come from the new weight."""
    monkeypatch.setenv("TRITON_CONVBN_CHECK_DATA", "1")
    model, x = pair("conv2d")
    y = by_hand(model)(x)
    y.sum().backward(retain_graph=True)  # nothing is written yet
    tensor = model.state_dict(keep_vars=True)[name]
    if assigned:
        tensor.data = tensor.data * 2
    else:
        tensor.data.mul_(2)
    with pytest.raises(RuntimeError, match=f"{name.split('.')[1]} changed between forward and backward"):
        y.sum().backward()


# -- the backend ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case):
    """Run the cases that Inductor is tested with."""
    model, x = make(case, 1e-3)
    agrees(case, without_codegen(model), model, x)
    found(case, "dynamo")


@pytest.mark.slow
@pytest.mark.parametrize("dialect", CAPTURES)
def test_by_hand_in_every_dialect(dialect):
    layers = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.ConvTranspose2d(6, 4, 3, groups=2)
    model, x = scramble(nn.Sequential(*layers, nn.BatchNorm2d(4)).eval()), torch.randn(2, 4, 9, 8)
    gm = CAPTURES[dialect](copy.deepcopy(model), x)
    ConvBNPass(codegen=False)(gm.graph)
    gm.graph.lint()
    gm.recompile()
    check(gm, model, x, params_of=gm)
    again = gm if dialect != "modules" else fx.symbolic_trace(gm)
    ConvBNPass(codegen=False)(again.graph)
    again.recompile()
    assert sum(node.target is conv_with_fold for node in again.graph.nodes) == 2
    compiled = torch.compile(gm, backend="aot_eager")
    check(compiled, model, x, params_of=gm)
    assert counted() == (2, {})


class Inner(nn.Module):
    """A pair in a subgraph: the body of a checkpoint or of a branch."""

    def __init__(self, how):
        super().__init__()
        self.outer, self.inner, self.how = pair("conv2d")[0], nn.Conv2d(6, 6, 1), how
        self.bn = nn.BatchNorm2d(6)

    def both(self, x):
        return self.bn(self.inner(x))

    def forward(self, x):
        x = self.outer(x)
        if self.how == "cond":
            return torch.cond(x.sum() > -1e9, lambda x: self.bn(self.inner(x)), lambda x: self.inner(x) * 2, (x,))
        return checkpoint(self.both, x, use_reentrant=self.how == "reentrant")


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "cond"])
def test_subgraphs(how):
    model, x = scramble(Inner(how).eval(), 1e-3), pair("conv2d")[1]
    check(without_codegen(model), model, x)
    assert counted() == (2, {})


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_kernel(choice, monkeypatch):
    model, x = pair("conv2d")
    with pytest.raises(Exception, match="Triton kernels do not run on cpu") if choice == "triton" else patched():
        without_codegen(model, kernel=choice)(x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launched = []
    real = plan.run
    monkeypatch.setattr(plan, "run", lambda *arguments: launched.append(1) or real(*arguments))
    torch._dynamo.reset()
    check(without_codegen(model, kernel=choice), model, x)
    assert bool(launched) == (choice == "triton")


def test_dynamic_shapes():
    """One graph serves all batches and sizes, as without the pass."""
    model, _ = pair("same")
    graphs = []
    for name in ("eager", "triton_convbn_eager"):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend=name, dynamic=True)
        for batch, size in [(2, 9), (3, 9), (7, 9), (5, 8)]:
            check(compiled, model, torch.randn(batch, 4, size, size + 1))
            with torch.no_grad():
                torch.testing.assert_close(
                    compiled(x := torch.randn(batch, 4, size, 7)), model(x), rtol=1e-4, atol=1e-4
                )
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


@pytest.mark.parametrize(
    ("frozen", "context", "size", "want"),
    [
        ("nothing", torch.enable_grad, 9, (1, 0)),
        ("affine", torch.enable_grad, 9, (1, 0)),  # eager saves the convolution's output in any case
        ("weights", torch.enable_grad, 3, (1, 0)),
        ("nothing", torch.no_grad, 9, (1, 0)),
        ("nothing", torch.no_grad, 3, (0, 1)),  # 2 x 8 outputs, and 288 weights
    ],
)
def test_profitability(frozen, context, size, want):
    model = scramble(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).eval())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen == "nothing" or (frozen == "affine") != name.startswith("1"))
    with context():
        torch.compile(model, backend="triton_convbn_eager")(torch.randn(2, 4, size, size))
    assert (counters["triton_convbn"]["folded"], counters["triton_convbn"]["declined:does_not_pay"]) == want


def test_options():
    model, x = pair("conv2d")
    for options, message in [
        ({"epilogue_fusion": False}, "does not use Inductor and has no option epilogue_fusion"),
        ({"codegen": 0}, "codegen=0 is not an option"),
        ({"nonsense": 1}, "unknown option nonsense"),
        ({"on_decline": "raise"}, None),
    ]:
        torch._dynamo.reset()
        if message is None:
            check(without_codegen(model, **options), model, x)
            continue
        with pytest.raises(Exception, match=message):
            without_codegen(model, **options)(x)
    with pytest.raises(OptionError, match="does not use Inductor and has no option mode=max-autotune"):
        eager_backend(fx.symbolic_trace(model), [x], mode="max-autotune")
    declined = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)).eval()
    with pytest.raises(Exception, match="not the output of a convolution"):
        without_codegen(declined, on_decline="raise")(x)


def test_no_code_is_generated(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("Inductor was called")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", refuse)
    model, x = pair("conv2d")
    check(without_codegen(model), model, x)
    with pytest.raises(Exception, match="Inductor was called"):
        torch.compile(model, backend="triton_convbn")(x)


def test_tolerances_detect_a_wrong_fold():
    """`check` fails for a fold without the running mean."""
    model, x = pair("conv2d")
    wrong = copy.deepcopy(model)
    wrong[1].running_mean.mul_(1 + 10 * TOLERANCES[torch.float32])
    with pytest.raises(AssertionError, match="output 0"):
        check(by_hand(wrong), model, x, params_of=wrong)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_only_the_bias_trains_in_one_dimension(kernel_size):
    """On a CPU, torch returns a masked gradient of a 1-d convolution's weight, with two spatial dimensions."""
    model = scramble(nn.Sequential(nn.Conv1d(3, 4, kernel_size), nn.BatchNorm1d(4)).eval(), 1e-3).double()
    model.requires_grad_(False)
    model[1].bias.requires_grad_()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    conv_bn_eval(model[0], model[1], x).sum().backward()
    found, model[1].bias.grad = model[1].bias.grad, None
    model(x).sum().backward()
    assert torch.allclose(found, model[1].bias.grad, rtol=1e-12)
