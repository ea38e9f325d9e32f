"""Device code of the gradients of one fold, from `grad_weight` (dW') and `grad_bias` (db').

    s = bn_weight * rsqrt(var + eps)     dW = dW' * s     db = db' * s     d_bn_bias = db'
    ds = sum_over_channel(dW' * W) + db' * (b - mean)     d_bn_weight = ds * rsqrt(var + eps)

With prescale, all four gradients are divided by q, which is a constant here.

`weight`, `grad_weight` and `d_weight` are dense and walked in the weight's memory order. Every other pointer has one
element for each channel; `grad_bias` may have BIAS_ROWS such rows, which are summed. Element `i` of the PER_CHANNEL
elements of channel `c` is at

    (c // CHANNELS) * GROUP_SPAN + (i // INNER) * CHANNELS * INNER + (c % CHANNELS) * INNER + i % INNER

which is the inverse of `channel(e)` in fold.py. A program owns ROWS whole channels and loops over their elements, COLS
at a time. No two programs add to the same element, so there are no atomics and results are deterministic.

On AMD the end of the loop is not a constant. Otherwise LLVM unrolls the loop and moves all loads ahead of the first
use, which takes up to 93 registers in a group of 16 pairs (gfx1100, fp64) where the loop takes 19 (compiled offline).
These do not prevent it: `tl.range` with loop_unroll_factor=1 or num_stages=1, or `while` (no change); disable_licm
(80); waves_per_eu=8 (150, or spills); the function attribute amdgpu-unroll-threshold (85). Unrolling the loop by two or
four takes 58 or 77. On NVIDIA the end is a constant: LLVM also unrolls loops of unknown length, with a remainder, which
takes up to 1.7 times the instructions and 4 spills on sm_90.

This is a template, see common.py. An output is None if it is not needed; inputs that only it needs are not read.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
import triton
import triton.language as tl

from .common import inverse_deviation, load_channel, other_layout, rounded, store_channels

LOADS = STORES = tl.constexpr("")  # replaced by policies, or removed, see `kernel_source.py`

# ---- copied into generated kernels from here on ----


@triton.jit
def fold_backward(
    block,
    grad_weight,
    grad_bias,
    weight,
    bias,
    bn_weight,
    running_mean,
    running_var,
    d_weight,
    d_bias,
    d_bn_weight,
    d_bn_bias,
    TOTAL: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP_SPAN: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    EPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PAIR: tl.constexpr,
    SWAP_OUTER: tl.constexpr = None,  # the two innermost sizes of the weight
    SWAP_INNER: tl.constexpr = None,  # if grad_weight swaps them
    BIAS_ROWS: tl.constexpr = 1,  # rows of TOTAL elements in grad_bias, to be summed
    BIAS_COLS: tl.constexpr = 1,  # rows read at a time
    power=None,  # q, if the fold was divided by it
):
    """Compute the needed gradients of ROWS channels."""
    channel = block * ROWS + tl.arange(0, ROWS)
    exists = None
    if TOTAL % ROWS != 0:
        exists = channel < TOTAL
    ds = tl.full([ROWS], 0.0, COMPUTE)

    if power is not None:
        q = load_channel(power, channel, exists, COMPUTE)
    if running_var is not None:  # None if only d_bn_bias is needed
        deviation = inverse_deviation(channel, exists, running_var, EPS, COMPUTE)
        if power is not None:
            deviation /= q
        s = deviation
        if bn_weight is not None:
            s *= load_channel(bn_weight, channel, exists, COMPUTE)

    if grad_weight is not None:
        first = channel.to(OFFSET) * INNER
        if GROUP_SPAN != CHANNELS * INNER:
            wide = channel.to(OFFSET)
            first = (wide // CHANNELS) * GROUP_SPAN + (wide % CHANNELS) * INNER
        partial = tl.full([ROWS, COLS], 0.0, COMPUTE)
        stop = PER_CHANNEL
        if PER_CHANNEL > COLS and tl.target_info.is_hip():
            # Adds 0, but hides the end from LLVM, which would unroll the loop and load all of it first.
            stop += tl.program_id(1)
        for start in range(0, stop, COLS):
            i = start + tl.arange(0, COLS)
            step = i.to(OFFSET)
            if PER_CHANNEL != INNER:  # otherwise a channel is contiguous, which `i % INNER` would hide
                step = (step // INNER) * (CHANNELS * INNER) + step % INNER
            e = first[:, None] + step[None, :]
            mask = None
            if TOTAL % ROWS != 0 or PER_CHANNEL % COLS != 0:
                mask = (channel[:, None] < TOTAL) & (i[None, :] < PER_CHANNEL)
            source = e
            if SWAP_INNER is not None:
                source = other_layout(e, SWAP_OUTER, SWAP_INNER)
            if mask is None:
                g = tl.load(grad_weight + source, eviction_policy=LOADS).to(COMPUTE)
            else:
                g = tl.load(grad_weight + source, mask, other=0.0, eviction_policy=LOADS).to(COMPUTE)
            if d_weight is not None:
                tl.store(d_weight + e, rounded(g * s[:, None], d_weight, COMPUTE), mask, eviction_policy=STORES)
            if d_bn_weight is not None:
                if mask is None:
                    partial += g * tl.load(weight + e, eviction_policy=LOADS).to(COMPUTE)
                else:
                    partial += g * tl.load(weight + e, mask, other=0.0, eviction_policy=LOADS).to(COMPUTE)
        if d_bn_weight is not None:
            # Not tl.sum: it is a jitted function, interpreted or compiled as set when Triton was imported, and this
            # file may be loaded either way later. The interpreter recognizes this combine function by identity.
            ds = tl.reduce(partial, 1, tl.standard._sum_combine)

    if grad_bias is not None:
        if BIAS_ROWS == 1:
            gb = load_channel(grad_bias, channel, exists, COMPUTE)
        else:
            sums = tl.full([ROWS, BIAS_COLS], 0.0, COMPUTE)
            for start in range(0, BIAS_ROWS, BIAS_COLS):
                row = start + tl.arange(0, BIAS_COLS)
                there = (channel[:, None] < TOTAL) & (row[None, :] < BIAS_ROWS)
                at = channel[:, None].to(OFFSET) + row[None, :].to(OFFSET) * TOTAL
                sums += tl.load(grad_bias + at, there, other=0.0, eviction_policy=LOADS).to(COMPUTE)
            gb = tl.reduce(sums, 1, tl.standard._sum_combine)
        if d_bn_weight is not None:
            centred = -load_channel(running_mean, channel, exists, COMPUTE)
            if bias is not None:
                centred += load_channel(bias, channel, exists, COMPUTE)
            ds += gb * centred
        if d_bias is not None:
            store_channels(d_bias, block, gb * s, exists, COMPUTE, ROWS, PAIR)
        if d_bn_bias is not None:
            if power is not None:
                gb /= q
            store_channels(d_bn_bias, block, gb, exists, COMPUTE, ROWS, PAIR)
    if d_bn_weight is not None:
        store_channels(d_bn_weight, block, ds * deviation, exists, COMPUTE, ROWS, PAIR)
