"""Cases and providers for the tests of the benchmark, and functions that run it."""

import copy
import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_convbn.perf.cli import Mode
from triton_convbn.perf.providers import PreparedModel, Provider
from triton_convbn.perf.subject import Subject
from triton_convbn.perf.subject import subject as make_subject
from triton_convbn.perf.workloads import Case, Setting

from triton_convbn.cli import main
from triton_convbn.models import randomize

CPU = torch.device("cpu")
MODES = [str(mode) for mode in Mode]


def case(*modules: nn.Module, shape: tuple[int, ...] = (3, 8, 8), inner: bool = False, name: str = "case") -> Case:
    model = randomize(nn.Sequential(*modules)).eval()
    return Case(name, lambda: copy.deepcopy(model), shape, inner)


def small(inner: bool = False) -> Case:
    """Return two pairs and a Linear. Without a ReLU, every gradient is as precise as the arithmetic."""
    torch.manual_seed(1)
    first = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh()
    second = nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6, eps=0.1), nn.Tanh()
    return case(*first, *second, nn.Flatten(), nn.Linear(24, 5), inner=inner, name="small")


def subject(
    of: Case | None = None,
    mode: str = "train",
    dtype: str = "float32",
    layout: str = "contiguous",
    batch: int = 2,
) -> Subject:
    return make_subject(of or small(), Setting(mode, dtype, layout, batch), CPU)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def operators(function: Callable[[], object]) -> Counter[str]:
    """Return how often a call runs each operator."""
    found: Counter[str] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        function()
    return found


class Scaled(Provider):
    """Eager with a changed output."""

    name = "scaled"

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda y: y, name: str = "scaled") -> None:
        self.name = name  # type: ignore[misc]
        self.change = change

    def prepare(self, subject: Subject) -> PreparedModel:
        return PreparedModel(lambda x: self.change(subject.model(x)), subject.model)


class OnCall(Provider):
    """Eager that calls `then` in its n-th call and later ones.

    BEFORE: Calls before the rounds. One step is checked, one is timed, one is for saved bytes, one for the peak, and
    one warms up.
    """

    name = "on_call"
    BEFORE: ClassVar = 5

    def __init__(self, then: Callable[[], object], at: int, name: str = "on_call") -> None:
        self.name = name  # type: ignore[misc]
        self.then, self.at, self.calls, self.prepared = then, at, 0, 0

    def prepare(self, subject: Subject) -> PreparedModel:
        self.prepared += 1

        def call(x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls >= self.at:
                self.then()
            return subject.model(x)

        return PreparedModel(call, subject.model, 0)


def nothing() -> None:
    pass


def out_of_luck() -> None:
    raise RuntimeError("out of\nluck")


def interrupt() -> None:
    raise KeyboardInterrupt


Add = Callable[[Provider], None]


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(["bench", *arguments])
    assert isinstance(exited.value.code, int)
    return exited.value.code


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


RUN = ["--layers", "small", "--provider", "eager", "--provider", "on_call", "--batch", "2", "--rounds", "2"]
