"""Microseconds that a launch would take, modelled from what the compiler made of it. Nothing here was measured.

A fold streams: it reads every weight once and writes it once, so the least time is that of its bytes. What keeps it
from that, each a time of its own:

    memory    all bytes, those of the code included, at the bandwidth of the device
    latency   Little's law: a resident program lives SETUP and then LATENCY for each of its passes, and only so many are
              resident: as registers, warps, blocks and shared memory of a multiprocessor allow. In waves: the last one
              takes as long as a full one. A pass that loads more than its registers can hold is more passes
    balance   the bytes of the multiprocessor with the most programs, at what one can draw
    issue     instructions, a warp's each cycle of a scheduler; wider loads are fewer instructions
    loads     cycles of the load and store unit: one for 32 lanes of up to 32 bits, more in proportion for wider ones

They overlap, though not wholly: together they take the 4-norm, which lies between the longest and their sum, and gets
longer with each. To that come LAUNCH for each launch of the call, and LATENCY until the first bytes are there.

The model orders configurations of one problem. It does not know: caches, other work on the device, clocks that fall,
eviction hints, how evenly channels of memory are used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.codegen import KernelSource
from ..kernels.offline import KernelFacts
from .archs import Arch

# Assumptions, of the order that microbenchmarks of such devices find, the same for all of them:
LAUNCH = 2.0  # us from one launch to the next, on a stream that is kept fed
LATENCY = 0.6  # us from a load to its bytes, memory busy
SETUP = 0.3  # us of a program before its first load: its start, its parameters, the branch tree
SM_BYTES = 64  # a cycle, what one multiprocessor draws from L2
RESERVED = 16  # registers of a thread that hold addresses and the like, not bytes in flight
NORM = 4


@dataclass(frozen=True)
class Modelled:
    """A modelled launch, times in us. waves: of programs, the last one counted by its share."""

    us: float
    memory: float
    latency: float
    balance: float
    issue: float
    loads: float
    occupancy: float  # warps that can be resident, of those that a multiprocessor has room for
    resident: int  # programs at once on the device
    waves: float
    bytes: int
    bytes_in_flight: int
    share_of_bandwidth: float  # of the bandwidth limit: the time that its bytes need at least, over `us`


def blocks_resident(facts: KernelFacts, arch: Arch) -> int:
    """Programs of a kernel that fit on a multiprocessor at once; 0: not even one."""
    a_warp = -(-max(1, facts.registers) * arch.warp // arch.register_unit) * arch.register_unit
    by_registers = arch.schedulers * (arch.registers // a_warp)
    blocks = min(arch.blocks, min(arch.warps, by_registers) // facts.warps)
    return min(blocks, arch.shared // facts.shared_bytes) if facts.shared_bytes else blocks


def over_limit(facts: KernelFacts, arch: Arch) -> str | None:
    """Which limit of the architecture a kernel exceeds, in words."""
    for what, value, limit in (
        ("registers a thread", facts.registers, arch.thread_registers),
        ("threads a block", facts.warps * arch.warp, arch.threads),
        ("bytes of shared memory", facts.shared_bytes, arch.shared_block),
    ):
        if value > limit:
            return f"{value} {what}, {arch.name} has {limit}"
    if not blocks_resident(facts, arch):
        return f"no program fits on a multiprocessor of {arch.name}: {facts.registers} registers, {facts.warps} warps"
    return None


def modelled(source: KernelSource, facts: KernelFacts, arch: Arch) -> Modelled:
    """The time of one launch. The kernel is within the limits and does not spill, see `over_limit`."""
    resident_limit = blocks_resident(facts, arch) * arch.multiprocessors
    programs = sum(work.programs for work in source.work)
    total = facts.bytes_read + facts.bytes_written + facts.instructions * arch.instruction_bytes
    resident = min(programs, resident_limit)
    waves = programs / resident_limit
    threads = facts.warps * arch.warp
    room = threads * 4 * max(1, facts.registers - RESERVED)

    lives = [SETUP + LATENCY * work.passes * -(-max(1, work.bytes_at_once) // room) for work in source.work]
    mean_life = sum(life * work.programs for life, work in zip(lives, source.work, strict=True)) / programs
    latency = max(mean_life * -(-programs // resident_limit), *lives)

    cycles = arch.multiprocessors * arch.clock * 1e3  # a us, of all multiprocessors
    busiest = -(-programs // arch.multiprocessors)
    balance = total / programs * busiest / (SM_BYTES * arch.clock * 1e3)

    # A body's share of the code runs as often as its loads have to be repeated for what a program streams.
    streamed = sum(work.passes * work.bytes_at_once for work in source.work) / len(source.work) / threads
    in_code = sum(bits / 8 * count for bits, count in facts.loads.items()) / source.bodies
    runs = programs * facts.warps * max(1.0, streamed / max(1.0, in_code)) / source.bodies
    issue = runs * facts.instructions / (arch.schedulers * cycles)
    wide = [(bits, count) for by_width in (facts.loads, facts.stores) for bits, count in by_width.items()]
    loads = runs * sum(count * max(1, bits / 32) * arch.warp / 32 for bits, count in wide) / cycles

    memory = total / (arch.bandwidth * 1e3)
    together = sum(t**NORM for t in (memory, latency, balance, issue, loads)) ** (1 / NORM)
    us = LAUNCH + LATENCY + together
    return Modelled(
        us=us,
        memory=memory,
        latency=latency,
        balance=balance,
        issue=issue,
        loads=loads,
        occupancy=blocks_resident(facts, arch) * facts.warps / arch.warps,
        resident=resident,
        waves=waves,
        bytes=total,
        bytes_in_flight=int(resident * min(room, _mean([(w.bytes_at_once, w.programs) for w in source.work]))),
        share_of_bandwidth=(facts.bytes_read + facts.bytes_written) / (arch.bandwidth * 1e3) / us,
    )


def _mean(weighted: Sequence[tuple[float, int]]) -> float:
    return sum(value * weight for value, weight in weighted) / sum(weight for _, weight in weighted)
