"""Philox4x32-10 in Triton: words, normals, signs, and the keep mask of dropout (the definition is peftfast.reference.philox)."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .numerics import product, spread_signs

STREAM_GAUSSIAN = tl.constexpr(0)
STREAM_DROPOUT = tl.constexpr(1)
STREAM_ROUNDING = tl.constexpr(2)
STREAM_RADEMACHER = tl.constexpr(3)

_LOG = tuple(
    map(
        float.fromhex,
        (
            *("-0x1.fffffep+0", "0x1.000074p+0", "-0x1.555b4cp-1", "0x1.ff6ae4p-2"),
            *("-0x1.973aa8p-2", "0x1.6082b0p-2", "-0x1.4e9af2p-2", "0x1.a91cbcp-3"),
        ),
    )
)
_LOG0, _LOG1, _LOG2, _LOG3, _LOG4, _LOG5, _LOG6, _LOG7 = map(tl.constexpr, _LOG)
_SIN0, _SIN1, _SIN2, _SIN3 = (
    tl.constexpr(float.fromhex(text))
    for text in ("0x1.921fb6p-1", "-0x1.4abbbap-4", "0x1.465ec6p-9", "-0x1.2d9bb8p-15")
)
_COS0, _COS1, _COS2 = (
    tl.constexpr(float.fromhex(text)) for text in ("-0x1.3bd3a2p-2", "0x1.03b162p-6", "-0x1.4ea9e8p-12")
)
_TWO_LN_2 = tl.constexpr(float.fromhex("0x1.62e430p+0"))
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_TURN = tl.constexpr(2.0**-31)
DRAW_RANGE = 1 << 16
_MULTIPLIER0, _MULTIPLIER1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_WEYL0, _WEYL1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(10)
_ONES = tl.constexpr(0xFFFFFFFF)  # for x ^ _ONES: the interpreter has no ~ of unsigned numbers


def keep_threshold(p: float) -> int:
    """The 16-bit draw below which an element is kept: round(65536 * (1 - p)), in [0, 65536]."""
    return round(DRAW_RANGE * (1.0 - p))


def keep_scale(p: float) -> float:
    """The inverse of the exact keep rate threshold / 65536; 0 where nothing is kept."""
    threshold = keep_threshold(p)
    return DRAW_RANGE / threshold if threshold else 0.0


@triton.jit
def words_at(seed, q, tensor_id, stream):
    """The four uint32 words of the counters (q low, q high, tensor_id, stream) under an int64 seed; q is an int64
    block."""
    c0 = q.to(tl.uint32)
    c1 = (q >> 32).to(tl.uint32)
    c2 = c0 * 0 + tensor_id.to(tl.uint32)  # a block too
    c3 = c0 * 0 + stream.to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high0, low0 = product(c0, _MULTIPLIER0)
        high1, low1 = product(c2, _MULTIPLIER1)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += _WEYL0
        k1 += _WEYL1
    return c0, c1, c2, c3


@triton.jit
def box_muller(radius_word, angle_word):
    """Two normals of two uint32 words. Each product and sum is rounded by itself: compile with enable_fp_fusion=False."""
    t = radius_word.to(tl.float32) + 0.5
    from_root = t.to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
    exponent = from_root >> 23
    f = ((from_root & 0x7FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    log = ((_LOG7 * f + _LOG6) * f + _LOG5) * f + _LOG4
    log = (((log * f + _LOG3) * f + _LOG2) * f + _LOG1) * f + _LOG0
    radius = tl.sqrt_rn(f * log + (32 - exponent).to(tl.float32) * _TWO_LN_2)
    turned = angle_word + 0x20000000
    y = (angle_word << 2).to(tl.int32, bitcast=True).to(tl.float32) * _TURN
    square = y * y
    sine = y * (((_SIN3 * square + _SIN2) * square + _SIN1) * square + _SIN0)
    cosine = square * ((_COS2 * square + _COS1) * square + _COS0) + 1.0
    odd = (turned & 0x40000000) != 0
    first = tl.where(odd, sine, cosine).to(tl.uint32, bitcast=True) ^ ((turned + 0x40000000) & 0x80000000)
    second = tl.where(odd, cosine, sine).to(tl.uint32, bitcast=True) ^ (turned & 0x80000000)
    return radius * first.to(tl.float32, bitcast=True), radius * second.to(tl.float32, bitcast=True)


@triton.jit
def normal_tile(seed, first_counter, columns, tensor_id):
    """The normals of the elements 4 * first_counter + columns.

    Args:
        seed: int64 scalar. tensor_id: int64 scalar.
        first_counter: int64; ``columns`` a tl.arange, expanded, and kept apart from it for the reason that keep_tile gives: a thread
            that owns the four columns of a counter computes its words once, and each root, sine and cosine once.
    """
    word0, word1, word2, word3 = words_at(
        seed, first_counter + columns // 4, tensor_id, tl.full((), STREAM_GAUSSIAN, tl.int32)
    )
    lane = columns % 4
    first, second = box_muller(tl.where(lane < 2, word0, word2), tl.where(lane < 2, word1, word3))
    return tl.where(lane % 2 == 0, first, second)


@triton.jit
def sign_tile(seed, first_counter, columns, tensor_id):
    """1 or -1 for the elements 128 * first_counter + columns."""
    word0, word1, word2, word3 = words_at(
        seed, first_counter + columns // 128, tensor_id, tl.full((), STREAM_RADEMACHER, tl.int32)
    )
    at = columns % 128 // 32
    word = tl.where(at < 2, tl.where(at < 1, word0, word1), tl.where(at < 3, word2, word3))
    bit = (word >> (columns % 32).to(tl.uint32)) & 1
    return ((bit << 31) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def rounding_tile(seed, first_counter, columns, tensor_id):
    """16-bit draws of the elements 8 * first_counter + columns, uint32."""
    word0, word1, word2, word3 = words_at(
        seed, first_counter + columns // 8, tensor_id, tl.full((), STREAM_ROUNDING, tl.int32)
    )
    draw = columns % 8
    word = tl.where(draw < 4, tl.where(draw < 2, word0, word1), tl.where(draw < 6, word2, word3))
    return tl.where(draw % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _dropout_words(seed, first_row, first_column, C, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """The words of a tile's counters, uint32 ``[BLOCK_M, COLUMNS]``, of which LANES neighbours share a counter.

    The place of the tile is kept apart from the places in it: those do not change from step to step, and the compiler sees that a
    thread that owns LANES neighbours needs their words once.
    """
    counters = tl.full((), 1, tl.int64) * ((C + 7) // 8)  # C may be a constant 1
    first = first_row.to(tl.int64) * counters + first_column // 8
    q = first + (tl.arange(0, BLOCK_M)[:, None] * counters + tl.arange(0, COLUMNS)[None, :] // LANES)
    return words_at(seed, q, tl.full((), 0, tl.int32), tl.full((), STREAM_DROPOUT, tl.int32))


@triton.jit
def keep_tile(seed, first_row, first_column, C, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which elements of a tile, ``[BLOCK_M, BLOCK_C]``, dropout keeps.

    Args:
        seed: int64 scalar.
        first_row, first_column: where the tile lies in the whole matrix; the column a multiple of 8.
        C: width of the whole matrix.
        threshold: keep_threshold(p).
    """
    word0, word1, word2, word3 = _dropout_words(seed, first_row, first_column, C, BLOCK_M, BLOCK_C, 8)
    draw = tl.arange(0, BLOCK_C)[None, :] % 8
    word = tl.where(draw < 4, tl.where(draw < 2, word0, word1), tl.where(draw < 6, word2, word3))
    # A draw as the upper half of its word, so that the odd ones need no shift: those that are kept end at (threshold << 16) - 1. A
    # threshold of 0 keeps none.
    draw_first = tl.where(draw % 2 == 0, word << 16, word)
    return (draw_first <= (threshold.to(tl.uint32) << 16) - 1) & (threshold > 0)


