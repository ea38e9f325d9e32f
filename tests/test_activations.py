"""Each layer keeps one tensor for backward, whatever its activation, and computes nothing expensive twice."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from post_grad_partition import partitioned, targets
from tiers import few
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint
from triton_convbn.perf.workloads import ACTIVATIONS

from triton_convbn import explain
from triton_convbn.measure import saved_for_backward
from triton_convbn.models import randomize

CHANNELS, SIZE = 8, 16
UNIT = 2 * CHANNELS * SIZE * SIZE  # elements of one activation


class Written(nn.Module):
    """The activation as functions: `SiLU` by hand, say."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def layers(activation: Any, count: int = 6) -> nn.Sequential:
    each = [
        (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), activation())
        for _ in range(count)
    ]
    return randomize(nn.Sequential(*(module for layer in each for module in layer))).double().eval()


def images() -> Tensor:
    return torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64)


def run(model: nn.Module, x: Tensor, **way: Any) -> tuple[float, list[Tensor | None], list[fx.GraphModule]]:
    """Return the activations that one step keeps, every gradient, and the graphs of forward and backward."""
    graphs: list[fx.GraphModule] = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=partitioned(graphs, **way))
    with saved_for_backward(model) as saved:
        output = compiled(x)
    model.zero_grad()
    output.square().sum().backward()
    return saved.total / x.itemsize / UNIT, [each.grad for each in model.parameters()], graphs


def check(model: nn.Module, x: Tensor, **way: Any) -> tuple[float, list[fx.GraphModule]]:
    """Return what a step keeps and its graphs, and check that every gradient is eager's."""
    kept, gradients, graphs = run(model, x, **way)
    model.zero_grad()
    model(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        # torch's decomposition of hardsigmoid's backward rounds 1 / 6 to fp32.
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-6, atol=1e-8)
    forward = [name for name in targets(graphs[-1]) if "convolution.default" in name or ".mm." in name]
    assert not forward, "backward computes a convolution again"
    return kept, graphs


@pytest.mark.parametrize("name", few(ACTIVATIONS, 4))
def test_six_layers_keep_seven_activations(name: str) -> None:
    """Plain Inductor keeps 12 to 13. The seventh is the input."""
    model, x = layers(ACTIVATIONS[name]), images()
    kept, _ = check(model, x)
    assert kept <= 7.5
    assert run(model, x, convbn=False)[0] >= 11.5
    assert counters["triton_convbn"]["folded"] == 6


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(x),
        lambda x: x * F.relu6(x + 3) / 6,
        lambda x: F.silu(x, inplace=True),
        lambda x: x.clamp(-1, 1),
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: F.silu(F.dropout(x, 0.5, training=False)),
    ],
    ids=["silu by hand", "hardswish by hand", "in place", "method", "where", "behind a dropout"],
)
def test_activations_written_by_hand(function: Any) -> None:
    kept, _ = check(layers(lambda: Written(function)), images())
    assert kept <= 7.5


@pytest.mark.slow
def test_frozen_parameters_keep_one_too() -> None:
    """Plain Inductor keeps two for SiLU, although BatchNorm's scale needs none."""
    model, x = layers(nn.SiLU), images()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    kept, _ = check(model, x)
    plain = run(model, x, convbn=False)[0]
    assert kept <= 7.5 < 11 < plain
    assert counters["triton_convbn"]["declined:does_not_pay"] == 6


def test_the_option_switches_it_off() -> None:
    model, x = layers(nn.SiLU), images()
    assert check(model, x, recompute_activations=False)[0] >= 11.5
    assert counters["triton_convbn"]["folded"] == 6


class Block(nn.Module):
    """A residual block, with squeeze and excitation if asked for."""

    def __init__(self, excited: bool = False) -> None:
        super().__init__()
        self.layers = layers(nn.SiLU, 2)
        self.gate = nn.Conv2d(CHANNELS, CHANNELS, 1) if excited else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        return x + y


@pytest.mark.slow
@pytest.mark.parametrize(("excited", "most"), [(False, 2.5 * 4 + 1), (True, 2.5 * 4 + 1.5)])
def test_residual_blocks_keep_every_second_sum(excited: bool, most: float) -> None:
    """Four blocks of two layers: eight convolutions' outputs, two sums, the input."""
    model, x = nn.Sequential(*(Block(excited) for _ in range(4))).double().eval(), images()
    kept, graphs = check(model, x)
    assert kept <= most
    assert run(model, x, convbn=False)[0] >= 4 * 4
    assert not [name for name in targets(graphs[1]) if "mean" in name], "a mean is computed again"


