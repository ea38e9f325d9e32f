"""What the GPU check measures with: the GPU, or the CPU in a dry run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.utils import counters

from triton_convbn.measure import cpu_clock, replayable

from .report import Quantiles
from .table import percentiles

INTERPRETED = "cpu (interpreted)"


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

    def replayable(self, function: Callable[[], object]) -> Callable[[], None]:
        """The call as a CUDA graph that can be replayed; it has run before, so that everything is compiled."""
        if self.dry:

            def again() -> None:
                function()

            return again
        return replayable(function)

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
