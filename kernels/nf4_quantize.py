"""Quantisation to 4-bit blocks in Triton, and of block maxima to bytes (the definition is peftfast.reference.nf4)."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .numerics import widen

_NESTED_BLOCK_SIZE = tl.constexpr(256)
_SMALLEST_MAXIMUM = tl.constexpr(1e-38)  # an all-zero block divides by this


@triton.jit
def _magnitude_bits(x):
    """Ordered as magnitudes are, a NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _clamp(x):
    """To [-1, 1]; a NaN stays one."""
    return tl.where(x < -1.0, -1.0, tl.where(x > 1.0, 1.0, x))


@triton.jit
def _nf4_quantize_kernel(
    weight_ptr, bounds_ptr, order_ptr, packed_ptr, absmax_ptr, count, HALF: tl.constexpr, BLOCKS: tl.constexpr
):
    """BLOCKS blocks of 2 HALF elements to HALF bytes and a maximum each.

    A value's rank among the sorted codes is how many of the 15 bounds lie below it. Whole blocks are multiplied by the
    reciprocal of their maximum, a short last one is divided by it: the two round differently, and the bytes are the
    contract.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    values = widen(tl.load(weight_ptr + element, mask=element < count, other=0.0))
    absmax = tl.max(_magnitude_bits(values), axis=1).to(tl.float32, bitcast=True)
    clamped = tl.where(absmax < _SMALLEST_MAXIMUM, _SMALLEST_MAXIMUM, absmax)
    short = (block + 1) * (2 * HALF) > count
    scaled = values * tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), clamped)[:, None]
    if (tl.program_id(0).to(tl.int64) + 1) * (BLOCKS * 2 * HALF) > count:
        divided = tl.div_rn(values, tl.broadcast_to(clamped[:, None], (BLOCKS, 2 * HALF)))
        scaled = tl.where(short[:, None], divided, scaled)
    scaled = _clamp(scaled)
    rank = tl.zeros((BLOCKS, 2 * HALF), tl.int32)
    for i in tl.static_range(15):
        bound = tl.load(bounds_ptr + i)
        rank += ((bound < scaled) | (scaled != scaled)).to(tl.int32)
    index = tl.load(order_ptr + rank).to(tl.int32)
    even, odd = tl.split(index.reshape(BLOCKS, HALF, 2))
    offs_byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed_ptr + offs_byte, (even * 16 + odd).to(tl.uint8), mask=offs_byte * 2 < count)
    stored = tl.where(short, clamped, absmax)
    tl.store(absmax_ptr + block, stored.to(tl.int32, bitcast=True).to(tl.int32), mask=block * (2 * HALF) < count)


def nf4_quantize(
    weight: torch.Tensor,
    block_size: int,
    bounds: torch.Tensor,
    order: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    config,
) -> None:
    """Encode a contiguous float32, bfloat16 or float16 weight with elements.

    bounds: float32 ``[15]``, the middles between neighbouring codes, ascending. order: uint8 ``[16]``, the code's index
        of each rank. packed: uint8 ``[ceil(numel / 2), 1]`` and absmax: float32 ``[blocks]``, written.
    """
    blocks = max(1, config.tile // block_size)
    launch(
        _nf4_quantize_kernel,
        (triton.cdiv(absmax.numel(), blocks),),
        weight,
        bounds,
        order,
        packed,
        absmax.view(torch.int32),
        weight.numel(),
        HALF=block_size // 2,
        BLOCKS=blocks,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )


@triton.jit
def _nf4_nest_kernel(values_ptr, bounds_ptr, index_ptr, absmax_ptr, count, SNAPPED: tl.constexpr):
    """256 values to bytes and their maximum. SNAPPED: as bitsandbytes' kernel for CPU tensors does it, over a grid of
    65,536 values."""
    group = tl.program_id(0).to(tl.int64)
    offs = group * _NESTED_BLOCK_SIZE + tl.arange(0, _NESTED_BLOCK_SIZE)
    mask = offs < count
    values = tl.load(values_ptr + offs, mask=mask, other=0.0)
    if SNAPPED:
        bits = tl.max(tl.where(values == values, _magnitude_bits(values), 0), axis=0)
        absmax = bits.to(tl.float32, bitcast=True)
        scale = tl.div_rn(1.0, absmax)
        scaled = _clamp(values * scale)
        nan = scaled != scaled
        place = (tl.where(nan, 0.0, scaled) + 1.0) * 0.5 * 65535.0 + 0.5
        step = tl.div_rn(2.0 * place.to(tl.int32).to(tl.float32), tl.full((_NESTED_BLOCK_SIZE,), 65535.0, tl.float32))
        scaled = -1.0 + step
    else:
        absmax = tl.max(_magnitude_bits(values), axis=0).to(tl.float32, bitcast=True)
        scale = tl.where(absmax < _SMALLEST_MAXIMUM, _SMALLEST_MAXIMUM, absmax)
        if (group + 1) * _NESTED_BLOCK_SIZE > count:
            absmax = scale
            scaled = _clamp(tl.div_rn(values, tl.broadcast_to(scale, (_NESTED_BLOCK_SIZE,))))
        else:
            scaled = _clamp(values * tl.div_rn(1.0, scale))
        nan = scaled != scaled
    rank = tl.zeros((_NESTED_BLOCK_SIZE,), tl.int32)
    for i in tl.static_range(8):
        step_size = 128 >> i
        bound = tl.load(bounds_ptr + rank + (step_size - 1))
        rank += tl.where((bound < scaled) | (scaled != scaled), step_size, 0)
    if SNAPPED:
        rank = tl.where(nan, 0, rank)
    tl.store(index_ptr + offs, rank.to(tl.uint8), mask=mask)
    tl.store(absmax_ptr + group, absmax.to(tl.int32, bitcast=True).to(tl.int32))


def nf4_nest(
    values: torch.Tensor,
    bounds: torch.Tensor,
    snapped: bool,
    index: torch.Tensor,
    absmax: torch.Tensor,
    config,
) -> None:
    """Bytes of a contiguous float32 vector with elements, in blocks of 256.

    bounds: float32 ``[255]`` of a sorted code of 256. index: uint8, of values' size, and absmax: float32
        ``[ceil(numel / 256)]``, written.
    """
    launch(
        _nf4_nest_kernel,
        (absmax.numel(),),
        values,
        bounds,
        index,
        absmax.view(torch.int32),
        values.numel(),
        SNAPPED=snapped,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
