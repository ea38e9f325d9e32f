"""Launch kernels in the graph that Inductor lowers, on tensors that Inductor's code allocates."""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..kernels.kernel_source import KernelSource, Place, buffer_name, in_buffers, starts_in_buffer
from ..kernels.launch import load, warp_size

Boxes = list[Any]
"""Inductor's tensors, `ir.TensorBox`."""

_ASKS_TARGET = "tl.target_info.is_hip()"


def empty(example: Tensor) -> Any:
    """Return an uninitialized Inductor tensor like the example."""
    from torch._inductor.lowering import empty_strided

    return empty_strided(list(example.shape), list(example.stride()), dtype=example.dtype, device=example.device)


def empty_vectors(examples: Sequence[Tensor]) -> Boxes:
    """Return uninitialized Inductor tensors like the examples, which are vectors. Those of one dtype share a buffer.

    A buffer costs the host an allocation and an argument. In fp16, ResNet-50's training step has 159 of these vectors
    in 8 launches. With a buffer for each, its host time was 1.02 of plain Inductor's. With 8 buffers it is 0.94, and
    0.97 in another run (measured on a CPU, docs/experiments.md).
    """
    from torch._inductor.lowering import as_strided

    boxes: Boxes = [None] * len(examples)
    for dtype in dict.fromkeys(example.dtype for example in examples):
        own = [index for index, example in enumerate(examples) if example.dtype == dtype]
        *starts, size = starts_in_buffer([examples[index].numel() for index in own])
        memory = empty(examples[own[0]].new_empty(size))
        for index, start in zip(own, starts, strict=True):
            boxes[index] = as_strided(memory, list(examples[index].shape), [1], start)
    return boxes


def launch(kernels: Iterable[tuple[slice, KernelSource]], fields: list[dict[str, Any]], device: torch.device) -> None:
    """Add the launches of one call to Inductor's graph. `fields[i]` maps fields to the tensors of pair or sum i.

    A kernel is given each buffer once, and its text says where tensors begin in it. Generated code would make an object
    for every view: 44 in ResNet-50's backward (fp16 autocast).
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    for part, source in kernels:
        if source.programs:
            values = fields[part]
            every = {each.name: _place(values[each.pair][each.field]) for each in source.arguments}
            uses = Counter(memory.get_name() for memory, start in every.values() if start is not None)
            numbers: dict[str, int] = {}
            given: dict[str, Any] = {}
            places: list[Place] = []
            for argument, (memory, start) in every.items():
                if start is None or (start == 0 and uses[memory.get_name()] == 1):
                    given[argument] = memory
                else:
                    number = numbers.setdefault(memory.get_name(), len(numbers))
                    given[buffer_name(number)] = memory
                    places.append((argument, number, start))
            index = kernel_side_table.add_kernel(_kernel(source, warp_size(device), tuple(places)))
            compat.add_triton_kernel(index, source.programs, given)


def _place(box: Any) -> tuple[Any, int | None]:
    """Return the buffer that a view is in and where it begins, in elements; or the tensor itself, and None."""
    import sympy  # type: ignore[import-untyped]
    from torch._inductor.ir import ReinterpretView, StorageBox
    from torch._inductor.lowering import TensorBox

    view = box.data
    if not isinstance(view, ReinterpretView) or not isinstance(view.data, StorageBox):
        return box, None
    start, memory = view.layout.offset, view.data.get_layout()
    known = isinstance(start, int | sympy.Integer) and memory.dtype == view.layout.dtype and memory.offset == 0
    return (TensorBox(view.data), int(start)) if known else (box, None)


@functools.lru_cache(maxsize=1024)
def _kernel(source: KernelSource, lanes: int, places: tuple[Place, ...]) -> Any:
    """Return the kernel for Inductor, which reads the number of warps from a `triton.autotune` of one configuration.

    The text asks Triton's driver whether the target is AMD. Inductor compiles in forked processes, where the driver
    cannot be asked because that initializes CUDA. So the text has the answer instead.
    """
    import triton

    answer = str(torch.version.hip is not None)
    source = in_buffers(replace(source, text=source.text.replace(_ASKS_TARGET, answer)), places)
    kernel = load(source)
    compat.declare_writes(kernel, [each.name for each in source.arguments if each.access == "write"])
    warps = max(1, source.config.threads // lanes)
    return triton.autotune(configs=[triton.Config({}, num_warps=warps)], key=[])(kernel)
