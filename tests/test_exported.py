"""Exported programs: folded once, values kept, and still programs that save, load, decompose and compile."""

import copy
import io
import operator

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Calls, write_input, write_input_through_view, write_statistics, write_weight
from checking import TOLERANCES, counted, randn_like_model, scramble
from tiers import few
from torch import nn
from torch.export import Dim, ExportedProgram, export, unflatten
from torch.export.graph_signature import InputKind

import triton_convbn
from triton_convbn import DeclinedError, DeclinedWarning, OptionError, explain, fold_exported
from triton_convbn.graph.match import find
from triton_convbn.graph.reasons import Reason


def exported(model, x, decomposed=False, **keywords):
    ep = export(model, (x,), strict=False, **keywords)
    return ep.run_decompositions() if decomposed else ep


def loaded(ep):
    buffer = io.BytesIO()
    torch.export.save(ep, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


def outputs(run, x):
    with torch.no_grad():
        found = run(x)
    return found if isinstance(found, tuple) else (found,)


def same(got, want, dtype=torch.float32):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        error = (one.double() - other.double()).abs().max() if one.numel() else 0
        assert error <= TOLERANCES[dtype] * (other.double().abs().max() if other.numel() else 1)


def snapshot(ep):
    state = {name: (tensor, tensor.clone()) for name, tensor in ep.state_dict.items()}
    return ep.graph_module.code, str(ep.graph_signature), str(ep.module_call_graph), state


def unchanged(ep, before):
    code, signature, calls, state = before
    assert (ep.graph_module.code, str(ep.graph_signature), str(ep.module_call_graph)) == (code, signature, calls)
    assert ep.state_dict.keys() == state.keys()
    for name, (tensor, value) in state.items():
        assert ep.state_dict[name] is tensor
        assert torch.equal(tensor, value)


def small(**keywords):
    layers = [nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1)]
    layers += [nn.BatchNorm2d(4), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 5)]
    return scramble(nn.Sequential(*layers, nn.BatchNorm1d(5)).eval(), 1e-3), torch.randn(2, 4, 9, 8)


# -- every case -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", few([False, True], 1), ids=["aten", "decomposed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case, decomposed):
    dialect = "decomposed" if decomposed else "aten"
    if dialect in case.skip:
        pytest.skip("this case cannot be written so")
    torch.manual_seed(0)
    model, x = scramble(case.model().eval(), 1e-3), randn_like_model(case.shape, dtype=case.dtype)
    want = outputs(copy.deepcopy(model).double(), x.double())
    ep = exported(model, x, decomposed)
    before = snapshot(ep)
    folded = fold_exported(ep)
    number, declined = counted()
    expected, reasons = case.expected(dialect)
    if case.name == "weight-from-bn":
        expected, reasons = 1, (Reason.NOT_CONSTANT,)
    assert number == expected, declined
    assert sorted(declined) == sorted({reason.value for reason in reasons})
    got = [each.double() for each in outputs(folded.module(), x)]
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= TOLERANCES[case.dtype] * other.abs().max() if other.numel() else True
    unchanged(ep, before)
    assert (folded is ep) == (not number)
    calls = [str(node.target) for node in folded.graph.nodes if node.op == "call_function"]
    batch_norms = [target for target in calls if "batch_norm" in target]
    assert len(batch_norms) == len(reasons)


# -- what becomes of the program --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", [False, True], ids=["aten", "decomposed"])
def test_signature_and_state(decomposed):
    model, x = small()
    folded = fold_exported(exported(model, x, decomposed))
    names = [f"{i}.folded_{kind}" for i in (0, 3, 8) for kind in ("weight", "bias")]
    assert list(folded.state_dict) == names
    specs = folded.graph_signature.input_specs
    assert [spec.target for spec in specs if spec.kind is InputKind.PARAMETER] == names
    assert [spec.kind for spec in specs][-1] is InputKind.USER_INPUT
    assert not [spec for spec in specs if spec.kind is InputKind.BUFFER]
    assert folded.constants == {}
    for spec, node in zip(specs, folded.graph.find_nodes(op="placeholder"), strict=True):
        assert spec.arg.name == node.name == node.target
        if spec.target:
            assert node.meta["val"].shape == folded.state_dict[spec.target].shape
    targets = {node.target for node in folded.graph.nodes if node.op == "call_function"}
    assert not any("batch_norm" in str(target) or "permute" in str(target) for target in targets)
    assert operator.getitem not in targets
    module = folded.module()
    assert list(module.state_dict()) == names
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in module.parameters())
    with pytest.raises(RuntimeError, match="folded_weight"):  # the state dict of the model says so, and undoes nothing
        module.load_state_dict(model.state_dict())


