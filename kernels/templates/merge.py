"""Device code of the merged weight of one sum of branches.

    W' = sum_k embed(W_k * s_k) + diag(s_0)

`embed` places a smaller kernel in the middle of the largest one. Source: arXiv 2101.03697, section 3.3. `scales` is
[terms, CHANNELS], a row for each source and a last one for the identity. `out` is dense and walked in its memory order,
contiguous or channels_last. Kernels have three sizes; missing ones are 1. The generated body adds up one call for each
term, so each source is read once and `out` is written once.

This is a template, see common.py.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
import triton
import triton.language as tl

from .common import load_channel, other_layout, store_channels

# ---- copied into generated kernels from here on ----


@triton.jit
def block_elements(block, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    """Return the elements of one block."""
    return block.to(OFFSET) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def column_and_tap(rest, COLUMNS: tl.constexpr, TAPS: tl.constexpr, LAST: tl.constexpr):
    """Return the input channel and the kernel position of element `rest` of a channel."""
    if LAST:
        column, tap = rest % COLUMNS, rest // COLUMNS
    else:
        column, tap = rest // TAPS, rest % TAPS
    return column, tap


@triton.jit
def scaled_source(
    block,
    weight,
    scales,
    ROW: tl.constexpr,  # where the source's scales begin
    COLUMNS: tl.constexpr,
    K0: tl.constexpr,  # the merged kernel
    K1: tl.constexpr,
    K2: tl.constexpr,
    N0: tl.constexpr,  # the source's kernel
    N1: tl.constexpr,
    N2: tl.constexpr,
    LAST: tl.constexpr,  # the source is channels_last
    OUT_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    END: tl.constexpr = None,  # elements of the merged weight; None if the block is full
):
    """Return embed(weight * scale) for the elements of one block."""
    e = block_elements(block, OFFSET, BLOCK)
    mask = None
    if END is not None:
        mask = e < END
    channel = e // (COLUMNS * K0 * K1 * K2)
    s = load_channel(scales + ROW, channel, mask, COMPUTE)
    if K0 == N0 and K1 == N1 and K2 == N2:
        source = e
        if LAST and not OUT_LAST:  # strided loads and not stores: those would write parts of sectors
            source = other_layout(e, COLUMNS, K0 * K1 * K2)
        elif OUT_LAST and not LAST:
            source = other_layout(e, K0 * K1 * K2, COLUMNS)
        value = tl.load(weight + source, mask).to(COMPUTE) * s
    else:
        column, tap = column_and_tap(e % (COLUMNS * K0 * K1 * K2), COLUMNS, K0 * K1 * K2, OUT_LAST)
        t0 = tap // (K1 * K2) - (K0 - N0) // 2
        t1 = tap // K2 % K1 - (K1 - N1) // 2
        t2 = tap % K2 - (K2 - N2) // 2
        inside = (t0 >= 0) & (t0 < N0) & (t1 >= 0) & (t1 < N1) & (t2 >= 0) & (t2 < N2)
        if mask is not None:
            inside = inside & mask
        own = (t0 * N1 + t1) * N2 + t2
        if LAST:
            source = (channel * (N0 * N1 * N2) + own) * COLUMNS + column
        else:
            source = (channel * COLUMNS + column) * (N0 * N1 * N2) + own
        # Not 0 * s outside, which is NaN if the scale is not finite.
        value = tl.where(inside, tl.load(weight + source, inside, other=0.0).to(COMPUTE) * s, 0.0)
    return value


@triton.jit
def scaled_identity(
    block,
    scales,
    ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    OUT_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    END: tl.constexpr = None,
):
    """Return diag(scale) for the elements of one block: channel c reads input channel c mod COLUMNS, at the centre."""
    e = block_elements(block, OFFSET, BLOCK)
    channel = e // (COLUMNS * TAPS)
    column, tap = column_and_tap(e % (COLUMNS * TAPS), COLUMNS, TAPS, OUT_LAST)
    on = (column == channel % COLUMNS) & (tap == TAPS // 2)
    if END is not None:
        on = on & (e < END)
    return tl.where(on, load_channel(scales + ROW, channel, on, COMPUTE), 0.0)


@triton.jit
def store_merged(
    block,
    value,
    out,
    COMPUTE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIR: tl.constexpr,
    END: tl.constexpr = None,
):
    """Store the sum of the terms, rounded once."""
    mask = None
    if END is not None:
        mask = block_elements(block, OFFSET, BLOCK) < END
    store_channels(out, block.to(OFFSET), value, mask, COMPUTE, BLOCK, PAIR)