@pytest.mark.slow
def test_a_long_chain_of_sums_is_not_computed_at_once() -> None:
    """Backward adds up at most one sum for each that is kept. A chain would need all sums in memory at once."""
    model, x = nn.Sequential(*(Block() for _ in range(8))).double().eval(), images()
    kept, graphs = check(model, x)
    assert 8 * 2 + 3 <= kept <= 8 * 2 + 6
    longest: dict[fx.Node, int] = {}  # sums of two activations in a row, from kept tensors
    for node in graphs[1].graph.nodes:
        before = max((longest[each] for each in node.all_input_nodes), default=0)
        adds = str(node.target) == "aten.add.Tensor" and all(isinstance(each, fx.Node) for each in node.args)
        is_forward = node.op != "placeholder" and not any("tangents" in each.name for each in _ancestors(node))
        longest[node] = before + (adds and is_forward and node.meta["val"].numel() == UNIT)
    assert max(longest[node] for node in longest if not any("tangents" in a.name for a in _ancestors(node))) <= 3


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found


def test_branches_that_are_concatenated() -> None:
    """The concatenation, and its parts, are computed from the convolutions' outputs."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layers(nn.SiLU, 1), layers(nn.SiLU, 1)
            self.last = nn.Conv2d(2 * CHANNELS, CHANNELS, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.first(x), self.second(x)], 1))

    model, x = Split().eval(), images()
    kept, _ = check(model, x)
    assert kept <= 3.5
    assert run(model, x, convbn=False)[0] >= 4.5


def test_random_numbers_are_drawn_once() -> None:
    model, x = nn.Sequential(*layers(nn.SiLU, 1), nn.Dropout(0.5), *layers(nn.SiLU, 1)), images()
    model[3].train()
    _, _, graphs = run(model, x)
    drawn = [[name for name in targets(graph) if "rand" in name or "bernoulli" in name] for graph in graphs]
    assert len(drawn[0]) == 1
    assert not drawn[1]


class Clamped(nn.Module):
    """A forward that writes to one of its parameters or buffers, as a max-norm constraint does."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers, self.name = layers(nn.PReLU, 3), name

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.layers.get_parameter(self.name).mul_(0.5)
        return self.layers(x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1.bias", "2.weight"])
def test_writes_in_the_forward_lose_no_more_than_in_plain_inductor(name: str) -> None:
    """Inductor writes to an input at the end of the forward. Backward computes nothing again from such an input.

    Plain Inductor loses some of these writes itself: it saves the written parameter.
    """
    x, found = images(), {}
    torch.manual_seed(1)
    model = Clamped(name)
    for way in ("eager", "inductor", "triton_convbn"):
        torch._dynamo.reset()
        own = copy.deepcopy(model)
        run_it = own if way == "eager" else torch.compile(own, backend=way)
        run_it(x).square().sum().backward()
        found[way] = dict(own.named_parameters())
    for path, expected in found["eager"].items():
        ours, plain = found["triton_convbn"][path], found["inductor"][path]
        torch.testing.assert_close(ours, expected, msg=f"value of {path}")
        if torch.allclose(plain.grad, expected.grad):
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-9, atol=1e-9, msg=f"gradient of {path}")


def test_a_checkpoint_decides_for_itself() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layers(nn.SiLU, 2), layers(nn.SiLU, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(checkpoint(self.first, x, use_reentrant=False))

    model, x = Checkpointed(), images()
    kept, gradients, _ = run(model, x)
    model.zero_grad()
    model(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-9)
    assert kept <= 4.5


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_memory_budgets_still_apply(budget: float) -> None:
    model, x = layers(nn.SiLU), images()
    with functorch_config.patch(activation_memory_budget=budget):
        kept, gradients, _ = run(model, x)
    model.zero_grad()
    model(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-9)
    assert kept <= 7.5


@pytest.mark.slow
def test_dynamic_batch() -> None:
    model = layers(nn.SiLU)
    graphs: list[fx.GraphModule] = []
    compiled = torch.compile(model, backend=partitioned(graphs), dynamic=True)
    for batch in (2, 3, 5):
        x = images()[:1].repeat(batch, 1, 1, 1)
        with saved_for_backward(model) as saved:
            compiled(x).sum().backward()
        assert saved.total / x.nbytes <= 7.5
    assert len(graphs) == 2


def test_inference_is_as_before() -> None:
    model, x = layers(nn.SiLU), images()
    with torch.no_grad():
        run_graphs: list[fx.GraphModule] = []
        compiled = torch.compile(model, backend=partitioned(run_graphs))
        torch.testing.assert_close(compiled(x), model(x))
    assert counters["triton_convbn"]["declined:does_not_pay"] == 6


def test_explain_names_the_way_and_the_bytes() -> None:
    model = nn.Sequential(*layers(nn.SiLU, 1), *layers(nn.ReLU, 1))
    found = explain(model, images())
    assert [row.kept for row in found.rows] == [UNIT * 8] * 2
    assert f"keeps {UNIT * 8:,} bytes" in str(found)
    with torch.no_grad():
        assert [row.kept for row in explain(model, images()).rows] == [0, 0]
