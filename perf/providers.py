"""The ways to run a model that are compared. A new one is a class here."""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.const_fold import split_const_subgraphs
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.modules.batchnorm import _BatchNorm

from triton_convbn import ConvBNPass
from triton_convbn.errors import UsageError

from .subject import Subject


class Way(NamedTuple):
    """What runs the model. model: whose parameters it runs with. pairs: folded ones, where no pass counts them."""

    call: Callable[[Tensor], Tensor]
    model: nn.Module
    pairs: int | None = None


class Provider(ABC):
    """One way to run a model."""

    name: ClassVar[str]

    def refuses(self, subject: Subject) -> str | None:
        """Why it cannot run this, as one line."""
        return None

    @abstractmethod
    def prepare(self, subject: Subject) -> Way:
        """The way to run the subject. What it compiles it may compile later, on the first call."""


class Eager(Provider):
    name = "eager"

    def prepare(self, subject: Subject) -> Way:
        return Way(subject.model, subject.model, 0)


class EagerFolded(Provider):
    """Folded once, beforehand, as for deployment. Its parameters are no longer the model's."""

    name = "eager_folded"

    def refuses(self, subject: Subject) -> str | None:
        if any(t.requires_grad for t in subject.model.parameters()) and subject.trains:
            return "a model that is folded for deployment has lost the parameters that train"
        return None

    def prepare(self, subject: Subject) -> Way:
        gm = fx.symbolic_trace(copy.deepcopy(subject.model))
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(subject.x.detach())
        before = counters["triton_convbn"]["folded"]
        ConvBNPass(kernel="torch", recompute=False)(gm.graph)
        gm.recompile()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of modules that it has not moved yet
            folded = split_const_subgraphs(gm)
            folded.run_folding()
        return Way(folded, folded, counters["triton_convbn"]["folded"] - before)


class FrozenBatchNorm(Provider):
    """torchvision's FrozenBatchNorm2d in the place of every BatchNorm2d, in eager."""

    name = "frozen_bn"

    def refuses(self, subject: Subject) -> str | None:
        own = [module for module in subject.model.modules() if isinstance(module, _BatchNorm)]
        if not all(type(module) is nn.BatchNorm2d for module in own):
            return "FrozenBatchNorm2d is for two dimensions"
        if any(module.running_mean is None for module in own):
            return "FrozenBatchNorm2d has running statistics, and a BatchNorm of this has none"
        if subject.trains and any(p.requires_grad for module in own for p in module.parameters()):
            return "FrozenBatchNorm2d has no affine parameters that train"
        return None

    def prepare(self, subject: Subject) -> Way:
        model = copy.deepcopy(subject.model)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                model.set_submodule(name, _frozen(module))
        return Way(model, model, 0)


def _frozen(bn: nn.BatchNorm2d) -> nn.Module:
    try:
        from torchvision.ops import FrozenBatchNorm2d
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"frozen_bn needs torchvision: pip install 'triton_convbn[models]' ({error})") from error
    frozen = FrozenBatchNorm2d(bn.num_features, bn.eps).to(bn.running_mean)
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(bn, name)
        if value is not None:
            getattr(frozen, name).copy_(value.detach())
    return frozen


class Compiled(Provider):
    """torch.compile, with these keywords."""

    keywords: ClassVar[dict[str, Any]] = {}

    def prepare(self, subject: Subject) -> Way:
        return Way(torch.compile(subject.model, **self.keywords), subject.model)


class Inductor(Compiled):
    name = "inductor"


class InductorConvBN(Compiled):
    """Inductor with its own pass, which is off by default."""

    name = "inductor_efficient_conv_bn"
    keywords: ClassVar = {"options": {"efficient_conv_bn_eval_fx_passes": True}}


class InductorFreezing(Compiled):
    """Inductor with the parameters as constants of the compiled code."""

    name = "inductor_freezing"
    keywords: ClassVar = {"options": {"freezing": True}}

    def refuses(self, subject: Subject) -> str | None:
        return "freezing is for inference" if subject.trains else None


class Ours(Compiled):
    name = "triton_convbn"
    keywords: ClassVar = {"backend": "triton_convbn"}


class OursKept(Compiled):
    """With the folded weights kept for backward."""

    name = "triton_convbn_keep"
    keywords: ClassVar = {"backend": "triton_convbn", "options": {"recompute": False}}


class OursFreezing(InductorFreezing):
    name = "triton_convbn_freezing"
    keywords: ClassVar = {"backend": "triton_convbn", "options": {"freezing": True}}


_ALL = (
    *(Eager, EagerFolded, FrozenBatchNorm),
    *(Inductor, InductorConvBN, InductorFreezing),
    *(Ours, OursKept, OursFreezing),
)
PROVIDERS: dict[str, Provider] = {provider.name: provider() for provider in _ALL}


def providers(names: list[str]) -> list[Provider]:
    """Those of these names. Raises: UsageError for a name that is none."""
    unknown = sorted(set(names) - set(PROVIDERS))
    if unknown:
        raise UsageError(f"no such provider: {', '.join(unknown)}; choose from {', '.join(PROVIDERS)}")
    return [PROVIDERS[name] for name in dict.fromkeys(names)]
