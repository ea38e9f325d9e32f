"""`explain`: every BatchNorm by name, with its convolution or the reason why it stays."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from triton_convbn import ConvBNPass, explain, patched
from triton_convbn.explanation import Row
from triton_convbn.graph.reasons import Reason
from triton_convbn.models import randomize


def conv(width: int = 4) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, padding=1)


class Block(nn.Module):
    """Two pairs: one folds, the other's convolution is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = conv(), nn.BatchNorm2d(4)
        self.second, self.shared = conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.norm(self.first(x))))
        return self.shared(y) + y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = Block()
        self.after_relu = nn.BatchNorm2d(4)
        self.spare = nn.BatchNorm2d(4)  # forward never calls it
        self.untracked_conv, self.untracked = conv(), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_relu(F.relu(self.block(self.stem(x))))
        return self.untracked(self.untracked_conv(x))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def outline(rows: tuple[Row, ...]) -> list[tuple[str, str, str]]:
    return [(row.batch_norm, row.conv, row.reason) for row in rows]


EVAL = [
    ("stem.1", "stem.0", ""),
    ("block.norm", "block.first", ""),
    ("block.shared", "", "conv_shared"),
    ("after_relu", "", "pads_zeros"),
    ("untracked", "", "no_running_stats"),
    ("spare", "", "not_reached"),
]


def test_names_and_reasons(x: Tensor) -> None:
    explanation = explain(Net().eval(), x)
    assert outline(explanation.rows) == EVAL
    assert explanation.folded == 2
    for row in explanation.rows:
        assert row.why == (Reason(row.reason).text if row.reason else "")


def test_training_mode(x: Tensor) -> None:
    net = Net()
    explanation = explain(net, x)
    assert explanation.folded == 0
    assert [row.reason for row in explanation.rows] == ["training"] * 4 + ["no_running_stats", "not_reached"]
    net.eval()
    net.stem[1].train()
    assert outline(explain(net, x).rows) == [("stem.1", "", "training"), *EVAL[1:]]


@pytest.mark.parametrize("prepare", [nn.Module.eval, nn.Module.train], ids=["eval", "train"])
def test_leaves_everything_as_it_was(prepare: Callable[[nn.Module], nn.Module], x: Tensor) -> None:
    net = prepare(randomize(nn.Sequential(Net(), nn.Dropout(0.5))))
    net[0].stem[1].train()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    flags = {name: module.training for name, module in net.named_modules()}
    forward, types = net.forward, [type(module) for module in net.modules()]
    inputs, random = x.clone(), torch.get_rng_state()
    counted = copy.deepcopy(dict(counters["triton_convbn"])), counters["inductor"]["efficient_conv_bn_eval"]
    explain(net, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, inputs)
    assert {name: module.training for name, module in net.named_modules()} == flags
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert (net.forward, [type(module) for module in net.modules()]) == (forward, types)
    # It says what would happen; it does not count as having happened.
    assert (dict(counters["triton_convbn"]), counters["inductor"]["efficient_conv_bn_eval"]) == counted


def test_agrees_with_the_pass(x: Tensor) -> None:
    net = Net().eval()
    explanation = explain(net, x)
    torch.compile(net, backend=lambda gm, _: ConvBNPass()(gm.graph) or gm.recompile() or gm.forward)(x)
    counted = dict(counters["triton_convbn"])
    declined = [row.reason for row in explanation.rows if row.reason not in ("", "not_reached")]
    assert counted == {"folded": explanation.folded, **{f"declined:{r}": declined.count(r) for r in declined}}