@pytest.mark.parametrize("decomposed", [False, True], ids=["aten", "decomposed"])
def test_saves_loads_decomposes_unflattens_and_exports_again(decomposed):
    model, x = small()
    want = outputs(model, x)
    folded = fold_exported(exported(model, x, decomposed))
    for program in (folded, loaded(folded), folded.run_decompositions(), loaded(folded.run_decompositions())):
        same(outputs(program.module(), x), want)
    same(outputs(unflatten(folded), x), want)
    again = export(folded.module(), (x,))
    same(outputs(again.module(), x), want)
    assert fold_exported(again) is again
    assert counted() == (3, {})
    compiled = torch.compile(folded.module(), backend="aot_eager")
    same(outputs(compiled, x), want)


def test_folds_what_was_loaded():
    model, x = small()
    folded = fold_exported(loaded(exported(model, x)))
    assert counted() == (3, {})
    same(outputs(folded.module(), x), outputs(model, x))


@pytest.mark.parametrize("decomposed", [False, True], ids=["aten", "decomposed"])
def test_dynamic_shapes_stay_dynamic(decomposed):
    model, x = small()
    shapes = ({0: Dim("batch", min=1, max=64), 2: Dim("height", min=4, max=100)},)
    ep = exported(model, x, decomposed, dynamic_shapes=shapes)
    folded = fold_exported(ep)
    assert folded.range_constraints == ep.range_constraints
    assert len(folded.range_constraints) == 2
    for shape in [(2, 4, 9, 8), (7, 4, 31, 8)]:
        x = torch.randn(shape)
        same(outputs(folded.module(), x), outputs(model, x))
    with pytest.raises(Exception, match=r"size|dim|range|guard|Guard"):
        folded.module()(torch.randn(65, 4, 9, 8))


def test_gradients_of_what_folds_and_of_the_input():
    """Nothing is folded in a call; what trains is the folded weight, where something of it was trainable."""
    model, x = small()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    module = fold_exported(exported(model, x)).module()
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == [
        "0.folded_weight",
        "0.folded_bias",
    ]
    leaf, other = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    module(leaf).square().sum().backward()
    model(other).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_mixed_dtypes_and_channels_last():
    model, x = small()
    model[0].bfloat16()
    want = outputs(model[:2], x.bfloat16())
    folded = fold_exported(exported(model[:2], x.bfloat16()))
    same(outputs(folded.module(), x.bfloat16()), want, torch.bfloat16)
    assert {p.dtype for p in folded.state_dict.values()} == {torch.bfloat16}
    model, x = small()
    model = model.to(memory_format=torch.channels_last)
    folded = fold_exported(exported(model, x))
    assert folded.state_dict["0.folded_weight"].is_contiguous(memory_format=torch.channels_last)


# -- sharing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", [False, True], ids=["aten", "decomposed"])
def test_one_convolution_and_two_batch_norms(decomposed):
    model = Calls(
        lambda m, x: m.a(m.conv(x)) + m.b(m.conv(x + 1)),
        conv=nn.Conv2d(4, 6, 3),
        a=nn.BatchNorm2d(6),
        b=nn.BatchNorm2d(6),
    )
    model, x = scramble(model.eval(), 1e-3), torch.randn(2, 4, 9, 8)
    folded = fold_exported(exported(model, x, decomposed))
    same(outputs(folded.module(), x), outputs(model, x))
    paths = ["conv.folded_weight", "conv.folded_bias", "conv.folded_weight_1", "conv.folded_bias_1"]
    assert sorted(folded.state_dict) == sorted(paths)
    same(outputs(loaded(folded).module(), x), outputs(model, x))


