import gc
import os
import sys
import tempfile

import pytest

# One cache for the run, empty at its start: what an earlier run compiled must not stand in for what this one would.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="convbn-inductor-"))
# Else every process with an empty cache compiles a file to learn whether the C++ compiler knows the CPU's vectors: 5 of
# the 21 seconds that the smallest graph takes.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Convolutions of torch 2.14.1 in fp16 crash on a CPU that has instructions for them: 2 x 2 x 2 x 1, one tap, padded.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import torch
from torch._dynamo import guards
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.autograd import forward_ad

# Dynamo flushes the caches of the processor to time the guards of each graph for its log: 22 ms of 170 a test.
guards.profile_guard_manager = lambda *_arguments: 0.0


def pytest_collection_finish() -> None:
    """Leave the 400,000 objects that imports have made out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh():
    """Each test starts with nothing compiled, nothing counted, nothing patched, and the same random numbers.

    Graphs do not come out of a cache, for a cached graph skips the pass; tests of the caches turn them on.
    """
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield
    from triton_convbn import unpatch

    unpatch()
    _end_modes()
    tuned = sys.modules.get("triton_convbn.kernels.tuned")
    if tuned is not None and hasattr(tuned.gpu_of, "cache_clear"):
        tuned.gpu_of.cache_clear()  # a test may have pretended that there is a GPU


def _end_modes():
    """End what a graph that raised has begun: the next test would run inside its torch.func transform."""
    torch.set_grad_enabled(True)
    torch._C._autograd._saved_tensors_hooks_enable()
    while torch._C._functorch.maybe_current_level() is not None:
        torch._C._functorch.pop_dynamic_layer_stack()
    while forward_ad._current_level >= 0:
        forward_ad.exit_dual_level()
