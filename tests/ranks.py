"""Run a function on two gloo ranks, each a process of its own."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_two_ranks(function: Callable[[], None], folder: Path) -> None:
    """Call a function, which must be importable, in two processes of one thread each and one process group.

    Raises:
        ProcessRaisedException: A rank fails. It has the traceback.
    """
    mp.spawn(_run, (str(folder / "store"), function), nprocs=2)


def _run(rank: int, store: str, function: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    try:
        function()
        dist.barrier()  # no rank closes its connections while the other still sends
    finally:
        dist.destroy_process_group()
    # The threads of gloo outlive DistributedDataParallel and `destroy_process_group` (torch 2.14.1). One that frees a
    # tensor while Python ends aborts the process (pytorch/pytorch#179291). One run of the slow tests ended so.
    os._exit(0)
