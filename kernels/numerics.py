"""What every kernel of this folder narrows, multiplies and asks about the interpreter with."""

import triton
import triton.language as tl

# Fixed when this module is imported, as triton decides at decoration: kernels of one process are all interpreted or
# all compiled.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)


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