def test_a_weight_that_is_read_elsewhere_stays_and_its_other_names():
    """A convolution that is called without its BatchNorm, too, under another name."""
    model = Calls(lambda m, x: m.bn(m.conv(x)) * m.other(x), conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6))
    model.other = model.conv
    model, x = scramble(model.eval(), 1e-3), torch.randn(2, 4, 9, 8)
    folded = fold_exported(exported(model, x))
    same(outputs(folded.module(), x), outputs(model, x))
    kept = set(folded.state_dict) - {
        "conv.folded_weight",
        "conv.folded_bias",
        "other.folded_weight",
        "other.folded_bias",
    }
    assert {name.split(".")[1] for name in kept} == {"weight", "bias"}
    same(outputs(loaded(folded).module(), x), outputs(model, x))


def test_every_name_of_a_tied_weight_goes():
    model, x = small()
    model.tied, model.unused = model[3], nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential.forward(model[:10], x)
    ep = exported(model, x)
    assert {"3.weight", "tied.weight"} & set(ep.state_dict)
    folded = fold_exported(ep)
    same(outputs(folded.module(), x), outputs(model[:10], x))
    left = {name for name in folded.state_dict if "folded" not in name}
    assert left == {"unused.weight", "unused.bias"}, "what nobody reads before either is not ours to drop"


