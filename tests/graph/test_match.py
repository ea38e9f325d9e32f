"""Every reason for which a BatchNorm is left alone, and what the matcher knows of effects."""

import math
import operator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checking import capture_aten, counted, dynamo, reasons, scramble
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_convbn import ConvBNPass, DeclinedError, DeclinedWarning
from triton_convbn.graph.match import find
from triton_convbn.graph.mutation import Mutations
from triton_convbn.graph.reasons import Reason
from triton_convbn.ops.reference import fold_reference

aten = torch.ops.aten
FAKE = FakeTensorMode()


def tensor(*shape, dtype=torch.float32, device="cpu"):
    with FAKE:
        return torch.empty(*shape, dtype=dtype, device=device)


class Builder:
    """A graph of functions as Dynamo writes it, with the fake tensors that it leaves in `example_value`."""

    def __init__(self):
        self.graph = fx.Graph()

    def input(self, name, *shape, **options):
        node = self.graph.placeholder(name)
        if shape:
            node.meta["example_value"] = tensor(*shape, **options)
        return node

    def call(self, function, *args, shape=None, dtype=torch.float32, **kwargs):
        node = self.graph.call_function(function, args, kwargs)
        if shape is not None:
            node.meta["example_value"] = tensor(*shape, dtype=dtype)
        return node

    def pair(self, between=lambda _b, _nodes: None, **changes):
        """conv2d and batch_norm; `changes` replace the inputs by other tensors, or by None."""
        shapes = {"x": (2, 4, 9, 9), "w": (6, 4, 3, 3), "mean": (6,), "var": (6,), "gamma": (6,), "beta": (6,)}
        nodes = {}
        for name, shape in shapes.items():
            given = changes.get(name, shape)
            options = {}
            if isinstance(given, dict):
                options = {key: value for key, value in given.items() if key != "shape"}
                given = given.get("shape", shape)
            nodes[name] = None if given is None else self.input(name, *given, **options)
        y = self.call(torch.conv2d, nodes["x"], nodes["w"], shape=changes.get("y", (2, 6, 7, 7)))
        nodes["y"] = y
        between(self, nodes)
        arguments = [y, *(nodes[name] for name in ("mean", "var", "gamma", "beta"))]
        training, eps = changes.get("training", False), changes.get("eps", 1e-5)
        z = self.call(F.batch_norm, *arguments, training, 0.1, eps, shape=(2, 6, 7, 7))
        self.graph.output((z, *changes.get("also", lambda _n: ())(nodes)))
        return self

    def reasons(self):
        self.graph.lint()
        findings = find(self.graph)
        return reasons(findings) if findings.declines else len(findings.pairs)


def build(**changes):
    return Builder().pair(**changes).reasons()


def test_the_pair_that_the_others_change_folds():
    assert build() == 1


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        (Reason.TRAINING, {"training": True}),
        (Reason.NO_RUNNING_STATS, {"mean": None, "var": None}),
        (Reason.CONV_SHARED, {"also": lambda nodes: (nodes["y"],)}),
        (Reason.UNBATCHED, {"x": (4, 9, 9), "y": (6, 7, 7)}),
        (Reason.UNKNOWN_SHAPE, {"w": ()}),
        (Reason.UNKNOWN_SHAPE, {"gamma": ()}),
        (Reason.UNKNOWN_SHAPE, {"x": (), "y": None}),
        (Reason.CHANNELS, {"mean": (5,)}),
        (Reason.CHANNELS, {"gamma": (6, 1)}),
        (Reason.DTYPE, {"w": {"dtype": torch.complex64}}),
        (Reason.DTYPE, {"beta": {"dtype": torch.int64}}),
        (Reason.DEVICE, {"var": {"device": "meta"}}),
    ],
)
def test_reasons(reason, changes):
    assert build(**changes) == [reason]


def test_arguments_that_the_graph_computes():
    b = Builder()
    flag = b.input("flag")
    assert b.pair(training=flag).reasons() == [Reason.DYNAMIC_ARGUMENT]
    b = Builder()
    b.pair(eps=b.input("eps"))
    assert b.reasons() == 1, "eps is only added, whatever it is"
    ConvBNPass()(b.graph)
    assert "eps" in {node.name for node in next(n for n in b.graph.nodes if n.target is fold_reference).all_input_nodes}
    b = Builder()
    assert b.pair(eps="0.1").reasons() == [Reason.DYNAMIC_ARGUMENT]


def test_dtype_of_the_output_has_to_be_the_convolutions():
    """A BatchNorm that widened its input could not be replaced by a convolution in the narrow dtype."""
    b = Builder().pair()
    (bn,) = [n for n in b.graph.nodes if n.target is F.batch_norm]
    bn.meta["example_value"] = tensor(2, 6, 7, 7, dtype=torch.float64)
    assert b.reasons() == [Reason.DTYPE]