class Broken(nn.Module):
    """A graph break between a convolution and its BatchNorm, and a whole pair behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(3), nn.BatchNorm2d(3)
        self.later = nn.Sequential(conv(3), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        torch._dynamo.graph_break()
        return self.later(self.bn(y))


def test_graph_break(x: Tensor) -> None:
    assert outline(explain(Broken().eval(), x).rows) == [
        ("bn", "", "pads_zeros"),
        ("later.1", "later.0", ""),
    ]


class Twice(nn.Module):
    """One pair called on two inputs, and one BatchNorm that serves two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = conv(3), nn.BatchNorm2d(3), conv(3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return self.bn(self.conv(y)) * self.bn(self.other(y))


def test_module_called_again(x: Tensor) -> None:
    """A row a call: each is folded for itself."""
    with torch.no_grad(), patched(when="always"):
        rows = explain(Twice().eval(), x).rows
    assert outline(rows) == [("bn", "conv", ""), ("bn", "conv", ""), ("bn", "other", "")]


class Functional(nn.Module):
    """A BatchNorm that is no nn.BatchNorm: its call is named after the module that it is written in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(3) + 0.5), nn.Parameter(torch.randn(3))
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("var", torch.rand(3) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias)


def test_functional(x: Tensor) -> None:
    net = nn.Sequential(conv(3), Functional(), nn.ReLU(), Functional())
    assert outline(explain(net, x).rows) == [("1", "0", ""), ("3", "", "input_not_conv")]


def test_outermost_module_is_named_after_its_class(x: Tensor) -> None:
    assert outline(explain(nn.BatchNorm2d(3).eval(), x).rows) == [("BatchNorm2d", "", "input_not_conv")]


def test_keywords(x: Tensor) -> None:
    class Keyword(Twice):
        def forward(self, *, image: Tensor, again: bool = False) -> Tensor:
            return super().forward(image) if again else self.bn(self.conv(image))

    assert len(explain(Keyword().eval(), image=x).rows) == 1
    assert len(explain(Keyword().eval(), image=x, again=True).rows) == 3


def test_no_batch_norm(x: Tensor) -> None:
    explanation = explain(conv(3), x)
    assert explanation.rows == ()
    assert explanation.folded == 0
    assert str(explanation) == "0 of 0 fold"
    assert len(explanation.to_frame()) == 0
    assert list(explanation.to_frame().columns) == ["batch_norm", "conv", "reason", "why", "detail", "kept"]


def test_to_frame(x: Tensor) -> None:
    explanation = explain(Net().eval(), x)
    frame = explanation.to_frame()
    assert list(frame.columns) == ["batch_norm", "conv", "reason", "why", "detail", "kept"]
    assert list(frame[["batch_norm", "conv", "reason"]].itertuples(index=False, name=None)) == EVAL
    assert frame["reason"].value_counts()["conv_shared"] == 1


def test_str(x: Tensor) -> None:
    lines = str(explain(Net().eval(), x)).splitlines()
    assert lines[-1] == "2 of 6 fold"
    assert len(lines) == 7
    assert lines[0].split()[:4] == ["stem.1", "<-", "stem.0,", "keeps"]
    assert lines[2].startswith("block.shared  declined: conv_shared: ")
    assert Reason.CONV_SHARED.text in lines[2]


def test_what_is_compiled_already_still_works(x: Tensor) -> None:
    net = randomize(Net()).eval()
    with torch.no_grad():
        compiled = torch.compile(net, backend="eager")
        before = compiled(x)
        explain(net, x)
        assert torch.equal(compiled(x), before)


def test_error_of_the_model_is_raised() -> None:
    net = Net().eval()
    with pytest.raises(RuntimeError, match="channels"):
        explain(net, torch.randn(2, 5, 8, 8))
    assert outline(explain(net, torch.randn(2, 3, 8, 8)).rows) == EVAL


class Keeps(nn.Module):
    """A model that keeps what its last forward returned, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.m = randomize(nn.Sequential(conv(3), nn.BatchNorm2d(3)).eval())
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.m(x)
        return self.last


def test_models_that_cannot_be_copied() -> None:
    """Their parameters, buffers and attributes are as before."""
    x = torch.randn(2, 3, 8, 8)
    normed = nn.Sequential(torch.nn.utils.weight_norm(conv(3)), nn.BatchNorm2d(3), conv(3), nn.BatchNorm2d(3))
    normed.eval()[3].train()
    keeps = Keeps()
    for model, want in ((normed, ["", "training"]), (keeps, [""])):
        model(x)
        before = copy.deepcopy(model.state_dict())
        kept = keeps.last
        assert [row.reason for row in explain(model, x).rows] == want
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert keeps.last is kept


class Counts(nn.Module):
    """A model that rebinds a buffer and gains an attribute, and whose lock cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.m = randomize(nn.Sequential(conv(3), nn.BatchNorm2d(3)).eval())
        self.lock = threading.Lock()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.seen = True
        self.late = nn.Parameter(torch.ones(3))
        return self.m(x)


def test_a_buffer_that_a_forward_replaces() -> None:
    model = Counts()
    (calls,) = (each for name, each in model.named_buffers() if name == "calls")
    assert [row.reason for row in explain(model, torch.randn(2, 3, 8, 8)).rows] == [""]
    assert model.calls is calls
    assert calls == 0
    assert not hasattr(model, "seen")
    assert not hasattr(model, "late")


def test_a_scripted_part_of_a_model_that_cannot_be_copied() -> None:
    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = torch.nn.utils.weight_norm(conv(3)), nn.BatchNorm2d(3)
            self.scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))

        def forward(self, x: Tensor) -> Tensor:
            self.bn.num_batches_tracked.add_(1)
            y = self.bn(self.conv(x))
            torch._dynamo.graph_break()
            return self.scripted(y)

    model = Scripted().eval()
    before = copy.deepcopy(model.state_dict())
    assert [row.reason for row in explain(model, torch.randn(2, 3, 8, 8)).rows] == [""]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_lazy_modules() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.LazyConv2d(5, 3), nn.BatchNorm2d(5)).eval()
    assert explain(model, x).folded == 1
    assert isinstance(model[0], nn.LazyConv2d)
    model = nn.Sequential(nn.LazyConv2d(5, 3), nn.LazyBatchNorm2d()).eval()
    with pytest.raises(ValueError, match="call it once"):
        explain(model, x)
    model(x)
    assert explain(model, x).folded == 1


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m = randomize(nn.Sequential(conv(3), nn.BatchNorm2d(3)).eval())

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.m(x).relu()


def test_instances_that_share_a_graph() -> None:
    """After a graph break Dynamo compiles the second instance no more: its graph is that of the first."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Breaks(), Breaks(), Breaks()])

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[0](x) + self.parts[2](self.parts[1](x))

    rows = explain(Three().eval(), torch.randn(2, 3, 8, 8)).rows
    assert [(row.batch_norm, row.conv) for row in rows] == [
        (f"parts.{index}.m.1", f"parts.{index}.m.0") for index in (0, 1, 2)
    ]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(conv(), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


class Branching(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.block, lambda x: 2 * self.block(x), (x,))


@pytest.mark.parametrize(("make", "calls"), [(Checkpointed, 1), (Branching, 2)])
def test_graphs_inside_a_graph(make: Callable[[], nn.Module], calls: int) -> None:
    model, x = make().eval(), torch.randn(2, 4, 6, 6)
    found = [(row.batch_norm, row.conv, row.reason) for row in explain(model, x).rows]
    assert found == [("block.1", "block.0", "")] * calls
    counters.clear()
    torch.compile(model, backend="triton_convbn_eager")(x)
    assert counters["triton_convbn"]["folded"] == calls


@pytest.mark.parametrize("backend", ["eager", "triton_convbn_eager"])
def test_compiled_model(backend: str) -> None:
    """The compiled module would run its own backend."""
    model = nn.Sequential(conv(), nn.BatchNorm2d(4)).eval()
    explanation = explain(torch.compile(model, backend=backend), torch.randn(2, 4, 6, 6))
    assert [(row.batch_norm, row.conv) for row in explanation.rows] == [("1", "0")]


def test_what_is_no_module() -> None:
    with pytest.raises(TypeError, match="explain: int is no module"):
        explain(5, torch.randn(1))  # type: ignore[arg-type]
