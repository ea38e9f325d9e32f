"""The part of the GPU check that runs a model: a training step and an inference, in every way to run them.

TF32 and cuDNN are left as torch sets them, for all alike: the errors of eager are what the others' compare with.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from triton_convbn.errors import UsageError
from triton_convbn.models import randomize

from .cases import Case, whole
from .gpu_bench import Bench
from .providers import providers
from .report import Report
from .run import measure
from .subject import Setting, Subject
from .subject import subject as make_subject

PROVIDERS = ["eager", "inductor", "inductor_efficient_conv_bn"]
PROVIDERS += ["triton_convbn", "triton_convbn_always", "triton_convbn_keep"]
FOLDING = {"train": PROVIDERS[2:], "infer": ["inductor_efficient_conv_bn", "triton_convbn_always"]}
"""By the mode, who has to fold every pair; the others leave alone what does not pay."""


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions (arXiv 1512.03385), the stride at the second."""

    def __init__(self, inputs: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Sequential(*shortcut) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.shortcut(x))


def resnet(blocks: tuple[int, ...], width: int, classes: int) -> nn.Module:
    """A ResNet of bottlenecks, for machines without torchvision: (3, 4, 6, 3) of width 64 has ResNet-50's shapes."""
    stem = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    layers: list[nn.Module] = list(stem)
    inputs = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(inputs, width << stage, 2 if stage and not block else 1, project=not block))
            inputs = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)).eval()


def tiny() -> nn.Module:
    """Two pairs, for a dry run: Inductor compiles it sixteen times. No ReLU, see `allowed`."""
    first = nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.Tanh()
    return nn.Sequential(*first, nn.Conv2d(4, 8, 3, 2), nn.BatchNorm2d(8), nn.Flatten()).eval()


def case(bench: Bench, name: str | None, say: Callable[[str], None]) -> Case:
    """The model of that name; by default ResNet-50, in a dry run a tiny one.

    Raises: UsageError for a name that is not known here.
    """
    torch.manual_seed(0)
    size = None
    if bench.dry:
        torch.set_num_threads(1)  # nothing here is large enough for two
        size = 64
    if name is None and bench.dry:
        return _own("tiny", tiny(), (3, 16, 16))
    try:
        return whole(name or "resnet50", size)
    except UsageError as error:
        if name is not None:
            raise
        say(f"a ResNet of its own in the place of torchvision's: {error}")
        return _own("own_resnet50", resnet((3, 4, 6, 3), 64, 1000), (3, 224, 224))


def _own(name: str, model: nn.Module, shape: tuple[int, ...]) -> Case:
    randomize(model)
    return Case(name, lambda: copy.deepcopy(model), shape)


def subject(case: Case, batch: int, bench: Bench) -> Subject:
    """The model as the folds are taken out of it: fp32, in training."""
    return make_subject(case, Setting("train", "float32", "contiguous", batch), bench.device)


def models(bench: Bench, report: Report, case: Case, batch: int, rounds_: int) -> None:
    """Training and inference, fp32 and autocast, in every way."""
    for mode in ("train", "infer"):
        for dtype in ("float32", "autocast_bfloat16"):
            each = make_subject(case, Setting(mode, dtype, "contiguous", batch), bench.device)
            measure(each, providers(PROVIDERS), report, rounds_)
            _must_fold(report, each)
            bench.free()


def _must_fold(report: Report, subject: Subject) -> None:
    """A pass that has folded nothing is a failure here: what was measured was plain Inductor."""
    for name in FOLDING[subject.key.mode]:
        key = subject.key._replace(provider=name)
        folded = report.row(key, "pairs_folded")
        if folded is not None and folded.p50 == 0:
            with report.keeping(key, "run"):
                raise RuntimeError("no pair was folded")