def test_input_that_is_no_convolution():
    b = Builder()
    x, mean, var = b.input("x", 2, 6, 7, 7), b.input("mean", 6), b.input("var", 6)
    b.graph.output(b.call(F.batch_norm, x, mean, var))
    assert b.reasons() == [Reason.INPUT_NOT_CONV]


def test_convolution_used_twice_by_its_batch_norm():
    b = Builder()
    x, w = b.input("x", 6, 4, 3, 3), b.input("w", 6, 4, 3, 3)
    y = b.call(torch.conv2d, x, w, shape=(6, 6, 1, 1))
    mean = b.input("mean", 6)
    b.graph.output(b.call(F.batch_norm, y, mean, mean, y))
    assert b.reasons() == [Reason.CONV_SHARED]


@pytest.mark.parametrize("args", [(), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)])
def test_calls_that_do_not_fit_their_signature(args):
    b = Builder()
    x, w, mean = b.input("x", 2, 4, 9, 9), b.input("w", 6, 4, 3, 3), b.input("mean", 6)
    y = b.call(torch.conv2d, x, w, shape=(2, 6, 7, 7))
    b.graph.output(b.call(F.batch_norm, y, *args, nonsense=mean))
    assert b.reasons() == [Reason.UNREADABLE_CALL]
    b = Builder()
    x, w, mean = b.input("x", 2, 4, 9, 9), b.input("w", 6, 4, 3, 3), b.input("mean", 6)
    y = b.call(torch.conv2d, x, w, nonsense=1, shape=(2, 6, 7, 7))
    b.graph.output(b.call(F.batch_norm, y, mean, mean))
    assert b.reasons() == [Reason.UNREADABLE_CALL]


BATCH_NORMS = {
    aten._native_batch_norm_legit_no_training.default: (0.1, 1e-5),
    aten._native_batch_norm_legit.default: (False, 0.1, 1e-5),
    aten._batch_norm_no_update.default: (0.1, 1e-5),
    aten.native_batch_norm.default: (False, 0.1, 1e-5),
    aten.cudnn_batch_norm.default: (False, 0.1, 1e-5),
    aten.miopen_batch_norm.default: (False, 0.1, 1e-5),
}


def take_unused(b, bn):
    b.call(operator.getitem, bn, 1)
    return ()


def aten_pair(op, rest, use=lambda _b, _bn: (), eps_by_name=False):
    b = Builder()
    x, w = b.input("x", 2, 4, 9, 9), b.input("w", 6, 4, 3, 3)
    gamma, beta, mean, var = (b.input(name, 6) for name in ("gamma", "beta", "mean", "var"))
    y = b.call(aten.convolution.default, x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, shape=(2, 6, 7, 7))
    keywords = {"epsilon" if "cudnn" in str(op) or "miopen" in str(op) else "eps": rest[-1]} if eps_by_name else {}
    bn = b.call(op, y, gamma, beta, mean, var, *(rest[:-1] if eps_by_name else rest), **keywords)
    z = b.call(operator.getitem, bn, 0, shape=(2, 6, 7, 7))
    b.graph.output((z, *use(b, bn)))
    return b


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("op", BATCH_NORMS, ids=str)
def test_batch_norms_that_return_a_tuple(op, by_name):
    assert aten_pair(op, BATCH_NORMS[op], eps_by_name=by_name).reasons() == 1
    unused = aten_pair(op, BATCH_NORMS[op], take_unused)
    assert unused.reasons() == 1
    used = aten_pair(op, BATCH_NORMS[op], lambda b, bn: [b.call(operator.getitem, bn, 1)])
    assert used.reasons() == [Reason.STATISTICS_USED]
    whole = aten_pair(op, BATCH_NORMS[op], lambda _b, bn: [bn])
    assert whole.reasons() == [Reason.STATISTICS_USED]
    if len(BATCH_NORMS[op]) == 3:
        assert aten_pair(op, (True, 0.1, 1e-5)).reasons() == [Reason.TRAINING]


@pytest.mark.parametrize("op", BATCH_NORMS, ids=str)
def test_folding_them_leaves_a_graph_without_them(op):
    b = aten_pair(op, BATCH_NORMS[op], take_unused)
    ConvBNPass()(b.graph)
    b.graph.lint()
    assert op not in {node.target for node in b.graph.nodes}
    assert counted() == (1, {})


# -- module calls -----------------------------------------------------------------------------------------------------


def traced(conv, bn, call=lambda conv, bn, x: bn(conv(x))):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv, bn

        def forward(self, x):
            return call(self.conv, self.bn, x)

    return reasons(find(fx.symbolic_trace(Model().eval()).graph))


class OwnForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


# symbolic_trace looks into classes that are not torch's own: as leaves they appear as what they are, a module's call.
OwnForward.__module__ = OwnBatchNorm.__module__ = "torch.nn.modules.conv"


def test_modules_that_do_more_than_their_class():
    conv, bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    assert traced(conv, bn) == []
    assert traced(OwnForward(4, 6, 3), bn) == [Reason.CUSTOM_FORWARD]
    assert traced(conv, OwnBatchNorm(6)) == [Reason.CUSTOM_FORWARD]
    patched = nn.Conv2d(4, 6, 3)
    patched.forward = lambda x: x
    assert traced(patched, bn) == [Reason.CUSTOM_FORWARD]
    assert traced(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), bn) == [Reason.PARAMETRIZED]


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks(register):
    for hooked in (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)):
        getattr(hooked, f"register_{register}")(lambda *_: None)
        modules = (hooked, nn.BatchNorm2d(6)) if isinstance(hooked, nn.Conv2d) else (nn.Conv2d(4, 6, 3), hooked)
        assert traced(*modules) == [Reason.HOOKS]


def test_global_hooks():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert traced(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)) == [Reason.HOOKS]
    finally:
        handle.remove()


def test_ranks_that_the_modules_do_not_say():
    """BatchNorm2d takes only 4-D inputs. BatchNorm1d takes two ranks, and a Linear's or unbatched Conv1d's is wrong."""
    assert traced(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)) == [Reason.UNKNOWN_SHAPE]
    assert traced(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)) == [Reason.UNKNOWN_SHAPE]
    assert traced(nn.Linear(4, 6), nn.BatchNorm1d(6)) == [Reason.UNKNOWN_SHAPE]
    assert traced(nn.Linear(4, 6), nn.BatchNorm2d(6)) == [Reason.LINEAR_RANK]


def test_output_size_of_a_transposed_convolution():
    conv, bn = nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)
    assert traced(conv, bn, lambda conv, bn, x: bn(conv(x, output_size=[10, 10]))) == [Reason.DYNAMIC_ARGUMENT]
    assert traced(conv, bn, lambda conv, bn, x: bn(conv(x, None))) == [Reason.DYNAMIC_ARGUMENT]
    assert traced(conv, bn) == []


# -- effects ----------------------------------------------------------------------------------------------------------


def fresh(b):
    return b.input("other", 2, 4, 9, 9)


HARMLESS = {
    "pure": lambda b, n: b.call(torch.add, n["x"], 1),
    "pure method": lambda b, n: b.graph.call_method("add", (n["x"], 1)),
    "operator": lambda b, n: b.call(operator.add, n["x"], 1),
    "index": lambda b, n: b.call(operator.index, 1),
    "view": lambda b, n: b.call(torch.flatten, n["x"]),
    "relu": lambda b, n: b.call(F.relu, n["x"]),
    "relu not in place": lambda b, n: b.call(F.relu, n["x"], inplace=False),
    "write elsewhere": lambda b, n: b.graph.call_method("add_", (n["gamma"], 1)),
    "setitem elsewhere": lambda b, n: b.call(operator.setitem, n["mean"], 0, 1.0),
    "in-place aten elsewhere": lambda b, n: b.call(aten.add_.Tensor, n["mean"], 1),
    "eval instance_norm": lambda b, n: b.call(F.instance_norm, n["x"], n["w"], n["w"], use_input_stats=False),
    "layer_norm": lambda b, n: b.call(F.layer_norm, n["x"], (9,)),
    "getattr": lambda b, n: b.call(getattr, n["x"], "shape"),
    "check": lambda b, n: b.call(torch._check, True),
    "len": lambda b, n: b.call(len, n["x"]),
    "math": lambda b, n: b.call(math.sqrt, 2.0),
    "count of uses": lambda b, n: b.call(torch._C._log_api_usage_once, "python.nn_module"),
    "out elsewhere": lambda b, n: b.call(torch.add, n["x"], 1, out=n["gamma"]),
}

