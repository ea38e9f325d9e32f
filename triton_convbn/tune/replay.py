"""A recorded store in the place of hardware: any search runs on it, on any machine, in no time."""

from collections.abc import Iterator, Sequence

from ..kernels.config import KernelConfig
from .bench import OfflineBench
from .device import DeviceBench
from .outcome import MEASURED, MODELLED, Outcome, Status
from .problem import Problem
from .store import Content


class Replay:
    """An evaluator that answers with what a store holds. evaluations: how many configurations it was asked for."""

    def __init__(self, content: Content) -> None:
        self._outcomes = content.outcomes
        measured = content.header is not None and content.header.device
        self.unit = MEASURED if measured else MODELLED
        self.margin = (DeviceBench if measured else OfflineBench).margin
        self.evaluations = 0

    def evaluate(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Recorded outcomes; what was never recorded has failed."""
        recorded = self._outcomes.get(problem.key, {})
        for config in configs:
            self.evaluations += 1
            yield config, recorded.get(config) or Outcome(Status.FAILED, unit=self.unit, message="not in the store")

    def rerank(self, problem: Problem, configs: Sequence[KernelConfig]) -> Iterator[tuple[KernelConfig, Outcome]]:
        """Nothing: the newest record of a candidate is the only one."""
        return iter(())

    def close(self) -> None:
        pass
