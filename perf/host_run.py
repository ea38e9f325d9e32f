"""Times generated wrappers, in a process whose CUDA driver does nothing: python -m triton_convbn.perf.host_run

Reads a JSON object from stdin, rounds and each provider's wrappers, and writes one to stdout: microseconds of each
provider's step, round by round, and the launches of one step as the driver counted them. `host_time` starts it.
"""

import ctypes
import json
import os
import re
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch._inductor import config as inductor_config

from triton_convbn.measure import rounds
from triton_convbn.ops import library  # noqa: F401  the operators that generated code may call

from .planned_gpu import CAPABILITY, PROPERTIES

_LIBRARY = re.compile(
    r"^(\s+)(?:(\w+) = )?(torch\.ops\.(?!triton_convbn\.|inductor\.)[\w.]+|aten\.[\w.]+|extern_kernels\.\w+)\(", re.M
)
"""A line of a wrapper that calls a library or an operator of torch's."""


def main() -> None:
    given = json.load(sys.stdin)
    launched = ctypes.c_ulonglong.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "launches")
    launches: dict[str, int] = {}
    steps: dict[str, Callable[[], object]] = {}
    with torch.no_grad(), _replaced():
        torch.cuda.init()
        for provider, wrappers in given["wrappers"].items():
            options = [wrapper.pop("options") for wrapper in wrappers]
            with inductor_config.patch(options[0]):
                steps[provider] = step = _step([_loaded(**wrapper) for wrapper in wrappers])
                step()  # makes the launchers
            before = launched.value
            step()
            launches[provider] = launched.value - before
        seconds = rounds(steps, given["rounds"], clock=thread_clock)
    times = {provider: [1e6 * each for each in every] for provider, every in seconds.items()}
    json.dump({"microseconds": times, "launches": launches}, sys.stdout)


def thread_clock(function: Callable[[], object]) -> float:
    """Return the CPU seconds of a call: a step never waits, and what else the machine does is not in them."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def _step(calls: list[tuple[Callable[[list[Any]], Any], list[Any]]]) -> Callable[[], None]:
    def step() -> None:
        for call, inputs in calls:
            call(inputs.copy())  # the code empties the list that it is given

    return step


def _loaded(text: str, inputs: Any, constants: Any, results: Any) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """Return the wrapper's `call` and its inputs. Library calls return tensors that were made before."""

    def named(match: re.Match[str]) -> str:
        indent, name, _ = match.groups()
        return f"{indent}{name} = _library_{name}(" if name else f"{indent}_library_("

    module = types.ModuleType("generated")
    exec(compile(_LIBRARY.sub(named, text), "<generated>", "exec"), module.__dict__)
    operators = {f"_library_{name}": _returning(_made(result)) for name, result in results.items()}
    module.__dict__.update(
        {name: _made(spec) for name, spec in constants.items()}, **operators, _library_=_returning(None)
    )
    return module.call, _made(inputs)


def _returning(result: Any) -> Callable[..., Any]:
    return lambda *_arguments, **_keywords: result


def _made(spec: Any) -> Any:
    """Return the tensor of a specification, or a list of them."""
    if spec is None:
        return None
    if not spec or not isinstance(spec[-1], str):
        return [_made(each) for each in spec]
    size, stride, dtype, device = spec
    return torch.empty_strided(size, stride, dtype=getattr(torch, dtype), device=device)


@contextmanager
def _replaced() -> Iterator[None]:
    """Let torch know an H100's figures, and Triton make kernels without code: compiling would take minutes.

    Launchers and metadata are the real ones. Of several configurations of a kernel the first is taken, since none can
    be timed.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource

    def cubin(_module: Any, metadata: dict[str, Any]) -> bytes:
        for kind in ("global", "profile"):
            metadata |= {f"{kind}_scratch_size": 0, f"{kind}_scratch_align": 1}
        metadata |= {"name": "kernel", "shared": 0, "tmem_size": 0, "tensordesc_meta": None}
        return b""

    def add_stages(_self: Any, stages: dict[str, Any], *_options: Any) -> None:
        stages.update(ttir=lambda module, _metadata: module, cubin=cubin)

    def first(self: Any, *_arguments: Any, **_keywords: Any) -> None:
        self.launchers = self.launchers[:1]

    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "get_device_properties", lambda device=None: PROPERTIES),
            (torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
            (CUDABackend, "add_stages", add_stages),
            (ASTSource, "make_ir", lambda *_arguments: ""),
            (CachingAutotuner, "autotune_to_one_config", first),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


if __name__ == "__main__":
    main()
