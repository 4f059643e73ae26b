"""Dequantisation of 4-bit blocks in Triton, nested scales included: one launch (the definition is
peftfast.reference.nf4)."""

import torch
import triton
import triton.language as tl

from .numerics import narrow

_NESTED_BLOCK_SIZE = tl.constexpr(256)


@triton.jit
def _nf4_dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    out_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    count,
    packed_count,
    HALF: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """out[i] = code[nibble i] * absmax[i // block_size] for BLOCKS blocks of block_size = 2 HALF elements, HALF bytes
    each.

    A row of the tile is a block, so a thread reads one maximum for all of its bytes. The nested scale is a product and
    a sum that are rounded apart: the kernel must be compiled with enable_fp_fusion=False.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    columns = tl.arange(0, HALF)
    offs_byte = block[:, None] * HALF + columns[None, :]
    bytes_ = tl.load(packed_ptr + offs_byte, mask=offs_byte < packed_count, other=0)
    mask_block = block * (2 * HALF) < count
    absmax = tl.load(absmax_ptr + block, mask=mask_block, other=0)
    if nested_absmax_ptr is not None:
        nested = tl.load(nested_absmax_ptr + block // _NESTED_BLOCK_SIZE, mask=mask_block, other=0.0)
        absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested + tl.load(nested_offset_ptr)
    code = tl.load(code_ptr + tl.arange(0, 16))
    index = tl.join(bytes_ >> 4, bytes_ & 15).reshape(BLOCKS * 2 * HALF)
    values = tl.gather(code, index.to(tl.int32), 0).reshape(BLOCKS, 2 * HALF) * absmax[:, None]
    offs = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_ptr + offs, narrow(values, out_ptr.dtype.element_ty), mask=offs < count)


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    block_size: int,
    out: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    config,
) -> torch.Tensor:
    """Decode into ``out``, contiguous float32, bfloat16 or float16 of any shape; returns it. Everything else is
    contiguous too.

    packed: uint8 ``[ceil(numel / 2), 1]``. absmax: float32 ``[blocks]``, or uint8 with the three nested tensors. code:
        float32 ``[16]``.
    block_size: a power of two. Bit for bit the definition.
    """
    if out.numel():
        half = block_size // 2
        blocks = max(1, config.tile_bytes // half)
        _nf4_dequantize_kernel[(triton.cdiv(out.numel(), blocks * block_size),)](
            packed,
            absmax,
            code,
            out,
            nested_absmax,
            nested_code,
            nested_offset,
            out.numel(),
            (out.numel() + 1) // 2,
            HALF=half,
            BLOCKS=blocks,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
    return out
