"""The text of a generated kernel, and the parts that forward and backward share.

A kernel is a branch tree on the program id with one body a pair. Each body calls the functions of a template, and the
templates' text precedes the kernel. Every size is a constant in the text, and so is every eps. The arguments are
pointers, which Triton specializes on 16-byte alignment and nothing else. eps is no argument because Triton passes a
Python float as fp32, whatever its annotation: folds in fp64 were off by 5e6 ulp on an H200.

Why a tree and not selected pointers: at 16 pairs the tree needs 32 registers and selecting 72; at 53 pairs 39 and 216
(compiled offline for sm_90).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import KernelConfig
from .spec import HIDDEN_PARAMETER_BYTES, ITEMSIZE, POINTER_BYTES
from .tree import Leaf, branches_of, tree

MARK = "# ---- copied into generated kernels from here on ----\n"


@dataclass(frozen=True)
class Argument:
    """One kernel argument: field `field` of pair `pair`, with `numel` elements of `dtype`."""

    pair: int
    field: str
    dtype: str
    numel: int
    access: str  # "read" or "write"

    @property
    def name(self) -> str:
        return f"{self.field}_{self.pair}"

    @property
    def bytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Work:
    """The work of one pair's programs: each loads `bytes_at_once` of the large tensors, `passes` times in sequence."""

    programs: int
    passes: int
    bytes_at_once: int


@dataclass(frozen=True, eq=False)
class KernelSource:
    """A generated kernel: its name, the text of its file, its grid, and its arguments in order.

    Sources compare by identity. The generators return the same object for the same specs, and every launch looks it up.
    """

    name: str
    text: str
    programs: int
    arguments: tuple[Argument, ...]
    config: KernelConfig
    work: tuple[Work, ...] = ()  # one for each pair that the kernel computes
    bodies: int = 0  # bodies in the text: fewer than pairs if some are shared

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    @functools.cached_property
    def parameter_bytes(self) -> int:
        """Return the bytes of kernel parameters, including those that Triton adds."""
        return len(self.arguments) * POINTER_BYTES + HIDDEN_PARAMETER_BYTES

    @property
    def bytes_read(self) -> int:
        """Return the bytes of global memory that are read if every tensor is read once.

        Per-channel vectors are read again, from cache.
        """
        return sum(a.bytes for a in self.arguments if a.access == "read")

    @property
    def bytes_written(self) -> int:
        return sum(a.bytes for a in self.arguments if a.access == "write")

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written


@functools.cache
def _template(name: str, evict: str) -> str:
    """Return the part of a template that generated files contain, with LOADS and STORES replaced by a policy."""
    text = (
        Path(__file__)
        .with_name("templates")
        .joinpath(f"{name}.py")
        .read_text(encoding="utf-8")
        .split(MARK, 1)[1]
        .strip("\n")
    )
    for mark, wanted in (("LOADS", evict != "none"), ("STORES", evict == "loads+stores")):
        text = text.replace(f", eviction_policy={mark}", ', eviction_policy="evict_first"' if wanted else "")
    return text


def in_blocks(indent: int, numel: int, block: int, compute: Callable[[int, int | None], str]) -> str:
    """Return the text that computes one of the blocks of `numel` elements. Only the last is masked.

    Args:
        compute: Returns the text for a block, given the indentation and where the elements end, None if it is full.
    """
    whole, pad = numel // block, " " * indent
    if not numel:
        return ""
    if numel % block == 0:
        return compute(indent, None)
    if numel % 16 == 0 or whole == 0:
        return compute(indent, numel)
    text = f"{pad}if block < {whole}:  # a mask that ends inside 16 bytes would make every access narrow\n"
    return text + compute(indent + 4, None) + f"{pad}else:\n" + compute(indent + 4, numel)


