"""Dequantisation of 4-bit blocks in Triton, nested scales included: one launch (the definition is
peftfast.reference.nf4)."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .numerics import narrow, widen

_NESTED_BLOCK_SIZE = tl.constexpr(256)


CONTIGUOUS, WHOLE_BLOCKS, ANY_ROWS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _words(packed_ptr, first, left, ALIGNED: tl.constexpr, WORDS: tl.constexpr):
    """uint32 ``[WORDS]``: four bytes each, the first lowest, from byte ``first`` on; 0 where no byte is left."""
    packed_ptr += first
    index = tl.arange(0, WORDS)
    if ALIGNED:
        return tl.load(packed_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + index, mask=index < left // 4, other=0)
    else:
        word = tl.zeros((WORDS,), tl.uint32)
        for i in tl.static_range(4):
            byte = tl.load(packed_ptr + (4 * index + i), mask=4 * index + i < left, other=0)
            word |= byte.to(tl.uint32) << (8 * i)
        return word


@triton.jit
def indices_of(units, STORED: tl.constexpr):
    """int32, as many times as a unit holds codes: those of uint32 words, eight each, or of bytes. Of each byte the upper half is the
    first.

    STORED: what is decoded goes to memory as it lies, and the store says which thread has which elements: the words are brought there,
    a quarter of the bytes of 16-bit elements or less. A product wants its tile in shared memory and says nothing about threads: there
    elements are joined, which stay in the thread that has the word. The shifts of one element are one instruction.
    """
    if units.dtype == tl.uint8:
        index = tl.join(units >> 4, units)
    elif STORED:
        shifts = (4 * (tl.arange(0, 8) ^ 1)).to(tl.uint32)
        if len(units.shape) == 1:
            index = units[:, None] >> shifts[None, :]
        else:
            index = units[:, :, None] >> shifts[None, None, :]
    else:
        halves = tl.join(units, units >> 16)
        bytes_ = tl.join(halves, halves >> 8)
        index = tl.join(bytes_ >> 4, bytes_)
    return (index & 15).to(tl.int32)


@triton.jit(do_not_specialize=["support"])
def _nf4_dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    out_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    first_tile,
    begin,
    end,
    packed_count,
    width,
    stride_row,
    indices_ptr,
    values_ptr,
    starts_ptr,
    support,
    HALF: tl.constexpr,
    BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    SLAB: tl.constexpr,
    WIDE: tl.constexpr,
    PICKS: tl.constexpr,
):
    """out element i = code[nibble i] * absmax[i // block_size] for elements begin <= i < end, in tiles of BLOCKS blocks of
    block_size = 2 HALF elements, HALF bytes each. A tile begins at a multiple of its size, and one maximum of the second level serves
    it.

    Where a program works is one number of 64 bits, added to the pointers; within its tile everything is 32 bits wide, for an H200 has
    time for 10 integer instructions an element while a bfloat16 goes to its memory. A word of four bytes is unpacked by a shift and a
    mask for each element; ALIGNED: words can be loaded as such. A thread has one maximum for its eight elements. The nested scale is a
    product and a sum that are rounded apart: the kernel must be compiled with enable_fp_fusion=False.

    ROWS: out is CONTIGUOUS; or its rows of ``width`` elements (WIDE: with a tile's more than 2 ** 31) lie ``stride_row`` apart and are
    WHOLE_BLOCKS, whose place is found once a block; or ANY_ROWS, where it is found for each element. SLAB: begin is not 0. With indices
    (of the whole weight, CONTIGUOUS) values are added to what was stored, each sum rounded once more: those of program p are
    starts[p] .. starts[p + 1].
    """
    TILE: tl.constexpr = BLOCKS * 2 * HALF
    tile = tl.program_id(0).to(tl.int64) + first_tile
    first = tile * TILE
    left = tl.minimum(end - first, TILE).to(tl.int32)
    left_bytes = tl.minimum(packed_count - tile * (TILE // 2), TILE // 2).to(tl.int32)
    words = _words(packed_ptr, tile * (TILE // 2), left_bytes, ALIGNED, TILE // 8)
    block = tl.arange(0, BLOCKS)
    mask_block = block * (2 * HALF) < left
    absmax = tl.load(absmax_ptr + tile * BLOCKS + block, mask=mask_block, other=0)
    if nested_absmax_ptr is not None:
        nested = tl.load(nested_absmax_ptr + tile * BLOCKS // _NESTED_BLOCK_SIZE)
        absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested + tl.load(nested_offset_ptr)
    code = tl.load(code_ptr + tl.arange(0, 16))
    values = tl.gather(code, indices_of(words, True).reshape(TILE), 0).reshape(BLOCKS, 2 * HALF) * absmax[:, None]
    column = tl.arange(0, 2 * HALF)
    element = block[:, None] * (2 * HALF) + column[None, :]
    mask = element < left
    if SLAB:
        mask = mask & (element >= tl.maximum(begin - first, 0).to(tl.int32))
    if ROWS == CONTIGUOUS:
        out_ptrs = out_ptr + (first - begin) + element
    else:
        # The row in which the tile's first element lies, and where in it: negative only for what the mask leaves out.
        start = tl.maximum(first - begin, 0)
        row = start // width
        at = first - begin - row * width
        local = (at if WIDE else at.to(tl.int32)) + (block * (2 * HALF) if ROWS == WHOLE_BLOCKS else element)
        if WIDE:
            down = local // width
        else:
            down = (local.to(tl.uint32) // (row * 0 + width).to(tl.uint32)).to(tl.int64)
        offs = down * stride_row + (local - down * width)
        out_ptrs = out_ptr + row * stride_row + (offs[:, None] + column[None, :] if ROWS == WHOLE_BLOCKS else offs)
    tl.store(out_ptrs, narrow(values, out_ptr.dtype.element_ty), mask=mask)
    if indices_ptr is not None:
        # The stores of the other threads of this program; what they wrote is still in the cache.
        tl.debug_barrier()
        last = tl.minimum(first + TILE, end)
        until = tl.minimum(tl.load(starts_ptr + tl.program_id(0) + 1), support)
        for at in range(tl.maximum(tl.load(starts_ptr + tl.program_id(0)), 0), until, PICKS):
            picks = at + tl.arange(0, PICKS)
            there = picks < until
            place = tl.load(indices_ptr + picks, mask=there, other=-1).to(tl.int64)
            inside = there & (place >= first) & (place < last)
            weight = tl.load(out_ptr + place, mask=inside, other=0.0)
            value = tl.load(values_ptr + picks, mask=inside, other=0.0)
            tl.store(out_ptr + place, narrow(widen(weight) + value, out_ptr.dtype.element_ty), mask=inside)


def has_words(packed: torch.Tensor, columns: int) -> bool:
    """Whether four packed bytes can be loaded at once where rows or parts of them are multiples of so many columns."""
    return columns % 8 == 0 and packed.data_ptr() % 4 == 0


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    block_size: int,
    count: int,
    out: torch.Tensor,
    first_row: int,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    config,
    delta: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Decode a weight of ``count`` elements into ``out``, float32, bfloat16 or float16; returns it.

    packed: uint8 ``[ceil(count / 2), 1]``. absmax: float32 ``[blocks]``, or uint8 with the three nested tensors. code:
        float32 ``[16]``. All contiguous.
    block_size: a power of two of at least 32. Bit for bit the definition.
    out: the whole weight, contiguous, of any shape; or a matrix that takes the rows from ``first_row`` on, its own rows
        consecutive elements, ``out.stride(0)`` apart.
    delta: for the whole weight, contiguous: indices, ascending, float32 values added at them, and int32 starts, the first entry of
        each run of 2 tile_bytes elements and one more, the end.
    """
    if out.numel() == 0:
        return out
    half = block_size // 2
    blocks = max(1, config.tile_bytes // half)
    begin, width, stride, rows = 0, out.numel(), out.numel(), CONTIGUOUS
    if not (out.is_contiguous() and out.numel() == count):
        width = out.shape[1]
        begin = first_row * width
        # One row, or rows that follow each other: contiguous too.
        if out.shape[0] > 1 and out.stride(0) != width:
            stride = out.stride(0)
            rows = WHOLE_BLOCKS if width % block_size == 0 else ANY_ROWS
    end = begin + out.numel()
    first_tile = begin // (blocks * block_size)
    packed_count = (count + 1) // 2
    launch(
        _nf4_dequantize_kernel,
        (triton.cdiv(end, blocks * block_size) - first_tile,),
        packed,
        absmax,
        code,
        out,
        nested_absmax,
        nested_code,
        nested_offset,
        first_tile,
        begin,
        end,
        packed_count,
        width,
        stride,
        *(delta or (None, None, None)),
        0 if delta is None else delta[0].numel(),
        HALF=half,
        BLOCKS=blocks,
        ALIGNED=has_words(packed, 2 * packed_count),
        ROWS=rows,
        SLAB=begin > 0,
        WIDE=width + blocks * block_size > 2**31,
        PICKS=32 * config.num_warps,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return out
