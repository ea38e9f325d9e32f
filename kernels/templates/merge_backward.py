"""Device code of the gradients of one sum of branches, from `grad` (dW').

    dW_k = crop_k(dW') * s_k     ds_k = sum_over_channel(crop_k(dW') * W_k)     ds_0 = diagonal of dW' at the centre

`scales` and `d_scales` are [terms, TOTAL], see merge.py. A program owns ROWS whole channels of all sources. It walks
one source after another in the memory order of that source, WIDTH elements of each channel at a time, and reads the
same channels of dW' again, from cache: one sum for each source at the same time would take a register for each element.
No two programs add to the same element, so there are no atomics and results are deterministic.

This is a template, see common.py. An output is None if it is not needed; inputs that only it needs are not read.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
import triton
import triton.language as tl

from .common import load_channel, rounded, store_channels

# ---- copied into generated kernels from here on ----


@triton.jit
def source_gradients(
    block,
    grad,
    weight,
    scales,
    d_weight,
    d_scales,
    ROW: tl.constexpr,  # where the source's scales begin
    TOTAL: tl.constexpr,  # channels
    COLUMNS: tl.constexpr,
    K0: tl.constexpr,  # the merged kernel
    K1: tl.constexpr,
    K2: tl.constexpr,
    N0: tl.constexpr,  # the source's kernel
    N1: tl.constexpr,
    N2: tl.constexpr,
    LAST: tl.constexpr,  # the source is channels_last
    GRAD_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Compute the gradients of one source, for ROWS channels."""
    channel = block * ROWS + tl.arange(0, ROWS)
    exists = None
    if TOTAL % ROWS != 0:
        exists = channel < TOTAL
    if d_weight is not None:
        s = load_channel(scales + ROW, channel, exists, COMPUTE)
    wide = channel.to(OFFSET)[:, None]
    partial = tl.full([ROWS, WIDTH], 0.0, COMPUTE)
    stop = COLUMNS * N0 * N1 * N2
    if COLUMNS * N0 * N1 * N2 > WIDTH and tl.target_info.is_hip():
        stop += tl.program_id(1)  # adds 0, see fold_backward.py
    for start in range(0, stop, WIDTH):
        i = (start + tl.arange(0, WIDTH))[None, :]
        mask = None
        if TOTAL % ROWS != 0 or COLUMNS * N0 * N1 * N2 % WIDTH != 0:
            mask = (channel[:, None] < TOTAL) & (i < COLUMNS * N0 * N1 * N2)
        e = wide * (COLUMNS * N0 * N1 * N2) + i
        at = i
        if K0 != N0 or K1 != N1 or K2 != N2 or LAST != GRAD_LAST:
            if LAST:
                column, own = i % COLUMNS, i // COLUMNS
            else:
                column, own = i // (N0 * N1 * N2), i % (N0 * N1 * N2)
            t0 = own // (N1 * N2) + (K0 - N0) // 2
            t1 = own // N2 % N1 + (K1 - N1) // 2
            t2 = own % N2 + (K2 - N2) // 2
            tap = (t0 * K1 + t1) * K2 + t2
            at = tap * COLUMNS + column if GRAD_LAST else column * (K0 * K1 * K2) + tap
        source = wide * (COLUMNS * K0 * K1 * K2) + at
        g = tl.load(grad + source).to(COMPUTE) if mask is None else tl.load(grad + source, mask, other=0.0).to(COMPUTE)
        if d_weight is not None:
            tl.store(d_weight + e, rounded(g * s[:, None], d_weight, COMPUTE), mask)
        if d_scales is not None:
            if mask is None:
                partial += g * tl.load(weight + e).to(COMPUTE)
            else:
                partial += g * tl.load(weight + e, mask, other=0.0).to(COMPUTE)
    if d_scales is not None:
        # Not tl.sum, see fold_backward.py.
        ds = tl.reduce(partial, 1, tl.standard._sum_combine)
        store_channels(d_scales + ROW, block, ds, exists, COMPUTE, ROWS, PAIR)


@triton.jit
def identity_gradient(
    block,
    grad,
    d_scales,
    ROW: tl.constexpr,
    TOTAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    GRAD_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Compute the gradient of the identity's scale, for ROWS channels."""
    channel = block * ROWS + tl.arange(0, ROWS)
    exists = None
    if TOTAL % ROWS != 0:
        exists = channel < TOTAL
    at = TAPS // 2 * COLUMNS + channel % COLUMNS if GRAD_LAST else channel % COLUMNS * TAPS + TAPS // 2
    g = load_channel(grad, channel.to(OFFSET) * (COLUMNS * TAPS) + at, exists, COMPUTE)
    store_channels(d_scales + ROW, block, g, exists, COMPUTE, ROWS, PAIR)
