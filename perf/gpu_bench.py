"""What the GPU check measures with: the clocks of the GPU, or of the CPU in a dry run, and the rows that it keeps."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch._dynamo.utils import counters

from triton_convbn.measure import cpu_clock

from .table import Log, Row, environment, percentiles

Quantiles = tuple[float, float, float]
UNKNOWN = (math.nan, math.nan, math.nan)
INTERPRETED = "cpu (interpreted)"


class Case(NamedTuple):
    """The first columns of a row."""

    case: str
    provider: str = "triton_convbn"
    mode: str = ""
    dtype: str = ""
    layout: str = "contiguous"
    batch: int = 0


class Bench:
    """The device, and how time passes on it. In a dry run the device is the CPU, and so is the clock."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
        self.name = INTERPRETED if dry else torch.cuda.get_device_name(self.device)

    @property
    def second(self) -> torch.device | None:
        """Another device than the current one; the same in a dry run, None where there is one GPU."""
        if self.dry:
            return self.device
        others = [index for index in range(torch.cuda.device_count()) if index != self.device.index]
        return torch.device("cuda", others[0]) if others else None

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[[], object]) -> Quantiles:
        """Triton's `do_bench`, which empties the cache of the GPU before every call."""
        if self.dry:
            return percentiles([1e3 * cpu_clock(function) for _ in range(3)])
        import triton.testing

        p50, p20, p80 = triton.testing.do_bench(function, quantiles=[0.5, 0.2, 0.8])
        return p50, p20, p80

    def clock(self, function: Callable[[], object]) -> float:
        """Seconds of one call, by CUDA events."""
        if self.dry:
            return cpu_clock(function)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def peak_bytes(self, function: Callable[[], object]) -> int:
        """The most memory that was allocated at once during a call, the model's own included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())

    def replayable(self, function: Callable[[], object]) -> Callable[[], None]:
        """The call as a CUDA graph that can be replayed; it has run before, so that everything is compiled."""
        if self.dry:

            def again() -> None:
                function()

            return again
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()

        def replay() -> None:
            graph.replay()

        return replay

    @contextmanager
    def busy_side_stream(self) -> Iterator[None]:
        """Another stream than the current one, which first waits: what runs on any other runs too early."""
        if self.dry:
            yield
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # clock cycles, some 50 ms
            yield
        torch.cuda.synchronize()

    def free(self) -> None:
        if not self.dry:
            torch.cuda.empty_cache()


class Report:
    """The rows: to the file as they come, and kept for the summary. Progress goes to stderr."""

    def __init__(self, log: Log, bench: Bench) -> None:
        self.rows: list[Row] = []
        self._log, self._dry = log, bench.dry
        self._where = environment(bench.name)
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:6.1f} s] {text}", file=sys.stderr, flush=True)

    def _add(self, case: Case, metric: str, unit: str, values: Quantiles, status: str, error: str) -> None:
        row = Row(*case, metric, unit, *values, status, " ".join(error.split()), *self._where)
        self.rows.append(row)
        self._log.append(row)
        if status == "failed":
            self.say(f"failed: {case.case} {case.provider} {case.mode} {case.dtype} {metric}: {row.error[:200]}")

    def measured(self, case: Case, metric: str, unit: str, values: Quantiles | float) -> None:
        values = values if isinstance(values, tuple) else (values, values, values)
        self._add(case, metric, unit, values, "interpreted" if self._dry else "ok", "")

    def checked(self, case: Case, metric: str, unit: str, value: float, limit: float, what: str = "") -> None:
        """A value that may be as large as `limit`. NaN is not small."""
        if value <= limit:
            self.measured(case, metric, unit, value)
        else:
            error = f"{what}{': ' if what else ''}{value:.4g} {unit}, {limit:.4g} allowed"
            self._add(case, metric, unit, (value, value, value), "failed", error)

    def skipped(self, case: Case, metric: str, unit: str, why: str) -> None:
        self._add(case, metric, unit, UNKNOWN, "skipped", why)

    @contextmanager
    def keeping(self, case: Case, metric: str, unit: str = "") -> Iterator[None]:
        """An exception becomes a row, and the run goes on. Ctrl-C is none."""
        try:
            yield
        except Exception as error:
            self._add(case, metric, unit, UNKNOWN, "failed", f"{type(error).__name__}: {error}"[:2000])

    @property
    def failures(self) -> int:
        return sum(row.status == "failed" for row in self.rows)


@contextmanager
def by_kernel() -> Iterator[None]:
    """Folds inside are computed by a kernel. Raises: RuntimeError, where plain torch has stepped in for one."""

    def stepped_in() -> dict[str, int]:
        return {key: n for key, n in counters["triton_convbn"].items() if key.startswith("decomposed:")}

    before = stepped_in()
    yield
    reasons = [key for key, n in stepped_in().items() if n > before.get(key, 0)]
    if reasons:
        raise RuntimeError(f"no kernel has run: {', '.join(reasons)}")
