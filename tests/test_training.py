"""How people train, in one process: checkpoints around a compiled model, accumulated gradients, other batch sizes."""

import copy

import pytest
import torch
from checking import check, counted, errors, scramble
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

BACKENDS = ["triton_convbn_eager", "triton_convbn"]


def small():
    layers = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
    return scramble(nn.Sequential(*layers).eval(), 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_around_the_compiled_model(backend):
    """It is run again in backward, and folds again then."""
    model, x = small(), torch.randn(2, 4, 9, 8)
    compiled = torch.compile(model, backend=backend)
    check(lambda x: checkpoint(compiled, x, use_reentrant=False), model, x)
    assert counted() == (2, {})


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulated_gradients(backend):
    """Three micro-batches and an optimizer's step, twice: the parameters of eager on the whole batches."""
    model = small().double()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    for seed in range(2):
        x = torch.randn(6, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for run, micro in ((eager, (x,)), (compiled, x.split(2))):
            optimizer = torch.optim.SGD(run.parameters(), lr=1e-3, momentum=0.9)
            for part in micro:
                (run(part).sin().square().sum() / 6).backward()
            optimizer.step()
            optimizer.zero_grad()
    got, want = dict(model.named_parameters()), dict(eager.named_parameters())
    assert max(errors(got, want).values()) < 1e-12
    assert counted()[0] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("backends", [("eager", "triton_convbn_eager"), ("inductor", "triton_convbn")])
@pytest.mark.parametrize("mark", [False, True], ids=["automatic", "marked"])
def test_changing_batch_sizes_compile_no_more_often_than_without_the_pass(backends, mark):
    """Training, with the batch marked as dynamic, or found to be so by Dynamo at the second size."""
    model = scramble(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval(), 1e-3)
    graphs = []
    for backend in backends:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend=backend)
        for batch in (4, 3, 8, 5):
            x = torch.randn(batch, 4, 9, 8)
            if mark:
                torch._dynamo.mark_dynamic(x, 0)
            model.zero_grad()
            eager = copy.deepcopy(model)
            compiled(x).square().sum().backward()
            eager(x).square().sum().backward()
            for got, want in zip(model.parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-3)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == (1 if mark else 2)
    assert counters["triton_convbn"]["folded"] == graphs[1]
