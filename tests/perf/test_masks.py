"""Test that fixed masks stand for the ReLUs of a model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from triton_convbn.perf.masks import copy_masks, with_masks

from triton_convbn.errors import UsageError


class Net(nn.Module):
    """Calls one ReLU twice, and ReLUs that are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(3, 16), nn.Linear(16, 16), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first(x))
        y = F.relu(input=self.second(y)) - 0.2
        return torch.relu(self.relu(y) - y.relu() + self.second(y))


def test_masks_of_fp64_in_fp32() -> None:
    model, x = Net(), torch.randn(5, 3)
    masked = with_masks(copy.deepcopy(model))
    assert masked.state_dict().keys() - {name for name, _ in masked.named_buffers()} == model.state_dict().keys()
    double = copy.deepcopy(masked).double()
    exact = model.double()(x.double())
    torch.testing.assert_close(double(x.double()), exact)
    copy_masks(double, masked)
    torch.testing.assert_close(masked(x), exact.float())
    # Inputs of the other sign have the masks, and gradients, of the first ones.
    found = masked(-x)
    assert (found[exact == 0] == 0).all()
    found.sum().backward()
    assert all(p.grad is not None for p in masked.parameters())
    assert (found < 0).any()


def test_a_model_that_cannot_be_traced_is_a_usage_error() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu() if x.sum() > 0 else x

    with pytest.raises(UsageError, match="traces"):
        with_masks(Branching())
