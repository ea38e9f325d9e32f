"""How pairs are grouped into launches, forward and backward, with interpreted kernels."""

import random

import pytest
import torch
from checking import check, counted, dynamo, scramble
from torch import nn
from triton_convbn.kernels.inputs import FoldInputs
from triton_convbn.kernels.spec import ARGUMENT_LIMIT

from triton_convbn.measure import saved_for_backward
from triton_convbn.ops import library, plan, reference
from triton_convbn.ops.packed_pairs import PackedPairs


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Interpret the kernels. Returns ("fold" or "fold_backward", number of pairs) of each launch."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen = []
    real = plan.run

    def run(source, arguments, device):
        kind, pairs = source.name.rsplit("_", 1)
        seen.append((kind, int(pairs)))
        assert len(arguments) <= ARGUMENT_LIMIT
        real(source, arguments, device)

    monkeypatch.setattr(plan, "run", run)
    return seen


def chain(trains, bias=True, width=2):
    """Return a chain of pairs, of which pair i trains if trains[i] is true, and an input."""
    pairs = [nn.Sequential(nn.Conv2d(width, width, 1, bias=bias), nn.BatchNorm2d(width), nn.Tanh()) for _ in trains]
    for each, flag in zip(pairs, trains, strict=True):
        each.requires_grad_(flag)
    return scramble(nn.Sequential(*pairs).eval(), 1e-3), torch.randn(2, width, 3, 3)


def sizes(launches, kind):
    return [pairs for name, pairs in launches if name == kind]


@pytest.mark.slow
def test_alternating_pairs_fill_two_groups(launches):
    """Eight trained and eight frozen pairs take two folds, and save as much as folds of one pair."""
    model, x = chain([True, False] * 8)
    run = dynamo(model)
    check(run, model, x)
    assert launches == [("fold", 8), ("fold", 8), ("fold_backward", 8)]
    assert counted() == (16, {})
    kept = []
    for options in ({}, {"pairs_per_launch": 1}):
        torch._dynamo.reset()
        alone = dynamo(model, **options)
        with saved_for_backward(model) as saved:
            alone(x)
        kept.append(saved.total)
    assert kept[0] == kept[1]


@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "want"), [(46, [46]), (60, [46, 14])])
def test_group_fits_forward_and_backward(launches, pairs, want):
    """With pairs_per_launch=64 a group is limited by the kernel arguments of its backward."""
    model, x = chain([True] * pairs)
    model, x = model.double(), x.double()  # such a long chain amplifies the rounding of fp32
    check(dynamo(model, pairs_per_launch=64), model, x)
    assert sum(sizes(launches, "fold")) == sum(sizes(launches, "fold_backward")) == pairs
    assert sizes(launches, "fold") == sizes(launches, "fold_backward")[::-1]
    assert counted() == (pairs, {})


@pytest.mark.slow
def test_operator_takes_any_number_of_pairs(launches):
    """Fold 200 pairs, every other one with prescale, whose q is a constant in backward."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = [
        FoldInputs(normal(2, 3), *[normal(2) for _ in range(4)], normal(2).abs() + 0.1, 1e-3, prescale=i % 2 == 0)
        for i in range(200)
    ]
    parameters = [parameter.requires_grad_() for each in pairs for parameter in each[:4]]
    columns = PackedPairs.pack(pairs)
    found, exact = [], []
    for each, (weight, bias, power) in zip(pairs, columns.by_pair(library.fold_op(*columns)), strict=True):
        q = torch.ones(2) if power is None else power.detach()
        w, b = reference.fold_reference(*each[:7])
        found += [weight, bias]
        exact += [w / q[:, None], b / q]
    grads = [normal(*tensor.shape) for tensor in found]
    found += torch.autograd.grad(found, parameters, grads)
    exact += torch.autograd.grad(exact, parameters, grads)
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for kind in ("fold", "fold_backward"):
        assert sum(sizes(launches, kind)) == 200
        assert len(sizes(launches, kind)) <= 5


class Written(nn.Module):
    """Write to the statistics of pair `at` after the second pair."""

    def __init__(self, layers, at):
        super().__init__()
        self.layers, self.at = layers, at

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == 1:
                self.layers[self.at][1].running_mean.mul_(1.0)
        return x


@pytest.mark.parametrize(("at", "want"), [(4, [2, 3, 1]), (3, [3, 1, 2])])
def test_write_ends_only_the_group_of_its_kind(launches, at, want):
    """Pairs 0, 2, 4 train and 1, 3, 5 are frozen. The modified pair starts another group."""
    layers, x = chain([True, False] * 3)
    model = Written(layers, at).eval()
    check(dynamo(model, codegen=False, recompute=False), model, x)
    assert sizes(launches, "fold") == want


@pytest.mark.parametrize("seed", range(6))
def test_random_mixes(launches, seed):
    """Groups of each kind are as few as possible, and results do not change."""
    rng = random.Random(seed)
    trains = [rng.random() < 0.6 for _ in range(rng.randint(8, 20))]
    model, x = chain([True, *trains], bias=rng.random() < 0.5)
    model, x, most = model.double(), x.double(), rng.choice((1, 3, 16))
    check(dynamo(model, pairs_per_launch=most), model, x)
    frozen, trained = trains.count(False), 1 + trains.count(True)
    assert len(sizes(launches, "fold")) == -(-frozen // most) + -(-trained // most)
    assert len(sizes(launches, "fold_backward")) == -(-trained // most)
    assert sum(sizes(launches, "fold")) == len(model)
    assert sum(sizes(launches, "fold_backward")) == trained
    assert max(pairs for _, pairs in launches) <= most
