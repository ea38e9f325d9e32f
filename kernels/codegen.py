"""Writes the text of one Triton kernel for a group of pairs: a branch tree on the program id, one body a pair.

The bodies are calls of the functions in the templates, whose text goes ahead of the kernel. Every size is a constant
in the text, and so is every eps: the arguments are pointers, which Triton specialises on 16-byte alignment and nothing
else. As an argument a Python float reaches a compiled kernel as fp32, whatever its annotation says: folds in fp64 were
off by 5e6 ulp on an H200. Why a tree and not selected pointers: at 16 pairs the tree needs 32 registers, selecting 72;
at 53 pairs 39 against 216 (compiled offline for sm_90).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import DEFAULT_CONFIG, KernelConfig
from .spec import HIDDEN_PARAMETER_BYTES, ITEMSIZE, POINTER_BYTES, POWER, GradSpec, PairSpec
from .tree import Leaf, Names, branches_of, tree

__all__ = [
    "DEFAULT_CONFIG",
    "Argument",
    "KernelConfig",
    "KernelSource",
    "Work",
    "generate",
    "generate_fold",
    "generate_fold_backward",
]

MARK = "# ---- copied into generated kernels from here on ----\n"


@dataclass(frozen=True)
class Argument:
    """One kernel argument: the field `field` of pair number `pair`, `numel` elements of `dtype`."""

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
    """What the programs of one pair do: `passes` times in turn, each loads `bytes_at_once` of the large tensors."""

    programs: int
    passes: int
    bytes_at_once: int


@dataclass(frozen=True, eq=False)
class KernelSource:
    """A generated kernel: its name, the whole text of its file, its grid, and its arguments in order.

    Compared by identity: the generators return the same object for the same specs, and a launch looks it up every time.
    """

    name: str
    text: str
    programs: int
    arguments: tuple[Argument, ...]
    config: KernelConfig
    work: tuple[Work, ...] = ()  # of each pair that takes part
    bodies: int = 0  # in the text; fewer than pairs where they are shared

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    @functools.cached_property
    def parameter_bytes(self) -> int:
        """Kernel parameters, those that Triton adds included."""
        return len(self.arguments) * POINTER_BYTES + HIDDEN_PARAMETER_BYTES

    @property
    def bytes_read(self) -> int:
        """Global memory read if every tensor is read once (per-channel vectors are read again, from cache)."""
        return sum(a.bytes for a in self.arguments if a.access == "read")

    @property
    def bytes_written(self) -> int:
        return sum(a.bytes for a in self.arguments if a.access == "write")

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written


@functools.cache
def _template(name: str, evict: str) -> str:
    """What a template file contributes to a generated one. Its LOADS and STORES stand for an eviction policy."""
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


def _call(indent: int, function: str, *groups: Sequence[str] | dict[str, object]) -> str:
    """A call with each group of arguments on a line: pointers, or constants by name without those that are None."""
    pad = " " * indent
    lines = []
    for group in groups:
        if isinstance(group, dict):
            group = [f"{key}={value}" for key, value in group.items() if value is not None]
        lines.append(", ".join(group))
    return f"{pad}{function}(\n" + "".join(f"{pad}    {line},\n" for line in lines if line) + f"{pad})\n"


def _assemble(
    kind: str,
    pairs: int,
    templates: Sequence[str],
    leaves: list[Leaf],
    arguments: list[Argument],
    config: KernelConfig,
) -> KernelSource:
    """The file: what it is, the templates, the kernel."""
    name = f"{kind}_{pairs}"
    programs = sum(leaf.programs for leaf in leaves)
    branches = branches_of(leaves, config.emit)
    body = tree(branches, 0, 4) if leaves else "    return\n"
    what = f"{kind} of {pairs} pair{'s' * (pairs != 1)}"
    text = (
        f'"""{what} in one launch of {programs} programs of {config.threads} threads.\n\n'
        'Written by triton_convbn.kernels.codegen; a change here is overwritten.\n"""\n\n'
        "import triton\nimport triton.language as tl\n\n\n"
        + "".join(_template(t, config.evict) + "\n\n\n" for t in templates)
        + f"@triton.jit\ndef {name}(\n"
        + "".join(f"    {argument.name},\n" for argument in arguments)
        + "):\n    pid = tl.program_id(0)\n"
        + body
    )
    work = tuple(Work(leaf.programs, leaf.passes, leaf.bytes_at_once) for leaf in leaves)
    return KernelSource(name, text, programs, tuple(arguments), config, work, len(branches))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _offset_type(numel: int, block: int) -> str:
    """32-bit offsets while the last block, its masked lanes included, stays below 2**31 elements."""
    return "tl.int32" if numel + block <= 2**31 else "tl.int64"


