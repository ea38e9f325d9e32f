"""One list of models, each with what has to become of its BatchNorms: folded so many times, or declined and why.

The identifiers are those of the faults known of Inductor's own pass (pytorch issue numbers where there is one), then
the cases that it has right.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from frozen import Frozen, detectron2, vectors_first
from torch import Tensor, nn

from triton_convbn.graph.reasons import Reason


@dataclass(frozen=True)
class Case:
    """folded and declined are by Dynamo's capture; `other` says where another dialect sees something else."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    folded: int = 1
    declined: tuple[Reason, ...] = ()
    dtype: torch.dtype = torch.float32
    skip: tuple[str, ...] = ()
    other: dict[str, tuple[int, tuple[Reason, ...]]] = field(default_factory=dict)
    trains: bool = True

    def expected(self, dialect: str) -> tuple[int, tuple[Reason, ...]]:
        return self.other.get(dialect, (self.folded, self.declined))


class Functional(nn.Module):
    """A conv and a BatchNorm as functions of parameters, written by `call`."""

    def __init__(self, call: Callable[..., Tensor], weight: tuple[int, ...] = (6, 4, 3, 3), channels: int = 6) -> None:
        super().__init__()
        self.call = call
        self.weight = nn.Parameter(torch.randn(weight))
        self.bias = nn.Parameter(torch.randn(channels))
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias, self.bn)