def test_a_batch_norm_that_also_stays_keeps_its_buffers():
    model = Calls(lambda m, x: m.bn(m.conv(x)) * m.bn(x), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4))
    model, x = scramble(model.eval(), 1e-3), torch.randn(2, 4, 9, 8)
    folded = fold_exported(exported(model, x))
    assert counted() == (1, {"input_not_conv": 1})
    assert {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"} <= set(folded.state_dict)
    assert "conv.weight" not in folded.state_dict
    same(outputs(folded.module(), x), outputs(model, x))


def test_statistics_that_are_not_in_the_state_dict():
    """Buffers that are not persistent are constants of the program."""
    model, x = small()
    bn = model[1]
    mean = bn.running_mean
    del bn.running_mean
    bn.register_buffer("running_mean", mean, persistent=False)
    ep = exported(model, x)
    assert "1.running_mean" in ep.constants
    folded = fold_exported(ep)
    assert folded.constants == {}
    same(outputs(loaded(folded).module(), x), outputs(model, x))


class Tokens(nn.Module):
    """A Linear over transposed tokens, and its BatchNorm, as LeViT has them."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, x):
        y = self.linear(x.flatten(2).transpose(1, 2))
        return self.bn(y.flatten(0, 1)).reshape_as(y)


@pytest.mark.parametrize("decomposed", [False, True], ids=["aten", "decomposed"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_linear_over_transposed_tokens(dynamic, decomposed):
    """Decomposed it is a batched product with the weight repeated."""
    model, x = scramble(Tokens().eval()), torch.randn(2, 8, 3, 4)
    ep = exported(model, x, decomposed, dynamic_shapes=({0: Dim("batch", min=2)},) if dynamic else None)
    folded = fold_exported(ep)
    assert counted() == (1, {})
    for batch in (2, 5) if dynamic else (2,):
        x = torch.randn(batch, 8, 3, 4)
        same(outputs(folded.module(), x), outputs(model, x))


def test_a_batched_product_that_repeats_columns_stays():
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bn = nn.Parameter(torch.randn(6, 1)), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.bn(torch.bmm(x, self.weight.t().expand(x.shape[0], 8, 6)).transpose(1, 2))

    model, x = scramble(Repeated().eval()), torch.randn(2, 5, 8)
    folded = fold_exported(exported(model, x))
    assert counted() == (0, {"input_not_conv": 1})
    same(outputs(folded.module(), x), outputs(model, x))


def test_a_sparse_buffer_beside_it():
    """It has no memory that another tensor could share."""

    class Beside(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
            self.register_buffer("mask", torch.eye(5).to_sparse())

        def forward(self, x):
            return torch.sparse.mm(self.mask, self.net(x).t())

    net, x = small()
    model = Beside(net).eval()
    try:
        ep = exported(model, x)
    except Exception as error:
        pytest.skip(f"torch {torch.__version__} exports no sparse tensors: {error}")
    folded = fold_exported(ep)
    assert counted() == (3, {})
    same(outputs(folded.module(), x), outputs(model, x))


# -- what stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", [False, True], ids=["aten", "decomposed"])
def test_training_mode_is_declined(decomposed):
    model, x = small()
    model[4].train()
    ep = exported(model, x, decomposed)
    folded = fold_exported(ep)
    assert counted() == (2, {"training": 1})
    assert [(row.batch_norm, row.conv, row.reason) for row in explain(ep).rows] == [
        ("1", "0", ""),
        ("4", "", "training"),
        ("9", "8", ""),
    ]
    before = model[4].running_mean.clone()
    module = folded.module()
    same(outputs(module, x), outputs(model, x))
    trained = dict(module.named_buffers())["4.running_mean"]
    assert not torch.equal(trained, before), "the BatchNorm that stays goes on counting"


def no_grad_inside(m, x):
    with torch.no_grad():
        return m.bn(m.conv(x))


def test_a_graph_inside_the_graph_is_declined_until_it_is_decomposed():
    model = scramble(Calls(no_grad_inside, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)).eval(), 1e-3)
    x = torch.randn(2, 4, 9, 8)
    ep = exported(model, x)
    assert fold_exported(ep) is ep
    assert counted() == (0, {"nested_graph": 1})
    assert [row.reason for row in explain(ep).rows] == ["nested_graph"]
    folded = fold_exported(ep.run_decompositions())
    assert counted()[0] == 1
    same(outputs(folded.module(), x), outputs(model, x))


def weight_written_before(m, x):
    m.conv.weight.view(-1).mul_(1.5)
    return m.bn(m.conv(x))


def weight_is_an_input(m, x):
    return m.bn(F.conv2d(x, x[:, :, :3, :3], m.conv.bias[:2]))


@pytest.mark.parametrize("decomposed", [False, True], ids=["aten", "decomposed"])
@pytest.mark.parametrize("load", [False, True], ids=["made here", "loaded"])
@pytest.mark.parametrize(
    ("call", "channels"),
    [(write_weight, 6), (write_statistics, 6), (weight_written_before, 6), (weight_is_an_input, 2)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_constant_is_declined(call, channels, decomposed, load):
    """Folding would freeze what the program itself changes: the second call shows it."""
    model = Calls(call, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(channels))
    model, x = scramble(model.requires_grad_(False).eval(), 1e-3), torch.randn(2, 4, 9, 8)
    ep = exported(copy.deepcopy(model), x, decomposed)
    ep = loaded(ep) if load else ep
    assert fold_exported(ep) is ep
    folded, declined = counted()
    assert folded == 0
    assert set(declined) <= {"not_constant", "mutated"}
    assert sum(declined.values()) == 1
    module = ep.module()
    for _ in range(2):
        same(outputs(module, x), outputs(model, x))


@pytest.mark.parametrize("call", [write_input, write_input_through_view])
def test_a_write_in_between_is_seen_in_a_loaded_program_too(call):
    """torch.export.load gives every fake tensor a storage of its own, so that a view shares none with its base."""
    model = scramble(Calls(call, conv=nn.Conv2d(4, 6, 3), bn=nn.BatchNorm2d(6)).eval(), 1e-3)
    ep = exported(model, torch.randn(2, 4, 9, 8))
    for program in (ep, loaded(ep)):
        assert [decline.reason.value for decline in find(program.graph).declines] == ["mutated"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_overflowing_fold_is_declined(dtype):
    """Tiny weights, a tiny variance and one channel of another size: the output is finite, and one folded weight is
    5e5, which fp16 does not hold. The other pair folds."""
    model = scramble(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)).eval())
    with torch.no_grad():
        model[0].weight[0] = 5
        model[0].bias[0] = model[1].running_mean[0] = model[1].running_var[0] = 0
        model[1].weight[0], model[1].bias[0], model[1].eps = 100, 0.5, 1e-6
    model[0].to(dtype), model[2].to(dtype)
    x = torch.zeros(1, 4, 5, 5, dtype=dtype)
    want = outputs(model, x)
    assert all(each.isfinite().all() for each in want)
    folded = fold_exported(exported(model, x))
    assert counted() == ((2, {}) if dtype is torch.float32 else (1, {"dtype": 1}))
    same(outputs(folded.module(), x), want, dtype)
    assert all(p.isfinite().all() for p in folded.state_dict.values() if p.is_floating_point())


@pytest.mark.parametrize("preserve", ["1", "0"])
def test_preserved_modules(preserve):
    """What crosses the border of a module whose signature is to be preserved has to stay; what does not, folds."""
    model, x = small()
    ep = exported(model, x, preserve_module_call_signature=(preserve,))
    folded = fold_exported(ep)
    assert counted() == (2, {"conv_shared": 1})
    same(outputs(unflatten(folded), x), outputs(model, x))
    torch._dynamo.utils.counters.clear()
    nested = nn.Sequential(model[:2], model[2:])
    ep = exported(nested, x, preserve_module_call_signature=("0",))
    folded = fold_exported(ep)
    assert counted() == (3, {})
    same(outputs(unflatten(folded), x), outputs(nested, x))
    same(outputs(loaded(folded).module(), x), outputs(nested, x))


def test_a_deep_program_whose_weight_takes_many_operators():
    """Nothing recurses once for each operator, and no operator is visited once for each path that leads to it."""

    def call(m, x):
        weight = m.conv.weight
        for _ in range(1000):
            x = x.sin()
        for _ in range(600):
            weight = weight - 1e-4 * weight.tanh()
        return m.bn(F.conv2d(x, weight))

    model = scramble(Calls(call, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)).eval(), 1e-3)
    x = torch.randn(2, 3, 5, 5)
    folded = fold_exported(exported(model, x))
    assert not list(folded.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default))
    same(outputs(folded.module(), x), outputs(model, x))


# -- the face ---------------------------------------------------------------------------------------------------------


def test_explain():
    model, x = small()
    explanation = explain(exported(model, x))
    assert [(row.batch_norm, row.conv) for row in explanation.rows] == [("1", "0"), ("4", "3"), ("9", "8")]
    assert str(explanation).endswith("3 of 3 fold")
    assert counted() == (0, {})


def test_on_decline():
    model, x = small()
    ep = exported(nn.Sequential(model[0], nn.ReLU(), model[1]), x)
    with pytest.raises(DeclinedError, match="not the output of a convolution"):
        fold_exported(ep, on_decline="raise")
    with pytest.warns(DeclinedWarning, match="not the output of a convolution"):
        assert fold_exported(ep, on_decline="warn") is ep
    assert fold_exported(ep) is ep
    with pytest.raises(OptionError, match="on_decline='never' is not an option"):
        fold_exported(ep, on_decline="never")


@pytest.mark.parametrize("wrong", [nn.Conv2d(1, 1, 1), None])
def test_anything_else_is_one_clear_line(wrong):
    with pytest.raises(TypeError, match=r"takes a torch\.export\.ExportedProgram, not \w+: call torch\.export\.export"):
        fold_exported(wrong)


def test_it_is_offered_where_everything_is():
    assert triton_convbn.fold_exported is fold_exported
    assert isinstance(fold_exported(exported(*small())), ExportedProgram)


@pytest.mark.slow
def test_ahead_of_time(tmp_path):
    model, x = small()
    shapes = ({0: Dim("batch", min=1, max=64)},)
    folded = fold_exported(exported(model, x, dynamic_shapes=shapes))
    path = torch._inductor.aoti_compile_and_package(folded, package_path=str(tmp_path / "folded.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for batch in (2, 5):
        x = torch.randn(batch, 4, 9, 8)
        same(outputs(run, x), outputs(model, x))


def test_fold_in_inference_mode() -> None:
    """What is made there could not be trained, loaded or captured outside."""
    model = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().eval())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    program = export(model, (x,))
    with torch.inference_mode():
        folded = fold_exported(program)
    module = folded.module()
    module.load_state_dict(module.state_dict())
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    torch.testing.assert_close(module(x), model(x))
