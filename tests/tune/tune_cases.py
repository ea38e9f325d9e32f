"""Problems, and a bench that costs nothing, for the tests of the tuner."""

import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from triton_convbn.kernels.config import KernelConfig
from triton_convbn.kernels.spec import PairSpec, backward_of

from triton_convbn.tune.outcome import Outcome, Status
from triton_convbn.tune.problem import Problem
from triton_convbn.tune.store import Header

HEADER = Header("sm_90", "NVIDIA H100", torch="2", triton="3", sources="abc")


def pairs(rows: int, count: int, dtype: str = "fp32", out: str | None = None) -> tuple[PairSpec, ...]:
    """Return `count` convolutions of two shapes."""
    names = dict.fromkeys(("running_mean", "running_var", "bn_weight", "bn_bias"), "fp32")
    return tuple(PairSpec(rows + 64 * (i % 2), 64, 9, weight=dtype, out=out or dtype, **names) for i in range(count))


def problems() -> list[Problem]:
    """Return four problems of four tuned keys."""
    small, large = pairs(64, 3), pairs(512, 16, out="fp16")
    return [
        Problem(small),
        Problem(large),
        Problem(tuple(map(backward_of, small))),
        Problem(tuple(map(backward_of, large))),
    ]


def _noise(*words: object) -> float:
    """Return a number between 0 and 1 that depends on the words alone."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:6]) / 2**48


class Landscape:
    """A bench whose cost is smooth in the sizes, has a best point that the seed picks, and varies a little.

    The best number of threads depends on the block. One candidate in twelve cannot win.

    Attributes:
        evaluated: The candidates that were evaluated, with repetition.
        log: A file that gets a line for each candidate once the caller wants the next, and so has recorded it.
        seconds: The duration of an evaluation.
    """

    noisy = False

    def __init__(self, seed: int = 0, seconds: float = 0.0, log: Path | None = None) -> None:
        self.seed, self.seconds = seed, seconds
        self.evaluated: list[tuple[str, KernelConfig]] = []
        self.closed = False
        self._log = None if log is None else os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def outcome(self, problem: Problem, config: KernelConfig) -> Outcome:
        if _noise("status", self.seed, problem.key, config) < 1 / 12:
            worst = (Status.SPILLS, Status.FAILED, Status.HUNG, Status.CRASHED, Status.WRONG_VALUES)
            status = worst[int(_noise("which", config) * len(worst))]
            return Outcome(status, message=f"it is {status}")
        return Outcome(Status.OK, self.cost(problem, config), facts={"registers": 32, "share_of_bandwidth": 0.5})

    def cost(self, problem: Problem, config: KernelConfig) -> float:
        at = {name: _noise(name, self.seed, problem.key) for name in ("block", "threads", "rows", "pairs_per_launch")}
        block, threads = math.log2(config.block), math.log2(config.threads)
        cost = 100 + 4 * (block - 8 - 4 * at["block"]) ** 2 + 3 * (block - threads - 2 - 3 * at["threads"]) ** 2
        cost += 10 * abs(math.log2(config.rows or 16) / 4 - at["rows"])
        pairs = at["pairs_per_launch"]
        cost += 8 * abs((config.pairs_per_launch or 16) / 16 - pairs) + 5 * (config.emit == "shared") * (pairs - 0.5)
        return cost * (1 + 0.01 * _noise("noise", self.seed, problem.key, config))

    def evaluate(
        self, problem: Problem, configs: Sequence[KernelConfig], together: bool = False
    ) -> Iterator[tuple[KernelConfig, Outcome]]:
        for config in sorted(configs, key=repr, reverse=True):  # in another order than given
            self.evaluated.append((problem.key, config))
            time.sleep(self.seconds)
            yield config, self.outcome(problem, config)
            if self._log is not None:
                os.write(self._log, f"{problem.key} {sorted(asdict(config).items())}\n".encode())

    def close(self) -> None:
        self.closed = True
