"""What every kernel of this folder narrows, multiplies and asks about the interpreter with."""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

# Fixed when this module is imported, as triton decides at decoration: kernels of one process are all interpreted or
# all compiled.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)
# Both halves of a product of 32 by 32 bits in one instruction.
_PRODUCT = tl.constexpr("{ .reg .b64 product; mul.wide.u32 product, $2, $3; mov.b64 {$1, $0}, product; }")
# The sign of bytes 1 and 3 over the halves that they end.
_SPREAD_SIGNS = tl.constexpr("prmt.b32 $0, $1, 0, 0xbb99;")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x in ``dtype``, rounded to nearest even.

    The interpreter's own float32 -> bfloat16 truncates, so there the rounding is done on the bits; a NaN keeps its
    sign and payload's upper half and stays a NaN.
    """
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(x == x, rounded, bits | 0x00400000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def widen(x):
    """x of any floating dtype in float32, exactly; the interpreter's own widening spoils bfloat16 denormals."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def convert(x, dtype: tl.constexpr):
    """x of any floating dtype in ``dtype``, by way of float32, which holds both 16-bit types exactly."""
    if x.dtype == dtype:
        return x
    else:
        return narrow(widen(x), dtype)


@triton.jit
def multiply_add(a, b, accumulator):
    """accumulator + a b, in float32. float32 operands are multiplied in float32, never in tf32, which is tl.dot's
    default.

    The interpreter's tl.dot of bfloat16 is silently wrong (relative error 1e10, triton 3.6 to 3.9): there the operands
    are widened, which changes no product.
    """
    if _INTERPRETED:
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def multiply_add_in(a, b, accumulator, COMPUTE: tl.constexpr):
    """accumulator + a b of operands rounded to COMPUTE, in float32.

    Where COMPUTE is float32 and an operand of two bytes meets one of its own kind, or bfloat16 meets float32, no product is another one
    on tensor cores, which are some fifteen times as fast: a float32 b is the sum of three bfloat16, to the bit down to 2 ** -117.
    """
    if COMPUTE == tl.float32 and a.dtype == b.dtype:
        return multiply_add(a, b, accumulator)
    elif COMPUTE == tl.float32 and a.dtype == tl.bfloat16 and b.dtype == tl.float32:
        high, rest = _upper_half(b)
        middle, low = _upper_half(rest)
        accumulator = multiply_add(a, narrow(low, tl.bfloat16), accumulator)
        accumulator = multiply_add(a, narrow(middle, tl.bfloat16), accumulator)
        return multiply_add(a, narrow(high, tl.bfloat16), accumulator)
    else:
        return multiply_add(convert(a, COMPUTE), convert(b, COMPUTE), accumulator)


@triton.jit
def settled(accumulator, IN_REGISTERS: tl.constexpr):
    """The accumulator of a loop, of which no product is in flight any more where its first factor lies IN_REGISTERS: where it was
    computed, not only read.

    Hopper's products (wgmma) read such a factor as they run, and PTX leaves undefined what becomes of them where its
    registers are written before the wait. Triton (3.6 to 3.9) lets one product run into the next step, which writes
    them, and ptxas before 13.3 reuses them early (triton-lang/triton issue 9433 and pull request 11781). What is used
    within the step is waited for there, here by an instruction that is none. Copies run ahead as before. Other GPUs,
    whose sums may lie elsewhere than in registers, are left alone.
    """
    if IN_REGISTERS and not _INTERPRETED and cuda_capability_geq(9) and not cuda_capability_geq(10):
        return tl.inline_asm_elementwise("", "=f,0", [accumulator], tl.float32, True, 1)
    else:
        return accumulator


@triton.jit
def factor_of(x, COMPUTE: tl.constexpr):
    """x as multiply_add_in takes it: rounded to COMPUTE, but of a float32 product left as it is."""
    if COMPUTE == tl.float32:
        return x
    else:
        return convert(x, COMPUTE)


@triton.jit
def _upper_half(x):
    """float32 x with the lower half of its bits cleared, and what is left of it; nothing of an infinity."""
    high = (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return high, tl.where(high == x, 0.0, x - high)


@triton.jit
def product(a, FACTOR: tl.constexpr):
    """The upper and the lower 32 bits of uint32 a times FACTOR, below 2 ** 32.

    Written in the language (tl.umulhi, or a product of 64 bits) the compiler takes an instruction for each half wherever it vectorises
    the product or needs less than all of its bits: 1.7 times the integer products of a Philox call (sm_80 to sm_100, triton 3.6 and
    3.7.1).
    """
    if _INTERPRETED:
        both = a.to(tl.uint64) * FACTOR
        return (both >> 32).to(tl.uint32), both.to(tl.uint32)
    else:
        factor = tl.full((), FACTOR, tl.uint32)
        return tl.inline_asm_elementwise(_PRODUCT, "=r,=r,r,r", [a, factor], (tl.uint32, tl.uint32), True, 1)


@triton.jit
def spread_signs(word):
    """Each half of a uint32 word all ones where its top bit is set, else zero."""
    if _INTERPRETED:
        return ((word >> 15) & 0x10001) * 0xFFFF
    else:
        return tl.inline_asm_elementwise(_SPREAD_SIGNS, "=r,r", [word], tl.uint32, True, 1)
