"""Many threads compile while each patches and unpatches: what a thread asked for is what it gets, and nobody else."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from checking import TOLERANCES, scramble
from torch import nn
from torch._inductor import config
from versions import needs_torch

from triton_convbn import patch, patched, unpatch
from triton_convbn.compat import get_custom_graph_passes
from triton_convbn.inductor import current_options

pytestmark = pytest.mark.slow

SECONDS = 8


def model(channels: int) -> nn.Module:
    return scramble(nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels)).eval())


@needs_torch(2, 12, "Dynamo crashes when several threads compile, also without this package")
def test_patching_while_others_compile() -> None:
    """The graphs run in eager; Dynamo lets one thread compile at a time, and the configuration is of a thread."""
    stop = time.monotonic() + SECONDS
    compiled = [0] * 4
    folded: list[int] = []
    flips = [0]

    def flip() -> None:
        while time.monotonic() < stop:
            recompute = bool(time.monotonic_ns() % 2)
            patch(recompute=recompute)
            with patched(when="always"):
                assert current_options().when == "always"
            assert current_options().recompute is recompute
            unpatch()
            assert config.pre_grad_custom_pass is None
            flips[0] += 1

    def work(index: int) -> None:
        while time.monotonic() < stop or not compiled[index]:
            own = model(2 + index)
            x = torch.randn(2, 3, 4, 4)

            def backend(gm: torch.fx.GraphModule, _inputs: object) -> object:
                with patched(when="always") as convbn:
                    hook = config.pre_grad_custom_pass
                    assert list(get_custom_graph_passes(hook)) == [convbn], hook
                    convbn(gm.graph)
                gm.recompile()
                folded.append(sum("fold" in node.name for node in gm.graph.nodes))
                return gm.forward

            y = torch.compile(own, backend=backend)(x)
            exact = own.double()(x.double())
            assert ((y - exact).abs().max() / exact.abs().max()).item() < TOLERANCES[torch.float32]
            compiled[index] += 1

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(flip), pool.submit(flip), *(pool.submit(work, index) for index in range(4))]:
            future.result()
    assert min(compiled) >= 1
    assert min(folded) == 1, "a compile went without the fold"
    assert flips[0] >= 2
    assert config.pre_grad_custom_pass is None


@needs_torch(2, 13, "the configuration is of the process")
def test_a_thread_has_its_own_patch() -> None:
    """As Inductor's configuration. Taking one's own out leaves the others' in."""
    installed = patch()
    seen: dict[str, Any] = {}

    def other() -> None:
        seen["before"] = config.pre_grad_custom_pass
        unpatch()
        seen["own"] = patch(recompute=False)
        seen["after"] = config.pre_grad_custom_pass
        unpatch()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen["before"] is None
    assert list(get_custom_graph_passes(seen["after"])) == [seen["own"]]
    assert list(get_custom_graph_passes(config.pre_grad_custom_pass)) == [installed]
    patch(recompute=False)
    assert len(get_custom_graph_passes(config.pre_grad_custom_pass)) == 1
    unpatch()
    assert config.pre_grad_custom_pass is None
