"""Numbers that are symbols: a sum merges with those that stay, and none compiles again for each value."""

import pytest
import torch
from checking import check, counted, scramble
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters


class Block(nn.Module):
    """Two branches, of which one is multiplied by a number of the module and one by an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.p = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.q = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.scale = 0.5

    def forward(self, x: Tensor, alpha: float = 1.5) -> Tensor:
        return self.p(self.a(x)) * alpha + self.q(self.b(x)) * self.scale


def block() -> nn.Module:
    torch.manual_seed(0)
    return scramble(Block().eval(), 1e-3)


X = 2, 4, 8, 8


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 2)])
def test_a_schedule_takes_two_graphs(dynamic: bool | None, graphs: int) -> None:
    """The first value is merged as a number. With another one it is none that stays."""
    model = block()
    backend = CompileCounterWithBackend("triton_convbn_eager")
    run = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    for step in range(1, 12):
        alpha, x = 0.05 * step, torch.randn(X)
        torch.testing.assert_close(run(x, alpha), model(x, alpha), rtol=1e-4, atol=1e-5)
    assert backend.frame_count == graphs
    assert counters["triton_convbn"]["merged"] == 1


def test_numbers_that_stay_merge_in_every_graph() -> None:
    """A training step and inference are two graphs with the same numbers."""
    model = block()
    run = torch.compile(model, backend="triton_convbn_eager", dynamic=True)
    with torch.no_grad():
        run(torch.randn(X))
    check(run, model, torch.randn(X))
    assert counters["triton_convbn"]["merged"] == 2


@pytest.mark.parametrize("call", [lambda m, x: m(x) * x.shape[1] ** -0.5, lambda m, x: m(x) * float(x.shape[1])])
def test_a_factor_of_a_size_keeps_the_size_dynamic(call) -> None:
    model, x = scramble(nn.Sequential(nn.Linear(4, 4)).eval()), torch.randn(2, 3, 4)
    backend = CompileCounterWithBackend("triton_convbn_eager")
    run = torch.compile(lambda x: call(model, x), backend=backend, dynamic=True)
    for size in (3, 4, 5, 6, 7):
        x = torch.randn(2, size, 4)
        torch.testing.assert_close(run(x), call(model, x))
    assert backend.frame_count == 1


def test_a_number_beside_a_pair_is_not_read() -> None:
    model = scramble(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval(), 1e-3)
    backend = CompileCounterWithBackend("triton_convbn_eager")
    run = torch.compile(lambda x, alpha: model(x) * alpha, backend=backend, dynamic=True)
    for step in range(1, 6):
        run(torch.randn(X), 0.1 * step)
    assert backend.frame_count == 1
    assert counted() == (1, {})
