"""`freeze_statistics`: BatchNorms stay in eval mode whatever is done to the model."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import scramble
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrize

from triton_convbn import ConvBNPass, conv_bn_eval, explain, freeze_statistics, unfreeze_statistics
from triton_convbn.inductor import eager_backend

AFFINE = {"stem.1.weight", "stem.1.bias", "head.1.weight", "head.1.bias"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))

    @property
    def norms(self) -> tuple[bool, bool]:
        """The modes of the two BatchNorms."""
        return self.stem[1].training, self.head[1].training


def net() -> Net:
    return scramble(Net(), 1e-3)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def test_train_leaves_the_batch_norms_in_eval_mode(x: Tensor) -> None:
    model = net()
    assert freeze_statistics(model) is model
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert (model.training, model.head[2].training) == (mode, mode)
        assert model.norms == (False, False)
        assert model.stem[1].train(mode) is model.stem[1]
        assert model.stem[1].eval() is model.stem[1]
        model(x)
    torch.testing.assert_close(dict(model.named_buffers()), {name: before[name] for name, _ in model.named_buffers()})


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("later", [None, True, False])
def test_unfreeze_restores_the_mode(mode: bool, later: bool | None) -> None:
    """The BatchNorms are as if they had never been frozen."""
    model = net().train(mode)
    freeze_statistics(model)
    if later is not None:
        model.train(later)
    assert unfreeze_statistics(model) is model
    assert set(model.norms) == {mode if later is None else later}
    for again in (True, False):
        assert set(model.train(again).norms) == {again}
    assert "train" not in vars(model.stem[1])
    unfreeze_statistics(model)


def test_affine_parameters() -> None:
    """They require gradients again after unfreezing, but for those that did not before."""
    model = net()
    model.stem[1].bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    freeze_statistics(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    for _ in range(2):
        freeze_statistics(model, affine=True)
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == AFFINE
    unfreeze_statistics(copy.deepcopy(model))
    assert not model.stem[1].weight.requires_grad
    unfreeze_statistics(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_where() -> None:
    model = net()
    freeze_statistics(model, where=lambda name, module: name == "stem.1" and module is model.stem[1])
    assert model.train().norms == (False, True)
    freeze_statistics(model, where=lambda name, _: name.startswith("head"))
    assert model.train().norms == (False, False)
    unfreeze_statistics(model, where=lambda name, _: name.startswith("stem"))
    assert model.train().norms == (True, False)


class OwnForward(nn.BatchNorm2d):
    """Like timm's BatchNormAct2d: a BatchNorm with a child that has a mode of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x).relu())


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, OwnForward])
def test_kinds(kind: type[nn.Module]) -> None:
    module = freeze_statistics(kind(3)).train()
    assert not module.training
    assert all(child.training for child in module.children())
    assert type(module) is kind


def test_timm() -> None:
    layers = pytest.importorskip("timm.layers")
    module = freeze_statistics(layers.BatchNormAct2d(3, drop_layer=nn.Dropout)).train()
    assert not module.training
    assert module.drop.training


def test_other_modules_are_left_alone() -> None:
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    model = freeze_statistics(nn.Sequential(untracked, nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)), affine=True)
    assert all(module.training for module in model.train())
    assert all(p.requires_grad for p in model.parameters())


def test_a_train_of_its_own_comes_back() -> None:
    """Some keep a BatchNorm frozen by a `train` that does nothing."""
    bn = nn.BatchNorm2d(3).eval()
    bn.train = lambda mode=True: bn
    own = bn.train
    unfreeze_statistics(freeze_statistics(bn))
    assert bn.train is own
    assert not bn.train().training


def test_lazy_modules_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="2 is lazy and has no shape: call the model once first"):
        freeze_statistics(model)
    assert model[1].training
    model(torch.randn(2, 3, 8, 8))
    assert not any(module.training for module in freeze_statistics(model).train()[1:])


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "deepcopy of a pickle": lambda model: copy.deepcopy(saved(model)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_frozen_by_themselves(copied: Callable[[Any], Any]) -> None:
    model = freeze_statistics(net(), affine=True)
    other = copied(model)
    assert other.train().norms == (False, False)
    assert other.stem[1].train() is other.stem[1]
    unfreeze_statistics(other)
    assert other.train().norms == (True, True)
    assert other.stem[1].weight.requires_grad
    assert model.train().norms == (False, False)
    assert not model.stem[1].weight.requires_grad


def test_state_dicts_load_both_ways() -> None:
    plain, frozen = net(), freeze_statistics(net())
    assert plain.state_dict().keys() == frozen.state_dict().keys()
    frozen.load_state_dict(plain.state_dict())
    torch.testing.assert_close(frozen.state_dict(), plain.state_dict())
    plain.load_state_dict(frozen.state_dict())
    assert frozen.train().norms == (False, False)
    assert plain.train().norms == (True, True)


def test_converted_to_sync_batch_norm() -> None:
    """The new modules are in eval mode until `train` is called. They are frozen by another call, or by the first."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(freeze_statistics(net()))
    assert type(model.stem[1]) is nn.SyncBatchNorm
    assert model.norms == (False, False)
    assert model.train().norms == (True, True)
    freeze_statistics(model)
    assert model.train().norms == (False, False)


def test_parametrizations_come_and_go() -> None:
    """They replace the module's class, before or after the freeze, and restore it."""
    model = net()
    parametrize.register_parametrization(model.stem[1], "weight", nn.Identity())
    freeze_statistics(model)
    parametrize.register_parametrization(model.head[1], "weight", nn.Identity())
    for bn in (model.stem[1], model.head[1]):
        assert model.train().norms == (False, False)
        parametrize.remove_parametrizations(bn, "weight")
        assert type(bn) is nn.BatchNorm2d
    assert copy.deepcopy(model).train().norms == (False, False)
    assert unfreeze_statistics(model).train().norms == (True, True)


def test_eager_mode_and_symbolic_traces_fold(x: Tensor) -> None:
    """There are no hooks, which both decline."""
    model = freeze_statistics(net()).train()
    conv, bn, _ = model.stem
    torch.testing.assert_close(conv_bn_eval(conv, bn, x), bn(conv(x)))
    traced = fx.symbolic_trace(model).train()
    assert not traced.get_submodule("stem.1").training
    ConvBNPass()(traced.graph)
    assert counters["triton_convbn"]["folded"] == 2


def test_dynamo_captures_one_graph(x: Tensor) -> None:
    """No graph break, and no recompilation by calls of `train`. Dropout, which changes its mode, is no part of it."""
    model = freeze_statistics(net())
    model.head[2] = nn.Identity()
    graphs = 0

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return eager_backend(gm, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for mode in (True, True, False, True):
        model.train(mode)
        torch.testing.assert_close(compiled(x), model(x))
        freeze_statistics(compiled)
    assert graphs == 1
    assert counters["triton_convbn"]["folded"] == 2
    unfreeze_statistics(model)
    compiled(x)
    assert graphs == 2
    assert counters["triton_convbn"]["declined:training"] == 2


def test_export(x: Tensor) -> None:
    model = freeze_statistics(net()).train()
    program = torch.export.export(model, (x,))
    assert explain(program).folded == 2


def test_explain_names_it(x: Tensor) -> None:
    model = net()
    assert "freeze_statistics" in str(explain(model, x))
    assert explain(freeze_statistics(model).train(), x).folded == 2


@pytest.mark.parametrize("function", [freeze_statistics, unfreeze_statistics])
def test_what_is_no_module(function: Any) -> None:
    with pytest.raises(TypeError, match="int is no module"):
        function(5)
