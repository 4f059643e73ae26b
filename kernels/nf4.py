"""Dequantisation of 4-bit blocks in Triton, nested scales included: one launch (the definition is
peftfast.reference.nf4)."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .numerics import narrow, widen

_NESTED_BLOCK_SIZE = tl.constexpr(256)


CONTIGUOUS, WHOLE_BLOCKS, ANY_ROWS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["support"])
def _nf4_dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    out_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    first_block,
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
    ROWS: tl.constexpr,
    SLAB: tl.constexpr,
    PICKS: tl.constexpr,
):
    """out element i = code[nibble i] * absmax[i // block_size] for elements begin <= i < end, in BLOCKS blocks of
    block_size = 2 HALF elements, HALF bytes each.

    A row of the tile is a block, so a thread reads one maximum for all of its bytes. The nested scale is a product and
    a sum that are rounded apart: the kernel must be compiled with enable_fp_fusion=False. ROWS: out is CONTIGUOUS; or
    its rows of ``width`` elements lie ``stride_row`` apart and are WHOLE_BLOCKS, whose place is found once a block; or
    ANY_ROWS, where it is found for each element. SLAB: begin is not 0. With indices (of the whole weight, CONTIGUOUS)
    values are added to what was stored, each sum rounded once more: those of program p are starts[p] .. starts[p + 1].
    """
    block = first_block + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    columns = tl.arange(0, HALF)
    offs_byte = block[:, None] * HALF + columns[None, :]
    bytes_ = tl.load(packed_ptr + offs_byte, mask=offs_byte < packed_count, other=0)
    mask_block = block * (2 * HALF) < end
    absmax = tl.load(absmax_ptr + block, mask=mask_block, other=0)
    if nested_absmax_ptr is not None:
        nested = tl.load(nested_absmax_ptr + block // _NESTED_BLOCK_SIZE, mask=mask_block, other=0.0)
        absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested + tl.load(nested_offset_ptr)
    code = tl.load(code_ptr + tl.arange(0, 16))
    index = tl.join(bytes_ >> 4, bytes_ & 15).reshape(BLOCKS * 2 * HALF)
    values = tl.gather(code, index.to(tl.int32), 0).reshape(BLOCKS, 2 * HALF) * absmax[:, None]
    element = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    mask = element < end
    if SLAB:
        mask = mask & (element >= begin)
    if ROWS == CONTIGUOUS:
        offs = element - begin
    elif ROWS == WHOLE_BLOCKS:
        start = block * (2 * HALF) - begin
        row = start // width
        offs = (row * stride_row + (start - row * width))[:, None] + tl.arange(0, 2 * HALF)[None, :]
    else:
        row = (element - begin) // width
        offs = row * stride_row + (element - begin - row * width)
    tl.store(out_ptr + offs, narrow(values, out_ptr.dtype.element_ty), mask=mask)
    if indices_ptr is not None:
        # The stores of the other threads of this program; what they wrote is still in the cache.
        tl.debug_barrier()
        first = tl.program_id(0).to(tl.int64) * BLOCKS * 2 * HALF
        last = tl.minimum(first + BLOCKS * 2 * HALF, end)
        until = tl.minimum(tl.load(starts_ptr + tl.program_id(0) + 1), support)
        for at in range(tl.maximum(tl.load(starts_ptr + tl.program_id(0)), 0), until, PICKS):
            picks = at + tl.arange(0, PICKS)
            there = picks < until
            place = tl.load(indices_ptr + picks, mask=there, other=-1).to(tl.int64)
            inside = there & (place >= first) & (place < last)
            weight = tl.load(out_ptr + place, mask=inside, other=0.0)
            value = tl.load(values_ptr + picks, mask=inside, other=0.0)
            tl.store(out_ptr + place, narrow(widen(weight) + value, out_ptr.dtype.element_ty), mask=inside)


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
    block_size: a power of two. Bit for bit the definition.
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
    first_block = begin // block_size
    launch(
        _nf4_dequantize_kernel,
        (triton.cdiv(triton.cdiv(end, block_size) - first_block, blocks),),
        packed,
        absmax,
        code,
        out,
        nested_absmax,
        nested_code,
        nested_offset,
        first_block,
        begin,
        end,
        (count + 1) // 2,
        width,
        stride,
        *(delta or (None, None, None)),
        0 if delta is None else delta[0].numel(),
        HALF=half,
        BLOCKS=blocks,
        ROWS=rows,
        SLAB=begin > 0,
        PICKS=32 * config.num_warps,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return out
