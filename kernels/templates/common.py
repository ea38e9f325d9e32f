"""What both directions need of a channel on the device: its scale, and where an element lies in another layout.

The three `template_*.py` files are templates: `generate.py` copies what follows the mark into the kernels it writes, so
that a generated file can be read, hashed and run by itself. They are ordinary modules all the same, for linters and
readers. A pointer that is None is a parameter that the pair does not have.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
import triton
import triton.language as tl

# ---- copied into generated kernels from here on ----


@triton.jit
def load_channel(pointer, channel, mask, COMPUTE: tl.constexpr):
    """One number a channel; 1 where the mask is off, so that no lane divides by zero."""
    if mask is None:
        return tl.load(pointer + channel).to(COMPUTE)
    else:  # noqa: RET505 - without the else Triton would compile both returns and want their types to agree
        return tl.load(pointer + channel, mask, other=1.0).to(COMPUTE)


@triton.jit
def rounded(value, pointer, COMPUTE: tl.constexpr):
    """`value` in the dtype that `pointer` points to, rounded once; fp64 reaches 16 bits by way of fp32."""
    if COMPUTE is tl.float64 and pointer.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)  # the interpreter has no fp64 to bf16
    return value.to(pointer.dtype.element_ty)


@triton.jit
def store_channels(pointer, block, value, mask, COMPUTE: tl.constexpr, SIZE: tl.constexpr, PAIR: tl.constexpr):
    """pointer[block * SIZE + i] = value[i], by way of a range and an address that no other pair of the group has.

    Pairs of one shape would otherwise end in equal blocks of code, and MLIR merges those, and then what leads to them,
    into one body with selected pointers: in Triton's dialect (the range keeps them apart) and again in LLVM's (the
    address does). On sm_90 ResNet-50's first 16 pairs take 72 registers merged and 32 apart, all 53 take 216 and 39
    (compiled offline); on gfx942 all 53 merged spill 2327. For AMD Triton 3.6 merges them all the same, and ResNet-50's
    last 16 spill 170 scalar registers; a comment in assembly that names the pair keeps them apart.
    """
    i = block * SIZE + tl.arange(PAIR * SIZE, (PAIR + 1) * SIZE)
    if tl.target_info.is_hip():
        value = tl.inline_asm_elementwise(f"; pair {PAIR}", "=v,0", [value], value.dtype, is_pure=True, pack=1)
    tl.store(pointer - PAIR * SIZE + i, rounded(value, pointer, COMPUTE), mask)


@triton.jit
def inverse_deviation(channel, mask, running_var, EPS: tl.constexpr, COMPUTE: tl.constexpr):
    """rsqrt(var + eps). On a GPU this is the same approximate instruction that torch.rsqrt and Inductor use."""
    return tl.rsqrt(load_channel(running_var, channel, mask, COMPUTE) + tl.full([], EPS, COMPUTE))


@triton.jit
def prescale(s, channel, mask, bn_bias):
    """The power of two q in fp32, from 2**-14 to 2**15, that a fold with this scale is over: the smallest with
    |s / q| <= 1/2 and |bn_bias / q| <= 1024.

    Rounded up in its bits: with log2 and exp2 a cast and fold of ResNet-50's last 16 pairs is 13,200 instructions on
    sm_90, so 3,500, without prescale 2,000 (compiled offline); they are spent on every element.
    """
    least = tl.maximum(tl.abs(s).to(tl.float32) * 2, 2.0**-14)
    if bn_bias is not None:
        least = tl.maximum(least, tl.abs(load_channel(bn_bias, channel, mask, tl.float32)) * 2.0**-10)
    bits = tl.minimum(least, 2.0**15).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(q):
    """1 / q of a power of two, exactly: its exponent negated."""
    return (0x7F000000 - q.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def other_layout(e, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Where element `e` of a dense [.., OUTER, INNER] tensor lies in the one stored as [.., INNER, OUTER]."""
    rest = e // INNER
    return ((rest // OUTER) * INNER + e % INNER) * OUTER + rest % OUTER
