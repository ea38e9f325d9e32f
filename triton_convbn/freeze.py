"""Keep BatchNorms in eval mode through ``model.train()``, which training loops call in every epoch or step."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

Model = TypeVar("Model", bound=nn.Module)
Where = Callable[[str, nn.Module], bool]


def freeze_statistics(model: Model, *, affine: bool = False, where: Where | None = None) -> Model:
    """Put every BatchNorm into eval mode and keep it there when `train` is called. Other modules train as before.

    A frozen BatchNorm uses its running statistics and does not update them, so that it folds. Copies and pickles of the
    model are frozen too. State dicts have the same keys. A second call adds to the first.

    Args:
        model: A module with BatchNorm1d, 2d or 3d, SyncBatchNorm, or subclasses of them. A BatchNorm without running
            statistics is left alone: eval mode does not change it.
        affine: Freeze weight and bias as well (``requires_grad=False``). Do so before DDP wraps the model, which waits
            for the gradient of every parameter that requires one when it is wrapped.
        where: Freeze only the BatchNorms for which this is true. It gets the name, as in ``model.named_modules()``, and
            the module.

    Returns:
        The model, which is changed in place.

    Raises:
        TypeError: The model is no module.
        ValueError: A BatchNorm is lazy and has no shape yet. Nothing is frozen then.

    Note:
        ``SyncBatchNorm.convert_sync_batchnorm`` makes new modules, which are not frozen. Freeze after it, or leave it
        out: a frozen BatchNorm has nothing to synchronize.

    Example:
        Fine-tune with the statistics of pretraining::

            triton_convbn.freeze_statistics(model, where=lambda name, module: name.startswith("backbone"))
            trainer.train()  # calls model.train()
    """
    for name, module in (found := list(_batch_norms(model, where))):
        if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
            raise ValueError(f"{name or type(module).__name__} is lazy and has no shape: call the model once first")
    for _, module in found:
        if module.running_mean is None:
            continue
        frozen = _frozen(module)
        if frozen is None:
            frozen = module.train = _StayInEval(module)  # type: ignore[assignment, method-assign]
            module.training = False
        if affine:
            frozen.freeze_affine()
    return model


def unfreeze_statistics(model: Model, *, where: Where | None = None) -> Model:
    """Undo `freeze_statistics`: BatchNorms follow `train` and `eval` again.

    Each returns to the mode that it would be in if it had not been frozen. Parameters that ``affine=True`` has frozen
    require gradients again; others do not change.

    Args:
        model: A module. BatchNorms that are not frozen do not change.
        where: Unfreeze only the BatchNorms for which this is true, see `freeze_statistics`.

    Returns:
        The model, which is changed in place.
    """
    for _, module in _batch_norms(model, where):
        frozen = _frozen(module)
        if frozen is not None:
            del module.train
            if frozen.own is not None:
                module.train = frozen.own  # type: ignore[method-assign]
            module.training = frozen.mode
            for name, parameter in module.named_parameters(recurse=False):
                if name in frozen.affine:
                    parameter.requires_grad_()
    return model


class _StayInEval:
    """The `train` of one frozen BatchNorm, an attribute of the instance that hides the method of its class.

    Pickle and deepcopy map the module that it holds to the module's copy. Other ways fail:

    - A forward hook that sets the mode does so only when the model runs, and a BatchNorm with a hook is declined by
      `conv_bn_eval` and in symbolic traces.
    - A new class of the module (``module.__class__ = ...``) cannot be pickled unless it is importable. It breaks
      ``parametrize.remove_parametrizations``, which restores the base class, and ``fuse_modules`` of
      ``torch.ao.quantization``, which looks classes up in a table.
    - A bound method or a closure as attribute cannot be pickled.
    - An override at the root of the model is skipped where a part of the model is trained by itself.

    Attributes:
        mode: The value that `training` would have if the module were not frozen.
        affine: The names of the parameters that no longer require gradients.
        own: The `train` that the instance had before, or None.
    """

    def __init__(self, module: _BatchNorm) -> None:
        self.module = module
        self.mode = module.training
        self.affine: set[str] = set()
        self.own: Any = vars(module).get("train")

    def __call__(self, mode: bool = True) -> nn.Module:
        """Set the mode of the module's children, such as the activation of timm's BatchNormAct2d. Return the module."""
        type(self.module).train(self.module, mode)
        self.mode = mode
        self.module.training = False
        return self.module

    def freeze_affine(self) -> None:
        """Let weight and bias require no gradient, and remember which of them did."""
        for name, parameter in self.module.named_parameters(recurse=False):
            if parameter.requires_grad:
                self.affine.add(name)
                parameter.requires_grad_(False)


def _batch_norms(model: nn.Module, where: Where | None) -> Iterator[tuple[str, _BatchNorm]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{type(model).__name__} is no module")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (where is None or where(name, module)):
            yield name, module


def _frozen(module: _BatchNorm) -> _StayInEval | None:
    train: Any = vars(module).get("train")
    return train if isinstance(train, _StayInEval) else None


__all__ = ["freeze_statistics", "unfreeze_statistics"]
