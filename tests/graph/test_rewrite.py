"""The rewritten graph is ordinary: it prints, recompiles, copies and pickles. A second pass changes nothing."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from checking import CAPTURES, capture_modules, check, counted, scramble
from torch import fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from triton_convbn import ConvBNPass
from triton_convbn.ops.reference import fold_reference


def model_and_input():
    layers = [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.ConvTranspose2d(6, 4, 3, groups=2)]
    return scramble(nn.Sequential(*layers, nn.BatchNorm2d(4)).eval(), 1e-3), torch.randn(2, 4, 9, 8)


class AsFunctions(nn.Module):
    def __init__(self, conv, bn):
        super().__init__()
        self.weight, self.scale, self.shift = conv.weight, bn.weight, bn.bias
        self.register_buffer("mean", bn.running_mean)
        self.register_buffer("var", bn.running_var)

    def forward(self, x):
        return F.batch_norm(F.conv2d(x, self.weight), self.mean, self.var, self.scale, self.shift)


@pytest.fixture(params=CAPTURES)
def rewritten(request):
    model, x = model_and_input()
    gm = CAPTURES[request.param](copy.deepcopy(model), x)
    ConvBNPass()(gm.graph)
    gm.recompile()
    assert counted() == (2, {})
    return model, gm, x


def test_prints_and_recompiles(rewritten):
    model, gm, x = rewritten
    assert "reference_fold" in gm.code
    assert "fold" in gm.print_readable(print_output=False)
    gm.graph.lint()
    gm.recompile()
    check(gm, model, x, params_of=gm)


def test_deepcopy_is_independent(rewritten):
    model, gm, x = rewritten
    copied = copy.deepcopy(gm)
    check(copied, model, x, params_of=copied)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    check(gm, model, x, params_of=gm)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@pytest.mark.parametrize("functions", [False, True])
def test_pickles(functions, how):
    """Graphs of symbolic_trace pickle. Those of torch.export never do."""
    model, x = model_and_input()
    if functions:
        model[0], model[1] = AsFunctions(model[0], model[1]), nn.Identity()
    gm = capture_modules(copy.deepcopy(model), x)
    ConvBNPass()(gm.graph)
    gm.recompile()
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(gm))
    else:
        buffer = io.BytesIO()
        torch.save(gm, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert sum(node.target is fold_reference for node in loaded.graph.nodes) == 2
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


def test_second_pass_changes_nothing(rewritten):
    _, gm, _ = rewritten
    before = gm.code
    ConvBNPass()(gm.graph)
    gm.recompile()
    assert gm.code == before
    assert counted() == (2, {})


def test_traces_again(rewritten):
    """A fold of proxies is traced as one call."""
    model, gm, x = rewritten
    again = fx.symbolic_trace(gm)
    assert sum(node.target is fold_reference for node in again.graph.nodes) == 2
    check(again, model, x, params_of=again)


def test_compiles_again(rewritten):
    model, gm, x = rewritten
    check(torch.compile(gm, backend="aot_eager"), model, x, params_of=gm)


@pytest.mark.parametrize("capture", CAPTURES)
def test_second_pass_after_a_fold_of_two_batch_norms(capture):
    """Both fold at once, so that a second pass finds none."""
    torch.manual_seed(0)
    model = scramble(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)).eval())
    x = torch.randn(2, 4, 9, 8)
    gm = CAPTURES[capture](copy.deepcopy(model), x)
    ConvBNPass()(gm.graph)
    gm.recompile()
    before = gm.code
    ConvBNPass()(gm.graph)
    gm.recompile()
    assert gm.code == before
    assert counted() == (2, {})
    check(gm, model, x, params_of=gm)


def test_weights_are_read_on_every_call(rewritten):
    model, gm, x = rewritten
    want = model(x)
    with torch.no_grad():
        for mine, theirs in zip(gm.buffers(), gm.buffers(), strict=True):
            if mine.is_floating_point():
                theirs.mul_(1.5)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.mul_(1.5)
    assert not torch.allclose(model(x), want)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-4)


def tags(**options):
    model, x = model_and_input()
    gm = CAPTURES["aten"](model, x)
    ConvBNPass(**options)(gm.graph)
    return {node.target: node.meta.get("recompute") for node in gm.graph.nodes if node.op == "call_function"}


def test_only_folds_are_recomputed_and_only_with_recompute():
    with_tags = tags()
    assert with_tags[fold_reference] is CheckpointPolicy.MUST_RECOMPUTE
    assert with_tags[torch.ops.aten.conv2d.default] is None
    assert set(tags(recompute=False).values()) == {None}


def test_nodes_keep_names_and_origins():
    model, x = model_and_input()
    gm = CAPTURES["aten"](model, x)
    ConvBNPass()(gm.graph)
    folds = [node for node in gm.graph.nodes if node.target is fold_reference]
    assert [node.name for node in folds] == ["batch_norm_fold", "batch_norm_1_fold"]
    assert all("BatchNorm2d" in str(node.meta["nn_module_stack"]) for node in folds)


def test_annotations_stay_with_their_nodes(monkeypatch):
    """Stages of a pipeline, memory budgets: pairs of two annotations are not folded by one call."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            pair = [nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(3)]
            self.parts = nn.ModuleList(scramble(nn.Sequential(*copy.deepcopy(pair)).eval(), 1e-3) for _ in range(3))

        def forward(self, x):
            for index, part in enumerate(self.parts):
                with torch.fx.traceback.annotate({"stage": index // 2}):
                    x = part(x)
            return x

    found = []

    def backend(gm, _inputs):
        ConvBNPass(when="always")(gm.graph)
        found.extend(node for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    with torch.fx.traceback.preserve_node_meta():
        torch.compile(Stages(), backend=backend)(torch.randn(2, 3, 8, 8))
    assert counted() == (3, {})
    folds = [node for node in found if node.target is torch.ops.triton_convbn.fold.default]
    assert [node.meta["custom"]["stage"] for node in folds] == [0, 1]
    stages = [node.meta["custom"]["stage"] for node in found if node.target is torch.conv2d]
    assert stages == [0, 0, 1]
    assert all("stage" in node.meta["custom"] for node in found)
