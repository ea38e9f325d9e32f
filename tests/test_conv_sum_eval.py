"""`conv_sum_eval`: a sum of branches by hand."""

from collections.abc import Callable

import pytest
import torch
from branch_cases import C, assert_same, conv, conv_bn, gradients, made
from torch import Tensor, nn
from versions import needs_torch

from triton_convbn import conv_sum_eval

EAGER: dict[str, Callable[[], list[nn.Module]]] = {
    "repvgg": lambda: [conv_bn(), conv_bn(1, 0, bias=True), nn.BatchNorm2d(C)],
    "depthwise": lambda: [conv_bn(5, 2, groups=C), conv_bn(3, 1, groups=C), nn.Identity()],
    "convolution_alone": lambda: [conv(bias=True), nn.Sequential(nn.Identity(), conv(1, 0))],
    "two_norms": lambda: [nn.Sequential(conv(), nn.BatchNorm2d(C), nn.BatchNorm2d(C)), conv_bn(1, 0)],
    "reads_nothing_else": lambda: [conv_bn(3, "same", dilation=2), conv_bn(1, "same")],
}


@pytest.mark.parametrize("name", EAGER)
def test_conv_sum_eval(name: str) -> None:
    model, x = made(lambda: nn.ModuleList(EAGER[name]()))
    expected = gradients(lambda x: sum(branch(x) for branch in model), model, x)
    assert_same(gradients(lambda x: conv_sum_eval(list(model), x), model, x), expected)


NOT_EAGER: dict[str, tuple[Callable[[], list[nn.Module]], type[Exception], str]] = {
    "training": (
        lambda: [conv_bn(), nn.Sequential(conv(1, 0), nn.BatchNorm2d(C).train())],
        ValueError,
        "training mode",
    ),
    "no_convolution": (lambda: [nn.BatchNorm2d(C), nn.Identity()], ValueError, "no branch has a convolution"),
    "relu": (lambda: [conv_bn(), nn.Sequential(conv(1, 0), nn.ReLU())], TypeError, "ReLU"),
    "two_convolutions": (lambda: [nn.Sequential(conv(), conv())], TypeError, "follows another layer"),
    "grid": (lambda: [conv(), conv(3, 0)], ValueError, "positions"),
    "groups": (lambda: [conv(groups=C), conv(1, 0)], ValueError, "groups"),
    "kernel_grows": (lambda: [conv((1, 3), (0, 1)), conv((3, 1), (1, 0))], ValueError, "holds all"),
    "channels": (lambda: [conv(outputs=8), nn.Identity()], ValueError, "shapes"),
    "norm_of_other_channels": (lambda: [conv(), nn.Sequential(conv(1, 0), nn.BatchNorm2d(8))], ValueError, "channels"),
    "reflected": (lambda: [conv(padding_mode="reflect"), conv(1, 0)], ValueError, "positions"),
    "no_statistics": (
        lambda: [conv(), nn.BatchNorm2d(C, track_running_stats=False).eval()],
        ValueError,
        "no running statistics",
    ),
}


@pytest.mark.parametrize("name", NOT_EAGER)
def test_conv_sum_eval_declines(name: str) -> None:
    branches, error, words = NOT_EAGER[name]
    made_branches = branches()
    for branch in made_branches:
        for module in branch.modules():
            if isinstance(module, nn.BatchNorm2d) and name != "training":
                module.eval()
    with pytest.raises(error, match=words):
        conv_sum_eval(made_branches, torch.randn(2, C, 7, 8))


def test_conv_sum_eval_declines_hooks() -> None:
    branches = [conv_bn().eval(), conv_bn(1, 0).eval()]
    branches[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="hooks"):
        conv_sum_eval(branches, torch.randn(2, C, 7, 8))


def test_conv_sum_eval_under_autocast() -> None:
    """The unmerged sum of an fp32 input and a bf16 convolution is fp32."""
    model, x = made(lambda: nn.ModuleList(EAGER["repvgg"]()), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="dtypes"):
            conv_sum_eval(list(model), x)
        assert conv_sum_eval(list(model), x.bfloat16()).dtype == torch.bfloat16


class Shared(nn.Module):
    """Branches of one convolution in a list. Non-strict export gives such modules other classes."""

    def __init__(self) -> None:
        super().__init__()
        shared = conv()
        self.branches = nn.ModuleList([nn.Sequential(shared, nn.BatchNorm2d(C)), nn.Sequential(shared), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        return conv_sum_eval(list(self.branches), x)


STRICT = pytest.param(True, marks=needs_torch(2, 12, "its Dynamo knows no max with a key"))


@pytest.mark.parametrize("strict", [False, STRICT])
def test_export_of_shared_branches(strict: bool) -> None:
    model, x = made(Shared)
    program = torch.export.export(model, (x.detach(),), strict=strict)
    expected = sum(branch(x) for branch in model.branches)
    assert_same({"y": program.module()(x)}, {"y": expected})


def test_conv_sum_eval_of_a_class_of_sequentials() -> None:
    class Named(nn.Sequential):
        """A Sequential by another name."""

    model, x = made(lambda: nn.ModuleList([Named(conv(), nn.BatchNorm2d(C)), conv_bn(1, 0)]))
    assert_same({"y": conv_sum_eval(list(model), x)}, {"y": model[0](x) + model[1](x)})