@triton.jit
def tied_to(tile, keep):
    """keep, in the layout of a tile that was loaded.

    What is added to it is always true, and gone from the machine code; but the compiler so leaves the mask where a thread owns all
    columns of a counter. In the layout of a product it owns two, and every counter is computed four times: 31 Philox calls a thread
    instead of 8, and spills (sm_80, sm_90, triton 3.6 and 3.7.1). The tile is taken by pairs, since triton 3.9 moves the mask to where
    the whole tile is wanted otherwise, in the product's layout again (7 calls instead of 3).
    """
    BITS: tl.constexpr = tl.int16 if tile.dtype.primitive_bitwidth == 16 else tl.int32
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    first, second = tl.split(tl.reshape(tile.to(BITS, bitcast=True), (ROWS, COLUMNS // 2, 2)))
    # The zero is of the tile's own width: triton 3.6 would lift the layout over the sign extension of a wider one.
    zero = tl.full((), 0, BITS)
    return keep & tl.reshape(tl.join((first | 1) != zero, (second | 1) != zero), (ROWS, COLUMNS))


@triton.jit
def kept_or(x, other_tile, seed, first_row, first_column, C, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """x, ``[BLOCK_M, BLOCK_C]``, where dropout keeps it, else ``other_tile``, of x's dtype, or 0.0 if that is None. The rest is
    keep_tile's.

    Of 16 bits two elements are chosen at once: a word of draws makes the mask for the word of x in the same columns. Its two draws are
    compared by one subtraction, whose borrows the top bits keep apart.
    """
    if x.dtype.primitive_bitwidth == 16:
        word0, word1, word2, word3 = _dropout_words(seed, first_row, first_column, C, BLOCK_M, BLOCK_C // 2, 4)
        at = tl.arange(0, BLOCK_C // 2)[None, :] % 4
        word = tl.where(at < 2, tl.where(at < 1, word0, word1), tl.where(at < 3, word2, word3))
        last = ((threshold - 1) & 0xFFFF).to(tl.uint32) * 0x10001  # the greatest draw that is kept
        below = (last | 0x80008000) - (word & 0x7FFF7FFF)  # top bits: last >= word in the bits below
        above = (word & (last ^ _ONES)) | ((word ^ last ^ _ONES) & (below ^ _ONES))  # top bits: word > last
        dropped = spread_signs(above) | tl.where(threshold > 0, 0, _ONES).to(tl.uint32)
        if other_tile is None:
            chosen = _pairs(x, BLOCK_M, BLOCK_C) & (dropped ^ _ONES)
        else:
            others = _pairs(other_tile, BLOCK_M, BLOCK_C)
            # See tied_to.
            dropped = tl.where((others | 1) != 0, dropped, 0)
            chosen = (_pairs(x, BLOCK_M, BLOCK_C) & (dropped ^ _ONES)) | (others & dropped)
        halves = tl.join(chosen.to(tl.uint16), (chosen >> 16).to(tl.uint16))
        return tl.reshape(halves, (BLOCK_M, BLOCK_C)).to(x.dtype, bitcast=True)
    else:
        keep = keep_tile(seed, first_row, first_column, C, threshold, BLOCK_M, BLOCK_C)
        if other_tile is None:
            return tl.where(keep, x, 0.0)
        else:
            return tl.where(keep, x, other_tile)


@triton.jit
def _pairs(x, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The bits of neighbouring 16-bit elements, the first in the low half: uint32 ``[BLOCK_M, BLOCK_C / 2]``."""
    low, high = tl.split(tl.reshape(x.to(tl.uint16, bitcast=True), (BLOCK_M, BLOCK_C // 2, 2)))
    return low.to(tl.uint32) | (high.to(tl.uint32) << 16)


@triton.jit
def keep_bits(seed, rows, first_column, counters, C, threshold):
    """:func:`keep_tile`'s mask packed, uint32: bit i of an element says whether dropout keeps column first_column + 8 * counters + i.

    Args:
        rows: ``[BLOCK_M, 1]``. counters: tl.arange(0, BLOCK / 8), expanded across rows; one Philox call for each element of the result.
    """
    q = (rows.to(tl.int64) * ((C + 7) // 8) + first_column // 8) + counters
    word0, word1, word2, word3 = words_at(seed, q, tl.full((), 0, tl.int32), tl.full((), STREAM_DROPOUT, tl.int32))
    kept = _kept_pair(word0, threshold) | (_kept_pair(word1, threshold) << 2)
    return kept | (_kept_pair(word2, threshold) << 4) | (_kept_pair(word3, threshold) << 6)


@triton.jit
def _kept_pair(word, threshold):
    """Of a word's two draws, low before high, which are below the threshold: bits 0 and 1."""
    low = ((word & 0xFFFF).to(tl.int32) < threshold).to(tl.uint32)
    return low | (((word >> 16).to(tl.int32) < threshold).to(tl.uint32) << 1)


# threshold is a run-time argument and not specialised: a schedule of p costs no compilation, and the comparison is one
# instruction with a register either way.
@triton.jit(do_not_specialize=["M", "threshold"])
def _dropout_mask_kernel(seed_ptr, mask_ptr, M, C, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """One tile a program, columns fastest: a grid's second axis ends at 65,535."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    first_row = tl.program_id(0) // blocks_c * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(0) % blocks_c * BLOCK_C
    offs_c = first_column + tl.arange(0, BLOCK_C)
    keep = keep_tile(tl.load(seed_ptr), first_row, first_column, C, threshold, BLOCK_M, BLOCK_C)
    mask = (offs_m[:, None] < M) & (offs_c[None, :] < C)
    tl.store(mask_ptr + offs_m[:, None].to(tl.int64) * C + offs_c[None, :], keep.to(tl.uint8), mask=mask)


# start, tensor_id and stream change from call to call: none may be specialised by value (their width, int32 or int64,
# still is).
@triton.jit(do_not_specialize=["start", "count", "tensor_id", "stream"])
def _philox_words_kernel(seed_ptr, words_ptr, start, count, tensor_id, stream, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word0, word1, word2, word3 = words_at(tl.load(seed_ptr), start + offs, tensor_id, stream)
    mask = offs < count
    tl.store(words_ptr + 4 * offs, word0.to(tl.int64), mask=mask)
    tl.store(words_ptr + 4 * offs + 1, word1.to(tl.int64), mask=mask)
    tl.store(words_ptr + 4 * offs + 2, word2.to(tl.int64), mask=mask)
    tl.store(words_ptr + 4 * offs + 3, word3.to(tl.int64), mask=mask)


def dropout_mask(seed: torch.Tensor, rows: int, columns: int, p: float, config) -> torch.Tensor:
    """The keep mask, bool ``[rows, columns]``, of a one-element int64 seed on the device."""
    mask = torch.empty((rows, columns), dtype=torch.bool, device=seed.device)
    if mask.numel():
        launch(
            _dropout_mask_kernel,
            (triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_c),),
            seed,
            mask.view(torch.uint8),
            rows,
            columns,
            keep_threshold(p),
            BLOCK_M=config.block_m,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )
    return mask


def philox_words(seed: torch.Tensor, start: int, count: int, tensor_id: int, stream: int, config) -> torch.Tensor:
    """Words of the counters q = start .. start + count - 1: int64 ``[count, 4]`` with values in [0, 2**32)."""
    words = torch.empty((count, 4), dtype=torch.int64, device=seed.device)
    if count:
        launch(
            _philox_words_kernel,
            (triton.cdiv(count, config.block),),
            seed,
            words,
            start,
            count,
            tensor_id,
            stream,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return words
