"""Device code that forward and backward share.

The files of this folder are templates: `kernel_source.py` copies what follows the mark into generated kernels, so that
a generated file can be read, hashed and run by itself. They are also ordinary modules, for linters and readers. A
pointer is None if the pair has no such parameter.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
import triton
import triton.language as tl

# ---- copied into generated kernels from here on ----


@triton.jit
def load_channel(pointer, channel, mask, COMPUTE: tl.constexpr):
    """Load one element for each channel, or 1 where the mask is off, so that no lane divides by zero."""
    if mask is None:
        return tl.load(pointer + channel).to(COMPUTE)
    else:  # noqa: RET505 - without the else Triton compiles both returns, whose types differ
        return tl.load(pointer + channel, mask, other=1.0).to(COMPUTE)


@triton.jit
def rounded(value, pointer, COMPUTE: tl.constexpr):
    """Return `value` in the dtype of `pointer`, rounded once. fp64 is converted to 16 bits by way of fp32."""
    if COMPUTE is tl.float64 and pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)  # the interpreter cannot convert fp64 to bf16
    return value.to(pointer.dtype.element_ty)


@triton.jit
def store_channels(pointer, block, value, mask, COMPUTE: tl.constexpr, SIZE: tl.constexpr, PAIR: tl.constexpr):
    """Store pointer[block * SIZE + i] = value[i], with a range and an address that no other pair of the group has.

    Otherwise pairs of one shape end in equal blocks of code. MLIR merges those, and the code before them, into one body
    with selected pointers, first in Triton's dialect (the range prevents it) and again in LLVM's (the address prevents
    it). On sm_90 ResNet-50's first 16 pairs take 72 registers merged and 32 apart, all 53 take 216 and 39 (compiled
    offline); on gfx942 all 53 merged spill 2327. For AMD Triton 3.6 merges them anyway, and ResNet-50's last 16 spill
    170 scalar registers; an assembly comment that names the pair prevents that.
    """
    i = block * SIZE + tl.arange(PAIR * SIZE, (PAIR + 1) * SIZE)
    if tl.target_info.is_hip():
        value = tl.inline_asm_elementwise(f"; pair {PAIR}", "=v,0", [value], value.dtype, is_pure=True, pack=1)
    tl.store(pointer - PAIR * SIZE + i, rounded(value, pointer, COMPUTE), mask)


@triton.jit
def inverse_deviation(channel, mask, running_var, EPS: tl.constexpr, COMPUTE: tl.constexpr):
    """Return rsqrt(var + eps), by the same approximate instruction that torch.rsqrt and Inductor use on a GPU."""
    return tl.rsqrt(load_channel(running_var, channel, mask, COMPUTE) + tl.full([], EPS, COMPUTE))


@triton.jit
def prescale(s, channel, mask, bn_bias):
    """Return q in fp32: the smallest power of two, from 2**-14 to 2**15, with |s / q| <= 1/2 and |bn_bias / q| <= 1024.

    It is rounded up by integer arithmetic on its bits. The cast and fold of ResNet-50's last 16 pairs take 3,500
    instructions on sm_90 that way, 13,200 with log2 and exp2, and 2,000 without prescale (compiled offline).
    """
    least = tl.maximum(tl.abs(s).to(tl.float32) * 2, 2.0**-14)
    if bn_bias is not None:
        least = tl.maximum(least, tl.abs(load_channel(bn_bias, channel, mask, tl.float32)) * 2.0**-10)
    bits = tl.minimum(least, 2.0**15).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(q):
    """Return 1 / q of a power of two, exactly, by negating its exponent."""
    return (0x7F000000 - q.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def other_layout(e, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Return the offset of element `e` of a dense [.., OUTER, INNER] tensor in one stored as [.., INNER, OUTER]."""
    rest = e // INNER
    return ((rest // OUTER) * INNER + e % INNER) * OUTER + rest % OUTER
