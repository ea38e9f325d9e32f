"""The share of one process in a run that `torchrun` started on several; the whole run where it did not."""

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=7)
"""How long a rank waits for the slowest. One that dies takes the others with it: torchrun sees to that."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. local: its number on this machine, which picks its GPU."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def share(self, items: Sequence[T]) -> list[T]:
        """What this rank does of `items`. They are whole keys, so that candidates are compared on one device."""
        return list(items[self.rank :: self.world])

    def from_first(self, value: T) -> T:
        """What the first rank has; all ranks call it."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """What every rank has, on the first one; nothing on the others. All ranks call it."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, found)
        return found or []


@contextmanager
def ranks() -> Iterator[Ranks]:
    """This process's place among those of torchrun; alone where there are no others."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
