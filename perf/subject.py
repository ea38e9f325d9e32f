"""Run a case in one setting. A `Subject` is the model with its input, on a device."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from triton_convbn.errors import UsageError
from triton_convbn.example_inputs import check_bound, tensors_of
from triton_convbn.models import DTYPES

from .results import Key
from .workloads import Case, Setting

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def loss_weights(output: Tensor) -> Tensor:
    """Return weights that differ and do not cancel: the gradient of a last bias is their sum."""
    wide = torch.promote_types(output.dtype, torch.float32)
    return torch.linspace(-1, 2, output.shape[-1] if output.ndim else 1, dtype=wide, device=output.device)


def relative_error(found: Tensor, exact: Tensor, order: float = 2.0) -> float:
    """Return the norm of the difference over the norm of the exact values, which are fp64 and on the CPU."""
    norm = torch.linalg.vector_norm
    return float((norm(found.cpu().double() - exact, order) / norm(exact, order).clamp_min(1e-300)).item())


def relative_errors(
    found: dict[str, Tensor], exact: dict[str, Tensor], order: float = 2.0
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the errors of the outputs and those of the gradients of a step, by name.

    Raises:
        RuntimeError: If other parameters have gradients.
    """
    if found.keys() != exact.keys():
        raise RuntimeError(f"not the same gradients: {', '.join(sorted(found.keys() ^ exact.keys()))}")
    each = {name: relative_error(found[name], value, order) for name, value in exact.items()}
    outputs = {name: error for name, error in each.items() if not name or name.startswith("[")}
    return outputs, {name: error for name, error in each.items() if name not in outputs}


@dataclass(frozen=True)
class Subject:
    """A model and its input. Every step uses the same tensors, and leaves gradients on them."""

    key: Key
    model: nn.Module
    x: Tensor
    autocast: torch.dtype | None

    @property
    def trains(self) -> bool:
        return self.key.mode != "infer"

    def forward(self, run: Callable[[Tensor], Any]) -> Any:
        """Return what `run` returns for the input, under the subject's autocast."""
        with torch.autocast(self.x.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            return run(self.x)

    def step(self, run: Callable[[Tensor], Any], model: nn.Module | None = None) -> dict[str, Tensor]:
        """Run forward and, if the subject trains, backward once. There is no optimizer.

        Args:
            model: The model whose parameters `run` uses, if these are not the subject's own.

        Returns:
            The output as "", further outputs as "[1]" and so on, and gradients by the name of the parameter, the
            input's as "input".
        """
        model = model or self.model
        outputs = self.timed_step(run, model)()
        found = {f"[{index}]" if index else "": output.detach() for index, output in enumerate(outputs)}
        found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return found if self.x.grad is None else found | {"input": self.x.grad}

    def timed_step(self, run: Callable[[Tensor], Any], model: nn.Module) -> Callable[[], list[Tensor]]:
        """Return a step that returns the outputs. The loss is the weighted sum of all of them.

        It does not do what a training loop does not: it looks up no names of parameters. Walking the 700 modules of
        mobileone_s0 twice took 10 of the 43 ms of an inference.
        """
        leaves = [*model.parameters(), self.x]

        def step() -> list[Tensor]:
            for leaf in leaves:
                leaf.grad = None
            with torch.set_grad_enabled(self.trains):
                outputs = tensors_of(self.forward(run))
                if self.trains:
                    scales = map(loss_weights, outputs)
                    losses = ((out.to(scale.dtype) * scale).sum() for out, scale in zip(outputs, scales, strict=True))
                    reduce(torch.add, losses).backward()
            return outputs

        return step

    def double(self) -> "Subject":
        """Return a copy in fp64, without autocast."""
        x = self.x.detach()
        x = (x.double() if x.is_floating_point() else x).requires_grad_(self.x.requires_grad)
        return Subject(self.key, copy.deepcopy(self.model).double(), x, None)

    def exact(self) -> dict[str, Tensor]:
        """Return the results of a step in fp64, in eager, with the same parameters. On the CPU."""
        double = self.double()
        return {name: tensor.cpu() for name, tensor in double.step(double.model).items()}

    def clear(self) -> None:
        """Remove all gradients."""
        self.model.zero_grad(set_to_none=True)
        self.x.grad = None


def subject(case: Case, setting: Setting, device: torch.device, compared: bool = True) -> Subject:
    """Return the case in that setting. The seed is fixed.

    Args:
        compared: The results of a step are compared: they are one tensor, from which a loss is made.

    Raises:
        UsageError: If the model does not run on its input, or its results cannot be compared.
    """
    torch.manual_seed(0)
    model = case.build()
    x = torch.randn(setting.batch, *case.shape) if case.x is None else case.x.detach().clone()
    outputs = check_bound(case.name, model, x)
    if compared and not tensors_of(outputs):
        raise UsageError(f"{case.name} returns no floating-point tensor, which gives no loss")
    if compared and not any(p.requires_grad for p in model.parameters()):
        raise UsageError(f"{case.name} has nothing to train: none of its parameters requires a gradient")
    dtype, autocast = DTYPES[setting.dtype]
    model = model.to(device, dtype)
    # `nn.Module.to` with a memory format raises an error for channels_last and 5-D weights.
    for tensor in [each for each in (*model.parameters(), *model.buffers()) if each.ndim in (4, 5)]:
        tensor.data = tensor.data.to(memory_format=_memory_format(tensor, setting.layout))
    x = x.to(device, dtype if x.is_floating_point() else x.dtype, memory_format=_memory_format(x, setting.layout))
    for module in model.modules():
        if setting.mode == "input-grad" or (setting.mode == "train-frozen" and isinstance(module, _BatchNorm)):
            module.requires_grad_(False)
    wanted = setting.mode == "input-grad" or (setting.mode != "infer" and case.inner)
    x.requires_grad_(wanted and x.is_floating_point())
    return Subject(Key(case.name, "", *setting), model, x, autocast)


def _memory_format(tensor: Tensor, layout: str) -> torch.memory_format:
    if layout == "channels_last" and tensor.ndim == 5:
        return torch.channels_last_3d
    return LAYOUTS[layout] if tensor.ndim == 4 else torch.contiguous_format
