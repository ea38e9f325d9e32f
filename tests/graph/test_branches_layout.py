"""The strides of a merged sum are those of the sum, which a view of it may depend on."""

from collections.abc import Callable

import pytest
import torch
from branch_cases import C, assert_same, conv_bn, gradients, made, rewritten
from cases import Calls
from checking import scramble
from tiers import few
from torch import Tensor, nn
from torch.export import export

from triton_convbn import fold_exported

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_last": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every_second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "half_of_channels_last": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, C:],
    "expanded": lambda x: x[:1].expand_as(x),
}

SUMS: dict[str, Callable[[], nn.Module]] = {
    "input_first": lambda: Calls(lambda m, x: x + m.a(x), a=conv_bn()),
    "input_last": lambda: Calls(lambda m, x: m.a(x) + x, a=conv_bn()),
    "norm_first": lambda: Calls(lambda m, x: m.norm(x) + m.a(x), a=conv_bn(), norm=nn.BatchNorm2d(C)),
    "factor_first": lambda: Calls(lambda m, x: 0.5 * x - m.a(x), a=conv_bn()),
    "norm_after": lambda: Calls(lambda m, x: m.norm(x + m.a(x)), a=conv_bn(), norm=nn.BatchNorm2d(C)),
    "contiguous_first": lambda: Calls(
        lambda m, x: m.norm(x).contiguous() + m.a(x), a=conv_bn(), norm=nn.BatchNorm2d(C)
    ),
    "copied_first": lambda: Calls(
        lambda m, x: (2 * m.norm(x)).clone(memory_format=torch.channels_last) + m.a(x),
        a=conv_bn(),
        norm=nn.BatchNorm2d(C),
    ),
    "depthwise": lambda: Calls(lambda m, x: x + m.a(x) + m.b(x), a=conv_bn(groups=C), b=conv_bn(1, 0, groups=C)),
}


def strides(tensor: Tensor) -> list[int]:
    """Return the strides of the dimensions that have more than one element."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@pytest.mark.parametrize("weights", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SUMS)
def test_strides(name: str, layout: str, weights: str) -> None:
    model, x = made(SUMS[name])
    if weights == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    x = LAYOUTS[layout](x)
    expected = model(x)
    run, findings, _ = rewritten(model, x)
    assert findings.sums
    output = run(x)
    assert strides(output) == strides(expected)
    assert_same({"y": output.detach()}, {"y": expected.detach()})


class Tokens(nn.Module):
    """A residual convolution over a sequence of tokens, (N, L, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(C, C, 3, padding=1), nn.BatchNorm1d(C)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.transpose(1, 2)
        return (x + self.norm(self.conv(x))).transpose(1, 2).view(-1, C)


@pytest.mark.parametrize("backend", few(["triton_convbn_eager", "triton_convbn"], 1))
def test_view_of_tokens(backend: str) -> None:
    model, x = scramble(Tokens().eval(), 1e-3), torch.randn(2, 5, C)
    found = gradients(torch.compile(model, backend=backend), model, x)
    assert_same(found, gradients(model, model, x), 1e-5)


@pytest.mark.parametrize("linear", [True, False])
def test_input_first_of_a_norm(linear: bool) -> None:
    """Add convolutions to a BatchNorm's output, which the CPU returns contiguous, and a fake tensor does not."""
    model = Calls(
        lambda m, tokens: m.second(m.first(m.norm(m.linear(tokens).transpose(1, 2)))),
        linear=nn.Linear(C, C) if linear else nn.ReLU(),
        norm=nn.BatchNorm1d(C),
        first=Calls(
            lambda m, x: x + m.conv(x) + m.point(x), conv=nn.Conv1d(C, C, 3, padding=1), point=nn.Conv1d(C, C, 1)
        ),
        second=Calls(
            lambda m, x: x - m.conv(x) + m.point(x), conv=nn.Conv1d(C, C, 3, padding=1), point=nn.Conv1d(C, C, 1)
        ),
    )
    model, tokens = scramble(model.eval(), 1e-3), torch.randn(2, 5, C)
    run, findings, _ = rewritten(model, tokens)
    assert len(findings.sums) == 2
    assert len(findings.pairs) == linear
    assert run(tokens).stride() == model(tokens).stride() == (5 * C, 5, 1)


@pytest.mark.parametrize("decomposed", [False, True])
def test_view_in_an_exported_program(decomposed: bool) -> None:
    channels_last = Calls(lambda m, x: (x + m.a(x)).view(len(x), -1), a=conv_bn()).to(memory_format=torch.channels_last)
    for model, x in ((Tokens(), torch.randn(2, 5, C)), (channels_last, torch.randn(2, C, 7, 8))):
        program = export(scramble(model.eval(), 1e-3), (x,))
        folded = fold_exported(program.run_decompositions() if decomposed else program)
        assert_same({"y": folded.module()(x).detach()}, {"y": model(x).detach()}, 1e-5)