WRITES = {
    "method": lambda b, n: b.graph.call_method("add_", (n["x"], 1)),
    "__setitem__": lambda b, n: b.graph.call_method("__setitem__", (n["w"], 0, 1)),
    "__iadd__": lambda b, n: b.graph.call_method("__iadd__", (n["w"], 1)),
    "setitem": lambda b, n: b.call(operator.setitem, n["x"], 0, 1.0),
    "iadd": lambda b, n: b.call(operator.iadd, n["x"], 1.0),
    "imatmul": lambda b, n: b.call(operator.imatmul, n["w"], 1.0),
    "function": lambda b, n: b.call(torch.relu_, n["x"]),
    "inplace": lambda b, n: b.call(F.relu, n["x"], True),
    "inplace keyword": lambda b, n: b.call(F.dropout, n["x"], inplace=True),
    "inplace, input keyword": lambda b, n: b.call(F.hardtanh, input=n["x"], inplace=True),
    "aten": lambda b, n: b.call(aten.mul_.Tensor, n["w"], 2),
    "out": lambda b, n: b.call(torch.add, n["mean"], 1, out=n["w"]),
    "aten out": lambda b, n: b.call(aten.add.out, n["mean"], n["mean"], out=n["w"]),
    "foreach": lambda b, n: b.call(torch._foreach_add_, [n["mean"], n["w"]], 1),
    "training instance_norm": lambda b, n: b.call(F.instance_norm, n["x"], n["w"], n["w"]),
    "unknown tensor": lambda b, n: b.graph.call_method("add_", (b.call(torch.flatten, n["mean"]), 1)),
}

OPAQUE = {
    "grad mode": lambda b, n: b.call(torch._C._set_grad_enabled, False),
    "autocast": lambda b, n: b.call(torch.amp.autocast_mode._enter_autocast, "cpu", torch.bfloat16, True, None),
    "python function": lambda b, n: b.call(fresh, n["mean"]),
    "renormalizing embedding": lambda b, n: b.call(F.embedding, n["mean"], n["w"], None, 1.0),
    "method of its own": lambda b, n: b.graph.call_method("surprise", (n["mean"],)),
    "higher-order": lambda b, n: b.call(torch.ops.higher_order.cond, n["mean"], None, None, ()),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_between(name):
    assert build(between=HARMLESS[name]) == 1


@pytest.mark.parametrize("name", WRITES)
def test_writes_between(name):
    assert build(between=WRITES[name]) == [Reason.MUTATED]


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_between(name):
    assert build(between=OPAQUE[name]) == [Reason.OPAQUE_BETWEEN]


def test_a_write_through_a_view_is_a_write():
    def between(b, nodes):
        view = b.call(torch.flatten, nodes["x"])
        view.meta["example_value"] = nodes["x"].meta["example_value"].flatten()
        b.graph.call_method("add_", (view, 1))

    assert build(between=between) == [Reason.MUTATED]


def test_effects_outside_of_the_pair_do_not_count():
    b = Builder()
    before = b.input("before", 3)
    b.graph.call_method("add_", (before, 1))
    b.pair()
    (output,) = [n for n in b.graph.nodes if n.op == "output"]
    with b.graph.inserting_before(output):
        b.graph.call_method("add_", (before, 1))
    assert b.reasons() == 1
    assert len(Mutations(b.graph).effects) == 2


def test_module_calls_between():
    conv, bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def expect(module, want):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn, self.other = conv, bn, module

            def forward(self, x):
                y = self.conv(x)
                z = self.other(x)
                return self.bn(y) + z.sum()

        gm = fx.symbolic_trace(Model().eval())
        assert reasons(find(gm.graph)) == want

    expect(nn.ReLU(), [])
    expect(nn.ReLU(inplace=True), [Reason.MUTATED])
    expect(nn.Embedding(3, 4, max_norm=1.0), [Reason.OPAQUE_BETWEEN])
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    expect(hooked, [Reason.OPAQUE_BETWEEN])


# -- what is said about them ------------------------------------------------------------------------------------------


def declining():
    return scramble(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)).eval()), torch.randn(2, 4, 3, 3)


def test_a_module_is_no_graph() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    with pytest.raises(TypeError, match="not a Sequential: give it"):
        ConvBNPass()(gm)  # type: ignore[arg-type]


def test_on_decline_warns_or_raises_and_changes_nothing():
    model, x = declining()
    gm = capture_aten(model, x)
    before = str(gm.graph)
    with pytest.warns(DeclinedWarning, match="not the output of a convolution"):
        ConvBNPass(on_decline="warn")(gm.graph)
    with pytest.raises(DeclinedError, match="batch_norm"):
        ConvBNPass(on_decline="raise")(gm.graph)
    assert str(gm.graph) == before
    assert counted() == (0, {"input_not_conv": 2})


def test_every_reason_has_words_and_every_graph_reason_a_test():
    text = "".join(path.read_text() for path in Path(__file__).parent.parent.rglob("*.py"))
    for reason in Reason:
        assert reason.text
        assert f"Reason.{reason.name}" in text or f'"{reason.value}"' in text


def test_declines_are_counted_through_dynamo():
    model, x = declining()
    dynamo(model)(x)
    assert counted() == (0, {"input_not_conv": 1})