class Calls(nn.Module):
    """Modules by name, put together by `call(self, x)`."""

    def __init__(self, call: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def pair(conv: nn.Module, bn: nn.Module, **attributes: object) -> nn.Module:
    for name, value in attributes.items():
        setattr(bn, name, value)
    return nn.Sequential(conv, bn)


def hooked() -> nn.Module:
    conv = nn.Conv2d(4, 6, 3)
    conv.register_forward_hook(lambda _module, _inputs, output: output * 2)
    return pair(conv, nn.BatchNorm2d(6))


def mixed(dtype: torch.dtype) -> nn.Module:
    return pair(nn.Conv2d(4, 6, 3).to(dtype), nn.BatchNorm2d(6))


def write_input(m: nn.Module, x: Tensor) -> Tensor:
    x = x * 1
    y = m.conv(x)
    x.add_(1)
    return m.bn(y)


def write_input_through_view(m: nn.Module, x: Tensor) -> Tensor:
    x = x * 1
    y = m.conv(x)
    x.view(-1)[3:].mul_(2)
    return m.bn(y)


def write_weight(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    m.conv.weight.mul_(2)
    return m.bn(y)


def write_elsewhere(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    other = x * 2
    other.add_(1)
    return m.bn(y) + other.sum()


def write_statistics(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    m.bn.running_mean.add_(1)
    return m.bn(y)


def grad_mode_between(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.conv(x)
    return m.bn(y)


def autocast_between(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.conv(x)
    return m.bn(y)


def autocast(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.bn(m.conv(x))


def bn2d(channels: int = 6) -> nn.Module:
    return nn.BatchNorm2d(channels)


def normalize(y: Tensor, bn: nn.Module) -> Tensor:
    return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps)


def concatenated(m: nn.Module, x: Tensor) -> Tensor:
    """As timm's mixed convolutions are: each a part of the channels."""
    a, b = x.split(2, 1)
    return m.bn(torch.cat([m.a(a), m.b(b)], 1))


def concatenated_twice(m: nn.Module, x: Tensor) -> Tensor:
    """Along the batch, one half of which is concatenated along the channels."""
    y = torch.cat((m.a(x).contiguous(), F.dropout(m.b(x), 0.3, False)), dim=-3)
    return m.bn(torch.cat([y, m.c(x)]))


def flattened(m: nn.Module, x: Tensor) -> Tensor:
    """As timm's LeViT does it."""
    y = m.linear(x)
    return m.bn(y.flatten(0, 1)).reshape_as(y)


def transposed(m: nn.Module, x: Tensor) -> Tensor:
    """As SuperGlue and CRDNN do it."""
    return m.bn(m.linear(x).transpose(1, 2)).transpose(1, 2)


def channels_first(m: nn.Module, x: Tensor) -> Tensor:
    return m.bn(m.linear(x).permute(0, 3, 1, 2))


def cropped(m: nn.Module, x: Tensor) -> Tensor:
    """As NASNet does it."""
    return m.bn(m.conv(F.pad(x, (1, 0, 1, 0)))[:, :, 1:, 1:].contiguous())


def cropped_by_padding(m: nn.Module, x: Tensor) -> Tensor:
    return m.bn(F.pad(m.conv(x), (-1, 0, 0, -2)).narrow(0, 1, 1).flip(2))


def reflected(m: nn.Module, x: Tensor) -> Tensor:
    return m.bn(F.pad(m.conv(x), (1, 2, 3, 0), mode="reflect"))


def in_parts(m: nn.Module, x: Tensor) -> Tensor:
    """One BatchNorm of both halves of the batch."""
    first, second = m.conv(x).chunk(2)
    return m.bn(first) * m.bn(second).tanh()


def in_parts_of_space(m: nn.Module, x: Tensor) -> Tensor:
    """One part is not used."""
    _, second, third = m.conv(x).split([1, 3, 3], 2)
    return m.bn(second) * m.bn(third.transpose(2, 3)).transpose(2, 3)


def expanded(m: nn.Module, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)[:, :, :1].expand(-1, -1, 5, -1)).tanh()


def several(m: nn.Module, x: Tensor) -> Tensor:
    """A BatchNorm of a concatenation, one part of which has a BatchNorm of its own."""
    return m.last(m.bn(torch.cat([m.own(m.a(x)), m.b(x)], 1)).clone())


def squeezed(m: nn.Module, x: Tensor) -> Tensor:
    return m.bn(m.drop(m.same(m.conv(x))).clone().flatten(1)).unsqueeze(2)


X2 = (2, 4, 9, 8)
NOT_TRACED = ("modules",)  # torch.fx.symbolic_trace sees the functions there, but knows no shapes of parameters

FAULTS = [
    Case(
        "#196165-keywords",
        lambda: Functional(lambda x, w, b, bn: bn(F.conv2d(x, w, bias=b, stride=2, padding=1))),
        X2,
        skip=NOT_TRACED,
    ),
    Case(
        "#196165-all-keywords",
        lambda: Functional(lambda x, w, b, bn: bn(F.conv2d(input=x, weight=w))),
        X2,
        skip=NOT_TRACED,
    ),
    Case("#196166-padding-same", lambda: pair(nn.Conv2d(4, 6, 3, padding="same"), bn2d()), X2),
    Case("N1-transposed-groups", lambda: pair(nn.ConvTranspose2d(4, 4, 3, groups=2), bn2d(4)), X2),
    Case("N1-transposed-groups-wide", lambda: pair(nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), bn2d()), X2),
    Case("N1-transposed-depthwise", lambda: pair(nn.ConvTranspose2d(4, 4, 3, groups=4), bn2d(4)), X2),
    Case(
        "N1-transposed-1d-3d", lambda: pair(nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6)), (2, 4, 3, 4, 5)
    ),
    Case(
        "N2-linear-3d-same",
        lambda: pair(nn.Linear(8, 5), nn.BatchNorm1d(5)),
        (3, 5, 8),
        0,
        (Reason.LINEAR_RANK,),
        other={"decomposed": (0, (Reason.CHANNELS_MOVED,))},
    ),
    Case(
        "N2-linear-4d",
        lambda: pair(nn.Linear(8, 5), bn2d(5)),
        (3, 5, 5, 8),
        0,
        (Reason.LINEAR_RANK,),
        other={"decomposed": (0, (Reason.CHANNELS_MOVED,))},
    ),
    Case(
        "N3-linear-3d",
        lambda: pair(nn.Linear(8, 5), nn.BatchNorm1d(7)),
        (3, 7, 8),
        0,
        (Reason.LINEAR_RANK,),
        other={"decomposed": (0, (Reason.CHANNELS_MOVED,))},
    ),
    Case(
        "N4-input",
        lambda: Calls(write_input, conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        0,
        (Reason.MUTATED,),
        trains=False,
        skip=("decomposed",),
    ),
    Case(
        "N4-view",
        lambda: Calls(write_input_through_view, conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        0,
        (Reason.MUTATED,),
        trains=False,
        skip=("decomposed",),
    ),
    Case(
        "N4-weight",
        lambda: Calls(write_weight, conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        0,
        (Reason.MUTATED,),
        trains=False,
        skip=("decomposed", "aten", "modules"),
    ),
    Case(
        "N4-harmless",
        lambda: Calls(write_elsewhere, conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        other={"modules": (0, (Reason.MUTATED,))},
    ),
    Case("N5-bf16", lambda: mixed(torch.bfloat16), X2, dtype=torch.bfloat16),
    Case("N5-fp16", lambda: mixed(torch.float16), X2, dtype=torch.float16),
    Case(
        "N6-unbatched",
        lambda: pair(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5)),
        (4, 7),
        0,
        (Reason.UNBATCHED,),
        other={"decomposed": (0, (Reason.CHANNELS_MOVED,))},
    ),
    Case("N7-bf16", lambda: pair(nn.Conv2d(4, 6, 3), bn2d()).bfloat16(), X2, dtype=torch.bfloat16),
    Case("N7-fp16", lambda: pair(nn.Conv2d(4, 6, 3), bn2d()).half(), X2, dtype=torch.float16),
    Case(
        "N9-torch.batch_norm",
        lambda: Functional(
            lambda x, w, b, bn: torch.batch_norm(
                F.conv2d(x, w, b), bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0.1, bn.eps, True
            )
        ),
        X2,
        skip=NOT_TRACED,
    ),
    # symbolic_trace computes with buffers while it traces: nothing of a BatchNorm is left then.
    Case(
        "N10-frozen",
        lambda: pair(nn.Conv2d(4, 6, 3), Frozen(6, vectors_first)),
        X2,
        other={"modules": (0, ())},
    ),
    Case(
        "N10-frozen-detectron2",
        lambda: pair(nn.Conv2d(4, 6, 3, bias=False), Frozen(6, detectron2)),
        X2,
        skip=("modules",),
    ),
    Case(
        "N10-frozen-trained",
        lambda: pair(nn.ConvTranspose2d(4, 6, 3, groups=2), Frozen(6, vectors_first).trainable("weight", "bias")),
        X2,
        skip=("modules",),
    ),
    Case(
        "#121184-statistics-written",
        lambda: Calls(write_statistics, conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        trains=False,
        skip=("decomposed", "aten", "modules"),
    ),
    Case(
        "grad-mode-between",
        lambda: Calls(grad_mode_between, conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        0,
        (Reason.OPAQUE_BETWEEN,),
        skip=("modules", "aten", "decomposed"),
    ),
]

RIGHT_TODAY = [
    *[
        Case(f"linear-{bias}", lambda bias=bias: pair(nn.Linear(8, 5, bias=bias), nn.BatchNorm1d(5)), (3, 8))
        for bias in (True, False)
    ],
    Case("conv1d", lambda: pair(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
    Case("conv2d-no-bias", lambda: pair(nn.Conv2d(4, 6, 3, bias=False), bn2d()), X2),
    Case("conv3d", lambda: pair(nn.Conv3d(4, 6, 2, stride=2), nn.BatchNorm3d(6)), (2, 4, 5, 6, 7)),
    Case("grouped", lambda: pair(nn.Conv2d(4, 6, 3, groups=2), bn2d()), X2),
    Case("depthwise", lambda: pair(nn.Conv2d(4, 8, 3, groups=4), bn2d(8)), X2),
    Case("dilated", lambda: pair(nn.Conv2d(4, 6, 3, dilation=2, padding=2), bn2d()), X2),
    Case("transposed", lambda: pair(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), bn2d()), X2),
    Case("transposed-1d", lambda: pair(nn.ConvTranspose1d(4, 6, 3, dilation=2), nn.BatchNorm1d(6)), (2, 4, 9)),
    Case("no-affine", lambda: pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), X2),
    Case("momentum-none", lambda: pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=None)), X2),
    Case("sync-bn", lambda: pair(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)), X2),
    Case("fp64", lambda: pair(nn.Conv2d(4, 6, 3), bn2d()).double(), X2, dtype=torch.float64),
    Case("empty-batch", lambda: pair(nn.Conv2d(4, 6, 3), bn2d()), (0, 4, 9, 8), skip=("decomposed",)),
    Case("reflect", lambda: pair(nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), bn2d()), X2),
    Case(
        "autocast",
        lambda: Calls(autocast, conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        skip=("modules", "aten", "decomposed"),
    ),
    Case(
        "autocast-between",
        lambda: Calls(autocast_between, conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        0,
        (Reason.OPAQUE_BETWEEN,),
        skip=("modules", "aten", "decomposed"),
    ),
    Case(
        "weight-norm",
        lambda: pair(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), bn2d()),
        X2,
        other={"modules": (0, (Reason.PARAMETRIZED,))},
    ),
    Case("hooks", hooked, X2, 0, (Reason.INPUT_NOT_CONV,), other={"modules": (0, (Reason.HOOKS,))}),
    Case(
        "one-conv-two-bns",
        lambda: Calls(lambda m, x: m.a(m.conv(x)) + m.b(m.conv(x + 1)), conv=nn.Conv2d(4, 6, 3), a=bn2d(), b=bn2d()),
        X2,
        2,
    ),
    Case(
        "one-output-two-bns",
        lambda: Calls(lambda m, x: (lambda y: m.a(y) + m.b(y))(m.conv(x)), conv=nn.Conv2d(4, 6, 3), a=bn2d(), b=bn2d()),
        X2,
        0,
        (Reason.CONV_SHARED,) * 2,
    ),
    Case(
        "no-running-statistics",
        lambda: pair(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, track_running_stats=False)),
        X2,
        0,
        (Reason.NO_RUNNING_STATS,),
        skip=("decomposed",),
    ),
    Case(
        "bn-of-bn",
        lambda: Calls(lambda m, x: m.bn(m.bn(m.conv(x))), conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        2,
    ),
    Case(
        "shared-bn",
        lambda: Calls(lambda m, x: m.bn(m.a(x)) * m.bn(m.b(x)), a=nn.Conv2d(4, 6, 3), b=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        2,
    ),
    Case(
        "bn-after-add",
        lambda: Calls(lambda m, x: m.bn(m.conv(x) + 1), conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        0,
        (Reason.INPUT_NOT_CONV,),
    ),
    Case(
        "relu-in-place-after",
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3), bn2d(), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 1), bn2d(5), nn.ReLU(inplace=True)
        ),
        X2,
        2,
    ),
    Case(
        "chain",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), bn2d(), nn.Conv2d(6, 5, 1), bn2d(5), nn.Conv2d(5, 4, 1), bn2d(4)),
        X2,
        3,
    ),
    Case(
        "weight-from-bn",
        lambda: Calls(
            lambda m, x: m.b(F.conv2d(x, m.a(m.conv(x))[:, :, :3, :3])), conv=nn.Conv2d(4, 4, 1), a=bn2d(4), b=bn2d(2)
        ),
        X2,
        2,
        skip=NOT_TRACED,
    ),
    Case(
        "conv-output-returned",
        lambda: Calls(lambda m, x: (lambda y: (m.bn(y), y))(m.conv(x)), conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        0,
        (Reason.CONV_SHARED,),
    ),
    Case(
        "pool-between-others",
        lambda: Calls(
            lambda m, x: (lambda y, z: m.bn(y) + z.mean())(m.conv(x), F.max_pool2d(x, 2)),
            conv=nn.Conv2d(4, 6, 3),
            bn=bn2d(),
        ),
        X2,
    ),
]

# What Inductor's own pass does not see, and nobody else does.
BETWEEN = [
    Case(
        "concatenation",
        lambda: Calls(concatenated, a=nn.Conv2d(2, 6, 3), b=nn.Conv2d(2, 4, 3, bias=False, groups=2), bn=bn2d(10)),
        X2,
    ),
    Case(
        "concatenation-of-concatenations",
        lambda: Calls(
            concatenated_twice,
            a=nn.Conv2d(4, 6, 3),
            b=nn.ConvTranspose2d(4, 2, 3, padding=2, groups=2),
            c=nn.Conv2d(4, 8, 3),
            bn=bn2d(8),
        ),
        X2,
    ),
    Case("flattened-linear", lambda: Calls(flattened, linear=nn.Linear(8, 5), bn=nn.BatchNorm1d(5)), (3, 7, 8)),
    Case(
        "squeezed-conv",
        lambda: Calls(
            squeezed, conv=nn.Conv2d(4, 6, (9, 8)), same=nn.Identity(), drop=nn.Dropout(0.5), bn=nn.BatchNorm1d(6)
        ),
        X2,
    ),
    Case("transposed-linear", lambda: Calls(transposed, linear=nn.Linear(8, 5), bn=nn.BatchNorm1d(5)), (3, 7, 8)),
    Case("permuted-linear", lambda: Calls(channels_first, linear=nn.Linear(8, 5), bn=bn2d(5)), (3, 7, 4, 8)),
    Case("cropped", lambda: Calls(cropped, conv=nn.Conv2d(4, 6, 3), bn=bn2d()), X2),
    Case("cropped-by-padding", lambda: Calls(cropped_by_padding, conv=nn.Conv2d(4, 6, 3), bn=bn2d()), X2),
    Case(
        "reflected-after",
        lambda: Calls(reflected, conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        other={"decomposed": (0, (Reason.INPUT_NOT_CONV,))},  # the indices are computed
    ),
    Case("parts-of-the-batch", lambda: Calls(in_parts, conv=nn.Conv2d(4, 6, 3), bn=bn2d()), X2, 2),
    Case("parts-of-space", lambda: Calls(in_parts_of_space, conv=nn.Conv2d(4, 6, (3, 6)), bn=bn2d()), X2, 2),
    Case("expanded", lambda: Calls(expanded, conv=nn.Conv2d(4, 6, 3), bn=bn2d()), X2),
    Case(
        "several-norms",
        lambda: Calls(
            several,
            a=nn.Conv2d(4, 6, 3),
            b=nn.Conv2d(4, 4, 3, bias=False),
            own=bn2d(),
            bn=nn.BatchNorm2d(10, affine=False),
            last=bn2d(10),
        ),
        X2,
        3,
    ),
    Case(
        "several-norms-half",
        lambda: Calls(lambda m, x: m.b(m.a(m.conv(x))), conv=nn.Conv2d(4, 6, 3).half(), a=bn2d(), b=bn2d()),
        X2,
        2,
        dtype=torch.float16,
    ),
    Case(
        "several-norms-and-before",
        lambda: nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), bn2d(), bn2d()),
        X2,
        3,
    ),
    Case(
        "padded-after",
        lambda: Calls(lambda m, x: m.bn(F.pad(m.conv(x), (1, 0))), conv=nn.Conv2d(4, 6, 3), bn=bn2d()),
        X2,
        0,
        (Reason.PADDED,),
    ),
    Case(
        "frozen-concatenation",
        lambda: Calls(
            concatenated,
            a=nn.Conv2d(2, 6, 3),
            b=nn.Conv2d(2, 4, 3),
            bn=Frozen(10, vectors_first).trainable("weight", "bias"),
        ),
        X2,
        skip=("modules",),
    ),
]

X1 = (5, 4)


def before(*layers: nn.Module) -> Callable[[], nn.Module]:
    """A model whose BatchNorm follows no convolution."""
    return lambda: copy.deepcopy(nn.Sequential(nn.Tanh(), *layers))


def before_shared(m: nn.Module, x: Tensor) -> Tensor:
    y = m.bn(x.tanh())
    return m.conv(y) + y.mean()


def before_written(m: nn.Module, x: Tensor) -> Tensor:
    x = x * 1
    y = m.bn(x)
    x.mul_(2)
    return m.conv(y)


def before_unknown(m: nn.Module, x: Tensor) -> Tensor:
    y = m.bn(x.tanh())
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        return m.conv(y)


# A BatchNorm before a convolution or Linear.
BEFORE = [
    Case("before-linear", before(nn.BatchNorm1d(4), nn.Linear(4, 6)), X1),
    Case("before-linear-dropout", before(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 6, bias=False)), X1),
    Case("before-conv", before(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2)), X2),
    Case("before-grouped", before(nn.BatchNorm2d(4), nn.Conv2d(4, 6, (3, 2), groups=2, dilation=2)), X2),
    Case("before-depthwise", before(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4, padding="valid")), X2),
    Case("before-same", before(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, padding="same")), X2),
    Case("before-conv1d", before(nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3)), (2, 4, 9)),
    Case("before-conv3d", before(nn.BatchNorm3d(4, affine=False), nn.Conv3d(4, 6, 2)), (2, 4, 5, 6, 7)),
    *[
        Case(
            f"before-{mode}",
            before(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode=mode)),
            X2,
            other={"decomposed": (0, (Reason.INPUT_NOT_CONV,))},
            trains=mode == "reflect",  # Inductor fails in the backward of a replicating pad, with a fold or without
        )
        for mode in ("reflect", "replicate")
    ],
    Case(
        "before-circular",
        before(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular")),
        X2,
        skip=("decomposed",),  # which writes by aten::copy, without a derivative
    ),
    Case("before-and-after", before(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), bn2d()), X2, 2),
    Case("before-chain", before(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), bn2d(), nn.Conv2d(6, 5, 1), bn2d(5)), X2, 3),
    Case(
        "before-frozen",
        before(Frozen(4, vectors_first).trainable("weight", "bias"), nn.Conv2d(4, 6, 3)),
        X2,
        skip=("modules",),
    ),
    Case("before-fp64", lambda: before(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3))().double(), X2, dtype=torch.float64),
    Case(
        "before-bf16",
        lambda: before(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3).bfloat16())(),
        X2,
        dtype=torch.bfloat16,
    ),
    Case("before-padded", before(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), X2, 0, (Reason.PADS_ZEROS,)),
    Case(
        "before-padded-same",
        before(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same")),
        X2,
        0,
        (Reason.PADS_ZEROS,),
    ),
    Case("before-padded-1x1", before(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, padding=1)), X2, 0, (Reason.PADS_ZEROS,)),
    Case("before-transposed", before(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3)), X2, 0, (Reason.TRANSPOSED,)),
    Case(
        "before-linear-3d",
        before(nn.BatchNorm1d(4), nn.Linear(4, 6)),
        (2, 4, 4),
        0,
        (Reason.LINEAR_RANK,),
        other={"decomposed": (0, (Reason.INPUT_NOT_CONV,))},
    ),
    Case(
        "before-unbatched",
        before(nn.BatchNorm1d(4), nn.Conv1d(5, 6, 2)),
        X1,
        0,
        (Reason.UNBATCHED,),
        other={"decomposed": (0, (Reason.CHANNELS_MOVED,))},
    ),
    Case("before-relu", before(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)), X2, 0, (Reason.INPUT_NOT_CONV,)),
    Case(
        "before-shared",
        lambda: Calls(before_shared, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 6, 3)),
        X2,
        0,
        (Reason.OUTPUT_SHARED,),
    ),
    Case(
        "before-written",
        lambda: Calls(before_written, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 6, 3)),
        X2,
        0,
        (Reason.MUTATED,),
        skip=("decomposed",),
        trains=False,
    ),
    Case(
        "before-unknown",
        lambda: Calls(before_unknown, bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 6, 3)),
        X2,
        0,
        (Reason.OPAQUE_BETWEEN,),
        skip=("modules", "aten", "decomposed"),
    ),
]


CASES = FAULTS + RIGHT_TODAY + BETWEEN + BEFORE