# ---- forward -------------------------------------------------------------------------------------------------------


def _fold_block(pair: PairSpec, config: KernelConfig) -> int:
    """Elements of a program: a quarter of `config.block` for fp64, one 16-byte load a thread.

    With half of it sm_90 spilled 2 registers, with all of it gfx1100 took 94 (ResNet-50's last 16, compiled offline).
    """
    return max(1, config.block // 4) if "fp64" in (pair.weight, pair.out) else config.block


def _fold_leaf(index: int, pair: PairSpec, config: KernelConfig) -> tuple[Leaf, list[Argument]]:
    """The body of one pair: its weight, block by block, and its biases in the first programs."""
    block, numel, channels = _fold_block(pair, config), pair.numel, pair.channels
    fields = {
        "weight": (pair.weight if numel else None, numel, "read"),
        "bias": (pair.bias, channels, "read"),
        "bn_weight": (pair.bn_weight, channels, "read"),
        "bn_bias": (pair.bn_bias, channels, "read"),
        "running_mean": (pair.running_mean, channels, "read"),
        "running_var": (pair.running_var, channels, "read"),
        "out_weight": (pair.out if numel else None, numel, "write"),
        "out_bias": (pair.out, channels, "write"),
        "out_power": (POWER if pair.prescale else None, channels, "write"),
    }
    arguments = [Argument(index, field, dtype, n, access) for field, (dtype, n, access) in fields.items() if dtype]
    compute = f"tl.float{pair.compute[2:]}"
    whole, weight_blocks, bias_blocks = numel // block, _cdiv(numel, block), _cdiv(channels, block)

    def call(names: Names, *wanted: str) -> list[str]:
        return ["block", *(names.get(field, "None") for field in wanted)]

    def weight_call(indent: int, names: Names, end: int | None) -> str:
        where = pair.channel_map(pair.out_last)
        outer, inner = pair.swap(pair.out_last, pair.weight_last) or (None, None)
        return _call(
            indent,
            "fold_weight",
            call(names, "weight", "bn_weight", "running_var", "out_weight"),
            {
                "CHANNELS": where.channels,
                "INNER": where.inner,
                "GROUP_SPAN": where.group_span,
            },
            {"EPS": pair.eps, "COMPUTE": compute, "OFFSET": _offset_type(numel, block), "BLOCK": block},
            {"END": end, "SWAP_OUTER": outer, "SWAP_INNER": inner},
            {"PRESCALE": True, "bn_bias": names.get("bn_bias")} if pair.prescale else {},
        )

    def body(indent: int, names: Names) -> str:
        pad = " " * indent
        text = ""
        if weight_blocks and whole == weight_blocks:
            text += weight_call(indent, names, None)
        elif weight_blocks and (numel % 16 == 0 or whole == 0):
            text += weight_call(indent, names, numel)
        elif weight_blocks:
            text += f"{pad}if block < {whole}:  # a mask that ends inside 16 bytes would make every access narrow\n"
            text += weight_call(indent + 4, names, None) + f"{pad}else:\n" + weight_call(indent + 4, names, numel)
        guarded = bias_blocks < weight_blocks
        if guarded:
            text += f"{pad}if block < {bias_blocks}:\n"
        return text + _call(
            indent + 4 * guarded,
            "fold_bias",
            call(names, "bias", "bn_weight", "bn_bias", "running_mean", "running_var", "out_bias"),
            {"TOTAL": channels, "EPS": pair.eps, "COMPUTE": compute, "BLOCK": block, "PAIR": index},
            {"out_power": names.get("out_power")},
        )

    # A weight with elements has at least one a channel, so its blocks are enough for the biases.
    names = {a.field: a.name for a in arguments}
    at_once = min(block, numel) * ITEMSIZE[pair.weight]
    return Leaf(index, pair, max(weight_blocks, bias_blocks), names, body, 1, at_once), arguments


@functools.lru_cache(maxsize=1024)
def generate_fold(pairs: tuple[PairSpec, ...], config: KernelConfig = DEFAULT_CONFIG) -> KernelSource:
    """The kernel that folds `pairs` in one launch. Pairs without channels take no part in it."""
    leaves: list[Leaf] = []
    arguments: list[Argument] = []
    for index, pair in enumerate(pairs):
        if pair.channels:
            leaf, own = _fold_leaf(index, pair, config)
            leaves.append(leaf)
            arguments += own
    return _assemble("fold", len(pairs), ["common", "fold"], leaves, arguments, config)


# ---- backward ------------------------------------------------------------------------------------------------------


def _tile(spec: GradSpec, config: KernelConfig) -> tuple[int, int]:
    """(channels, elements of each) that a program holds at a time: powers of two.

    Together `config.block` for 16-bit weights and gradients, half of it for fp32, a quarter for fp64: one 16-byte load
    a thread of the widest. With twice that, ResNet-50's last 16 fp32 pairs took 72 registers on sm_75 instead of 64.
    Where a channel's elements lie together, as many of them as there are. Where channels alternate in memory
    (transposed convolutions), enough channels for 32 neighbouring elements, so that a warp reads whole cache lines;
    `config.rows` bounds the channels of all others.
    """
    pair = spec.pair
    block = max(1, 2 * config.block // max(ITEMSIZE[pair.weight], ITEMSIZE[spec.grad_weight or pair.weight]))
    per_channel = pair.numel // pair.channels
    where = pair.channel_map(pair.weight_last)
    if where.inner not in (1, per_channel):
        # Triton 3.6 lays such a tile out so that a thread holds the addresses of 8 columns, not 2. With all of the
        # block a transposed convolution in fp16 takes 70 registers on sm_90, with half of it 42; on 3.8 48 and 32
        # (compiled offline).
        block = min(block, max(1, config.block // 2))
    rows = 1 if where.inner == per_channel else min(_power_of_two(_cdiv(32, max(1, where.inner))), block)
    cols = min(_power_of_two(per_channel), block // rows)
    most = min(block // cols, _power_of_two(pair.channels))
    return most if config.rows is None else min(most, max(config.rows, rows)), cols


def _backward_leaf(index: int, spec: GradSpec, config: KernelConfig) -> tuple[Leaf, list[Argument]]:
    """The body of one pair: all its channels, ROWS a program."""
    pair, needs = spec.pair, spec.needs
    numel, channels = pair.numel, pair.channels
    grad_weight = spec.grad_weight if spec.reads_weight_grad else None
    grad_bias = spec.grad_bias if spec.reads_bias_grad else None
    scaled = needs.weight or needs.bias
    fields = {
        "grad_weight": (grad_weight, numel, "read"),
        "grad_bias": (grad_bias, channels * spec.bias_rows, "read"),
        "weight": (pair.weight if grad_weight and needs.bn_weight else None, numel, "read"),
        "bias": (pair.bias if grad_bias and needs.bn_weight else None, channels, "read"),
        "bn_weight": (pair.bn_weight if scaled else None, channels, "read"),
        "running_mean": (pair.running_mean if grad_bias and needs.bn_weight else None, channels, "read"),
        "running_var": (pair.running_var if scaled or needs.bn_weight else None, channels, "read"),
        "power": (POWER if pair.prescale and any(needs) else None, channels, "read"),
        "d_weight": (pair.weight if grad_weight and needs.weight else None, numel, "write"),
        "d_bias": (pair.bias if needs.bias else None, channels, "write"),
        "d_bn_weight": (pair.bn_weight if needs.bn_weight else None, channels, "write"),
        "d_bn_bias": (pair.bn_bias if needs.bn_bias else None, channels, "write"),
    }
    arguments = [Argument(index, field, dtype, n, access) for field, (dtype, n, access) in fields.items() if dtype]
    order = (
        "grad_weight", "grad_bias", "weight", "bias", "bn_weight", "running_mean", "running_var",
        "d_weight", "d_bias", "d_bn_weight", "d_bn_bias",
    )  # fmt: skip
    rows, cols = _tile(spec, config)
    bias_cols = min(_power_of_two(spec.bias_rows), max(1, config.block // 4 // rows))

    def body(indent: int, names: Names) -> str:
        where = pair.channel_map(pair.weight_last)
        outer, inner = pair.swap(pair.weight_last, spec.grad_last) or (None, None)
        return _call(
            indent,
            "fold_backward",
            ["block", *(names.get(field, "None") for field in order if not field.startswith("d_"))],
            [names.get(field, "None") for field in order if field.startswith("d_")],
            {
                "TOTAL": channels,
                "CHANNELS": where.channels,
                "INNER": where.inner,
                "GROUP_SPAN": where.group_span,
                "PER_CHANNEL": numel // channels,
            },
            {
                "EPS": pair.eps,
                "COMPUTE": f"tl.float{spec.compute[2:]}",
                "OFFSET": _offset_type(max(numel, channels * spec.bias_rows), rows * max(cols, bias_cols)),
                "ROWS": rows,
                "COLS": cols,
                "PAIR": index,
            },
            {"SWAP_OUTER": outer, "SWAP_INNER": inner},
            {"BIAS_ROWS": spec.bias_rows, "BIAS_COLS": bias_cols} if grad_bias and spec.bias_rows != 1 else {},
            {"power": names.get("power")},
        )

    names = {a.field: a.name for a in arguments}
    read = ITEMSIZE[grad_weight] if grad_weight else 0
    read += ITEMSIZE[pair.weight] if "weight" in names else 0
    per_channel = numel // channels
    at_once = min(rows * cols, rows * per_channel) * read
    return Leaf(index, spec, _cdiv(channels, rows), names, body, max(1, _cdiv(per_channel, cols)), at_once), arguments


@functools.lru_cache(maxsize=1024)
def generate_fold_backward(specs: tuple[GradSpec, ...], config: KernelConfig = DEFAULT_CONFIG) -> KernelSource:
    """The kernel that computes the wanted gradients of `specs` in one launch. Pairs that want none take no part."""
    leaves: list[Leaf] = []
    arguments: list[Argument] = []
    for index, spec in enumerate(specs):
        writes = any((spec.needs.weight and spec.pair.numel, *spec.needs[1:]))
        if spec.pair.channels and writes:
            leaf, own = _backward_leaf(index, spec, config)
            leaves.append(leaf)
            arguments += own
    return _assemble("fold_backward", len(specs), ["common", "fold_backward"], leaves, arguments, config)


# ---- either --------------------------------------------------------------------------------------------------------


def generate(specs: tuple[PairSpec, ...] | tuple[GradSpec, ...], config: KernelConfig = DEFAULT_CONFIG) -> KernelSource:
    """The kernel of one launch, forward or backward by what is described."""
    if specs and isinstance(specs[0], GradSpec):
        return generate_fold_backward(specs, config)
    return generate_fold(specs, config)