def call(indent: int, function: str, *groups: Sequence[str] | dict[str, object]) -> str:
    """Return the text of a call, one group of arguments a line. Keyword arguments that are None are left out."""
    pad = " " * indent
    lines = []
    for group in groups:
        if isinstance(group, dict):
            group = [f"{key}={value}" for key, value in group.items() if value is not None]
        lines.append(", ".join(group))
    return f"{pad}{function}(\n" + "".join(f"{pad}    {line},\n" for line in lines if line) + f"{pad})\n"


def assemble(
    kind: str,
    pairs: int,
    parts: Sequence[tuple[Leaf, list[Argument]]],
    config: KernelConfig,
) -> KernelSource:
    """Return the generated file: docstring, templates, kernel.

    Args:
        kind: The name of the kernel's template.
        pairs: The number of pairs or sums of the launch.
        parts: The body and the arguments of each that writes something.
    """
    leaves = [leaf for leaf, _ in parts]
    arguments = [argument for _, own in parts for argument in own]
    name = f"{kind}_{pairs}"
    programs = sum(leaf.programs for leaf in leaves)
    branches = branches_of(leaves, config.emit)
    body = tree(branches, 0, 4) if leaves else "    return\n"
    unit = "sum" if kind.startswith("merge") else "pair"
    what = f"{kind} of {pairs} {unit}{'s' * (pairs != 1)}"
    text = (
        f'"""{what} in one launch of {programs} programs of {config.threads} threads.\n\n'
        'Generated by triton_convbn.kernels.codegen. Do not edit.\n"""\n\n'
        "import triton\nimport triton.language as tl\n\n\n"
        + "".join(_template(t, config.evict) + "\n\n\n" for t in ("common", kind))
        + f"@triton.jit\ndef {name}(\n"
        + "".join(f"    {argument.name},\n" for argument in arguments)
        + "):\n    pid = tl.program_id(0)\n"
        + body
    )
    work = tuple(Work(leaf.programs, leaf.passes, leaf.bytes_at_once) for leaf in leaves)
    return KernelSource(name, text, programs, tuple(arguments), config, work, len(branches))


Place = tuple[str, int, int]
"""An argument that is a part of a buffer: its name, the number of the buffer, and where it begins, in elements."""


def buffer_name(number: int) -> str:
    """Return the name of the argument for a buffer."""
    return f"buffer_{number}"


def starts_in_buffer(sizes: Sequence[int]) -> list[int]:
    """Return where vectors of these sizes begin in one buffer, then its size, in elements.

    Vectors begin at multiples of 16 elements, so that Triton still loads 16 bytes at once.
    """
    return list(itertools.accumulate((16 * cdiv(size, 16) for size in sizes), initial=0))


def in_buffers(source: KernelSource, places: Sequence[Place]) -> KernelSource:
    """Return the same kernel with some of its arguments as parts of buffers. It is given each buffer once."""
    numbers = {name: number for name, number, _ in places}
    arguments: dict[str, Argument] = {}
    for each in source.arguments:
        if each.name in numbers:
            each = dataclasses.replace(each, field="buffer", pair=numbers[each.name])
            if (before := arguments.get(each.name)) is not None:
                access = "write" if "write" in (before.access, each.access) else "read"
                each = dataclasses.replace(before, numel=before.numel + each.numel, access=access)
        arguments[each.name] = each
    head, start, rest = source.text.rpartition(f"def {source.name}(\n")
    _, end, body = rest.partition("):\n")
    signature = "".join(f"    {name},\n" for name in arguments)
    parts = "".join(f"    {name} = {buffer_name(number)} + {begin}\n" for name, number, begin in places)
    text = f"{head}{start}{signature}{end}{parts}{body}"
    return dataclasses.replace(source, text=text, arguments=tuple(arguments.values()))


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def offset_type(numel: int, block: int) -> str:
    """Return the offset dtype: 32 bits if the last block, including masked lanes, ends below 2**31 elements."""
    return "tl.int32" if numel + block <= 2**31 else "tl.int64"
