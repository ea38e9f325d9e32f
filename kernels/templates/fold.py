"""Device code of the fold of one pair.

    s = bn_weight * rsqrt(var + eps)     W' = W * s     b' = (b - mean) * s + bn_bias

Source: "Tune mode" of arXiv 2305.11624. With prescale, W' and b' are divided by powers of two q, which are computed and
written here, so that fp16 can hold them.

`weight` and `out_weight` are dense and walked in the output's memory order. Every other pointer has one element for
each channel. Element `e` of a weight belongs to

    channel(e) = (e // GROUP_SPAN) * CHANNELS + (e // INNER) % CHANNELS

This holds for convolutions, linear layers and grouped transposed convolutions, contiguous or channels_last. So the
walk does not depend on the shape, and loads and stores are 16 bytes wide for every shape.

This is a template, see common.py.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
import triton
import triton.language as tl

from .common import inverse_deviation, load_channel, other_layout, prescale, reciprocal, rounded, store_channels

LOADS = tl.constexpr("")  # replaced by a policy, or removed, see `kernel_source.py`

# ---- copied into generated kernels from here on ----


@triton.jit
def bn_scale(channel, mask, bn_weight, running_var, EPS: tl.constexpr, COMPUTE: tl.constexpr):
    """Return s = bn_weight * rsqrt(var + eps)."""
    s = inverse_deviation(channel, mask, running_var, EPS, COMPUTE)
    if bn_weight is not None:
        s *= load_channel(bn_weight, channel, mask, COMPUTE)
    return s


@triton.jit
def fold_weight(
    block,
    weight,
    bn_weight,
    running_var,
    out_weight,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP_SPAN: tl.constexpr,
    EPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    END: tl.constexpr = None,  # elements of the weight; None if the block is full
    SWAP_OUTER: tl.constexpr = None,  # the two innermost sizes of the output
    SWAP_INNER: tl.constexpr = None,  # if the input swaps them
    PRESCALE: tl.constexpr = False,  # divide by q
    bn_bias=None,  # read with PRESCALE only
):
    """Compute out_weight[e] = weight[e] * s[channel(e)] for the elements of one block."""
    e = block.to(OFFSET) * BLOCK + tl.arange(0, BLOCK)
    mask = None
    if END is not None:
        mask = e < END
    channel = e // INNER
    if GROUP_SPAN != CHANNELS * INNER:  # otherwise this changes nothing
        channel = channel % CHANNELS + (e // GROUP_SPAN) * CHANNELS
    source = e
    if SWAP_INNER is not None:  # strided loads and not stores: those would write parts of sectors
        source = other_layout(e, SWAP_OUTER, SWAP_INNER)
    w = tl.load(weight + source, mask, eviction_policy=LOADS).to(COMPUTE)
    s = bn_scale(channel, mask, bn_weight, running_var, EPS, COMPUTE)
    if PRESCALE:
        s *= reciprocal(prescale(s, channel, mask, bn_bias))
    tl.store(out_weight + e, rounded(w * s, out_weight, COMPUTE), mask)


@triton.jit
def fold_bias(
    block,
    bias,
    bn_weight,
    bn_bias,
    running_mean,
    running_var,
    out_bias,
    TOTAL: tl.constexpr,
    EPS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIR: tl.constexpr,
    out_power=None,  # q, if W' and b' are divided by it
):
    """Compute out_bias[c] = (bias[c] - mean[c]) * s[c] + bn_bias[c] for one block of the TOTAL channels, and q.

    Either output may be None.
    """
    channel = block * BLOCK + tl.arange(0, BLOCK)
    mask = channel < TOTAL
    if out_bias is not None:
        b = -load_channel(running_mean, channel, mask, COMPUTE)
        if bias is not None:
            b += load_channel(bias, channel, mask, COMPUTE)
    s = bn_scale(channel, mask, bn_weight, running_var, EPS, COMPUTE)
    if out_bias is not None:
        b *= s
        if bn_bias is not None:
            b += load_channel(bn_bias, channel, mask, COMPUTE)
    if out_power is not None:  # after the bias: before it, fp16 took 40 registers instead of 32 on sm_90
        q = prescale(s, channel, mask, bn_bias)
        if out_bias is not None:
            b *= reciprocal(q)
        tl.store(out_power + channel, q.to(out_power.dtype.element_ty), mask)
    if out_bias is not None:
        store_channels(out_bias, block, b, mask, COMPUTE, BLOCK, PAIR)
