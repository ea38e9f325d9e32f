"""The ways to run a model that the benchmark compares. A new one is a `Compiled` instance or a class here."""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.const_fold import split_const_subgraphs
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.modules.batchnorm import _BatchNorm

from triton_convbn import ConvBNPass
from triton_convbn.errors import UsageError, pip_install

from .subject import Subject


class PreparedModel(NamedTuple):
    """A callable, the model with its parameters, and the number of folded pairs if no pass counts them."""

    call: Callable[[Tensor], Tensor]
    model: nn.Module
    pairs: int | None = None


class Provider(ABC):
    """One way to run a model.

    Attributes:
        name: Its name in tables and on the command line.
        other_parameters: True if its parameters are not the subject's, so that some gradients are missing.
    """

    name: str
    other_parameters = False

    def refuses(self, subject: Subject) -> str | None:
        """Return why it cannot run this subject, as one line."""
        return None

    @abstractmethod
    def prepare(self, subject: Subject) -> PreparedModel:
        """Return the prepared model, which may still compile on its first call."""


class Eager(Provider):
    """The model itself."""

    name = "eager"

    def prepare(self, subject: Subject) -> PreparedModel:
        return PreparedModel(subject.model, subject.model, 0)


class EagerFolded(Provider):
    """Folded once, beforehand, as for deployment. Its parameters are no longer the model's."""

    name = "eager_folded"

    def refuses(self, subject: Subject) -> str | None:
        if any(t.requires_grad for t in subject.model.parameters()) and subject.trains:
            return "a model that is folded for deployment has lost the parameters that train"
        return None

    def prepare(self, subject: Subject) -> PreparedModel:
        gm = fx.symbolic_trace(copy.deepcopy(subject.model))
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(subject.x.detach())
        before = counters["triton_convbn"]["folded"]
        ConvBNPass(kernel="torch", recompute=False)(gm.graph)
        gm.recompile()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about modules that are not moved yet
            folded = split_const_subgraphs(gm)
            folded.run_folding()
        return PreparedModel(folded, folded, counters["triton_convbn"]["folded"] - before)


class MergedOnce(Provider):
    """Branches merged once by timm, as for deployment. The difference to this is the cost of merging on every call."""

    other_parameters = True

    def __init__(self, name: str, compiled: bool = False) -> None:
        self.name, self.compiled = name, compiled

    def refuses(self, subject: Subject) -> str | None:
        names = "fuse", "reparameterize", "switch_to_deploy"
        merges = any(hasattr(module, name) for module in subject.model.modules() for name in names)
        return None if merges else "no module of the model merges its branches"

    def prepare(self, subject: Subject) -> PreparedModel:
        try:
            from timm.utils.model import reparameterize_model
        except ImportError as error:
            raise UsageError(f"{self.name} needs timm: {pip_install('models')} ({error})") from error
        model = reparameterize_model(subject.model)  # a copy
        return PreparedModel(torch.compile(model) if self.compiled else model, model, 0)


class FrozenBatchNorm(Provider):
    """torchvision's FrozenBatchNorm2d in place of every BatchNorm2d, in eager."""

    name = "frozen_bn"

    def refuses(self, subject: Subject) -> str | None:
        own = [module for module in subject.model.modules() if isinstance(module, _BatchNorm)]
        if not all(type(module) is nn.BatchNorm2d for module in own):
            return "FrozenBatchNorm2d is for two dimensions"
        if any(module.running_mean is None for module in own):
            return "FrozenBatchNorm2d needs running statistics, and a BatchNorm here has none"
        if subject.trains and any(p.requires_grad for module in own for p in module.parameters()):
            return "FrozenBatchNorm2d has no affine parameters that train"
        return None

    def prepare(self, subject: Subject) -> PreparedModel:
        try:
            from torchvision.ops import FrozenBatchNorm2d
        except (ImportError, RuntimeError) as error:
            raise UsageError(f"frozen_bn needs torchvision: {pip_install('models')} ({error})") from error
        model = copy.deepcopy(subject.model)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(module.num_features, module.eps).to(module.running_mean)
                frozen.load_state_dict(module.state_dict(), strict=False)  # weight and bias stay 1 and 0 without affine
                model.set_submodule(path, frozen)
        return PreparedModel(model, model, 0)


class Compiled(Provider):
    """torch.compile with the given backend and options."""

    def __init__(self, name: str, backend: str | Callable[..., Any] = "inductor", **options: Any) -> None:
        self.name = name
        self.backend, self.options = backend, options

    def prepare(self, subject: Subject) -> PreparedModel:
        compiled = torch.compile(subject.model, backend=self.backend, options=self.options or None)
        return PreparedModel(compiled, subject.model)


class Frozen(Compiled):
    """The same for inference, with parameters as constants.

    Dynamo has to see `freezing` in Inductor's configuration when it traces. It marks the parameters, so a copy is used.
    The option makes it another backend. Without it, Dynamo would run a graph that the model itself has compiled before.
    """

    def refuses(self, subject: Subject) -> str | None:
        return "freezing is for inference" if subject.trains else None

    def prepare(self, subject: Subject) -> PreparedModel:
        model = copy.deepcopy(subject.model)
        compiled = torch.compile(model, backend=self.backend, options={"freezing": True})
        with torch.no_grad(), inductor_config.patch(freezing=True):
            subject.forward(compiled)
        return PreparedModel(compiled, model)


_OURS = "triton_convbn"
_ALL = (
    Eager(),
    EagerFolded(),
    MergedOnce("merged_once"),
    FrozenBatchNorm(),
    Compiled("inductor"),
    Compiled("inductor_efficient_conv_bn", efficient_conv_bn_eval_fx_passes=True),
    Frozen("inductor_freezing"),
    MergedOnce("inductor_merged_once", compiled=True),
    Compiled("triton_convbn", _OURS),
    Compiled("triton_convbn_always", _OURS, when="always"),
    Compiled("triton_convbn_keep", _OURS, recompute=False),
    Frozen("triton_convbn_freezing", _OURS),
    Compiled("triton_convbn_eager", "triton_convbn_eager"),
)
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _ALL}
