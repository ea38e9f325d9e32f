"""A pair in the body of a loop or a branch compiles, with the strides that torch's checks of bodies require."""

import pytest
import torch
from checking import check, counted, scramble
from torch import nn
from torch._dynamo import config
from torch._higher_order_ops import scan, while_loop

from triton_convbn import ConvBNPass

pytestmark = pytest.mark.slow


class Looping(nn.Module):
    """Call a pair through a higher-order operator. Loops carry the BatchNorm's output."""

    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.bn = how, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def pair(self, x):
        return self.bn(self.conv(x))

    def forward(self, x):
        if self.how == "scan":
            return scan(lambda carry, factor: (self.pair(carry), factor * 2), x, torch.ones(2, 1, dtype=x.dtype))[0]
        if self.how == "while_loop":
            start = torch.zeros((), dtype=torch.int64)
            return while_loop(lambda count, _: count < 2, lambda count, y: (count + 1, self.pair(y)), (start, x))[1]
        if self.how == "cond":
            return torch.cond(x.sum() > 0, self.pair, lambda x: x * 2, (x,))
        return torch.compiler.nested_compile_region(lambda x: self.pair(x))(x)


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("how", ["scan", "while_loop", "cond", "nested_compile_region"])
def test_inference_of_a_pair_in_a_body(how, kernel, monkeypatch):
    """Channels_last folded weights changed the strides of a body's result, and torch raised."""
    if kernel == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, x = scramble(Looping(how).eval(), 1e-3), torch.randn(2, 3, 6, 5)
    compiled = torch.compile(model, options={"pre_grad_custom_pass": ConvBNPass(when="always", kernel=kernel)})
    with torch.no_grad(), config.patch(capture_scalar_outputs=True):  # Inductor's scan needs it
        check(compiled, model, x)
    assert counted()[0] > 0
