"""The gradients of one pair's fold on the device, from `grad_weight` (dW') and `grad_bias` (db').

    s = gamma * rsqrt(var + eps)     dW = dW' * s     db = db' * s     d_beta = db'
    ds = sum_over_channel(dW' * W) + db' * (b - mean)     d_gamma = ds * rsqrt(var + eps)

Where the fold was over powers of two q, so are dW, db, d_beta and d_gamma; q itself is a constant.

Shapes: `weight`, `grad_weight` and `d_weight` are dense and walked in the weight's memory order; every other pointer
is one number a channel, or of `grad_bias` BIAS_ROWS of them to be summed. Element `i` of the PER_CHANNEL elements of
channel `c` lies at

    (c // CHANNELS) * GROUP_SPAN + (i // INNER) * CHANNELS * INNER + (c % CHANNELS) * INNER + i % INNER

the inverse of `channel(e)` in template_fold.py. A program owns ROWS whole channels and loops over their elements,
COLS at a time; no two programs add to the same number, so there are no atomics and every run gives the same bits.

On AMD the loop's end is not a constant: LLVM unrolls the loop otherwise and moves the loads of all iterations ahead of
the first use, for up to 93 registers in a group of 16 pairs (gfx1100, fp64) where the loop takes 19 (compiled offline).
These do not stop it: `tl.range` with loop_unroll_factor=1 or num_stages=1, or `while` (no change); disable_licm (80);
waves_per_eu=8 (150, or spills); the function attribute amdgpu-unroll-threshold (85). Asking for two or four iterations
at once, loop_unroll_factor on the loop as it is, takes 58 or 77. For NVIDIA the end stays a constant: LLVM unrolls a
loop of unknown length too, with a tail, for up to 1.7 times the instructions and 4 spills on sm_90.

A template, see template_common.py. An output that is None is not wanted, and what only it needs is not read.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
import triton
import triton.language as tl

from .common import inverse_deviation, load_channel, other_layout, rounded, store_channels

LOADS = STORES = tl.constexpr("")  # `generate.py` puts the policies here, or nothing

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
    SWAP_OUTER: tl.constexpr = None,  # the two innermost sizes of the weight,
    SWAP_INNER: tl.constexpr = None,  # where grad_weight has them the other way round
    BIAS_ROWS: tl.constexpr = 1,  # grad_bias is the sum of so many rows of TOTAL,
    BIAS_COLS: tl.constexpr = 1,  # read so many at a time
    power=None,  # q, where the fold was over it
):
    """Every wanted gradient of ROWS channels."""
    channel = block * ROWS + tl.arange(0, ROWS)
    exists = None
    if TOTAL % ROWS != 0:
        exists = channel < TOTAL
    ds = tl.full([ROWS], 0.0, COMPUTE)

    if power is not None:
        q = load_channel(power, channel, exists, COMPUTE)
    if running_var is not None:  # None where only d_bn_bias is wanted
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
            # Adds 0, which LLVM cannot know: of a known end it unrolls the loop and, on AMD, loads all of it first.
            stop += tl.program_id(1)
        for start in range(0, stop, COLS):
            i = start + tl.arange(0, COLS)
            step = i.to(OFFSET)
            if PER_CHANNEL != INNER:  # otherwise a channel is one run; `i % INNER` would hide that from the compiler
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
            # Not tl.sum: that is a jitted function of its own, fixed as interpreted or compiled when Triton was
            # imported, and this may be loaded either way later. The interpreter knows this combine by identity.
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
