"""Weights moved along seeded directions in Triton: any number of tensors in one launch (the definition is
peftfast.reference.zeroth_order)."""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import launch
from .numerics import narrow, widen
from .philox import normal_tile, rounding_tile, sign_tile

_COLUMNS = tl.constexpr(7)  # of the table: source, out, minus, count, offset, tensor id, first block
_TABLES = 4096  # a model's layers, each with the few places that its scratch comes to lie in


@triton.jit
def _z_tile(seed, start, columns, tensor_id, RADEMACHER: tl.constexpr):
    """z of the elements start + columns; start is a multiple of 128."""
    if RADEMACHER:
        return sign_tile(seed, start // 128, columns, tensor_id)
    else:
        return normal_tile(seed, start // 4, columns, tensor_id)


@triton.jit
def _bits_by(value, draw, DTYPE: tl.constexpr):
    """float32 value as the bits of bfloat16 or float16, rounded by a draw in 65536ths; the nearest where a larger finite number than
    the largest would be needed."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if DTYPE == tl.bfloat16:
        rounded = (bits + draw) >> 16
        saturating = magnitude >= 0x7F7F0000
    else:
        normal = (magnitude + (draw >> 3) - 0x38000000) >> 13
        is_small = magnitude < 0x38800000
        fixed = tl.where(is_small, magnitude, 0).to(tl.float32, bitcast=True) * 1099511627776.0  # 2**40
        small = (fixed.to(tl.int32).to(tl.uint32) + draw) >> 16
        rounded = tl.where(is_small, small, normal) | ((bits >> 16) & 0x8000)
        saturating = magnitude >= 0x477FE000
    nearest = narrow(value, DTYPE).to(tl.uint16, bitcast=True)
    return tl.where(saturating, nearest, rounded.to(tl.uint16))


# Compiled with enable_fp_fusion=False: every product and sum is rounded by itself.
@triton.jit(do_not_specialize=["tensors"])
def _perturb_kernel(
    table_ptr,
    seeds_ptr,
    coefficients_ptr,
    decay_ptr,
    thresholds_ptr,
    rounding_ptr,
    tensors,
    terms,
    DTYPE: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    RADEMACHER: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = decay * source + sum of coefficients[k] z(seeds[k]) for BLOCK elements of one tensor of the table, rounded once.

    ALIGNED: every pointer and offset of the table is a multiple of 16 bytes and elements, so that a whole block is moved by 16-byte
    accesses.
    """
    block = tl.program_id(0).to(tl.int64)
    row, end = 0, tensors
    for _ in tl.static_range(SEARCH):  # the last tensor whose first block is not after this one
        middle = (row + end) // 2
        begins = tl.load(table_ptr + middle * _COLUMNS + 6)
        row = tl.where(begins <= block, middle, row)
        end = tl.where(begins <= block, end, middle)
    entry = table_ptr + row * _COLUMNS
    count = tl.load(entry + 3)
    offset = tl.load(entry + 4)
    tensor_id = tl.load(entry + 5)
    start = (offset // BLOCK + block - tl.load(entry + 6)) * BLOCK  # in the logical tensor
    columns = tl.arange(0, BLOCK)
    first = start - offset
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    local = first + columns
    whole = (first >= 0) & (first + BLOCK <= count)
    inside = (local >= 0) & (local < count)

    before = tl.zeros((BLOCK,), tl.float32)
    if HAS_SOURCE:
        source_ptr = tl.load(entry).to(tl.pointer_type(DTYPE), bitcast=True)
        if ALIGNED:
            source_ptr = tl.multiple_of(source_ptr, 16)
        if whole:
            before = widen(tl.load(source_ptr + local))
        else:
            before = widen(tl.load(source_ptr + local, mask=inside, other=0.0))
    plus = before
    if decay_ptr is not None:
        plus = before * tl.load(decay_ptr)
    minus = plus
    for k in range(terms):
        coefficient = tl.load(coefficients_ptr + k)
        if coefficient != 0.0:
            term = coefficient * _z_tile(tl.load(seeds_ptr + k), start, columns, tensor_id, RADEMACHER)
            if HAS_SOURCE:
                plus = plus + term
            else:
                plus = term
            if HAS_MINUS:
                minus = minus - term
    if thresholds_ptr is not None:
        moves = tl.abs(before) <= tl.load(thresholds_ptr + row)
        plus = tl.where(moves, plus, before)
        if HAS_MINUS:
            minus = tl.where(moves, minus, before)

    if rounding_ptr is not None:
        draw = rounding_tile(tl.load(rounding_ptr), start // 8, columns, tensor_id)
        out_bits_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.int16), bitcast=True)
        if ALIGNED:
            out_bits_ptr = tl.multiple_of(out_bits_ptr, 16)
        bits = _bits_by(plus, draw, DTYPE)
        if whole:
            tl.store(out_bits_ptr + local, bits.to(tl.int16))
        else:
            tl.store(out_bits_ptr + local, bits.to(tl.int16), mask=inside)
    else:
        out_ptr = tl.load(entry + 1).to(tl.pointer_type(DTYPE), bitcast=True)
        if ALIGNED:
            out_ptr = tl.multiple_of(out_ptr, 16)
        if whole:
            tl.store(out_ptr + local, narrow(plus, DTYPE))
        else:
            tl.store(out_ptr + local, narrow(plus, DTYPE), mask=inside)
    if HAS_MINUS:
        minus_ptr = tl.load(entry + 2).to(tl.pointer_type(DTYPE), bitcast=True)
        if ALIGNED:
            minus_ptr = tl.multiple_of(minus_ptr, 16)
        if whole:
            tl.store(minus_ptr + local, narrow(minus, DTYPE))
        else:
            tl.store(minus_ptr + local, narrow(minus, DTYPE), mask=inside)


@functools.lru_cache(maxsize=_TABLES)
def _device_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """The table on the device. Kept, since a copy from the host waits; a model's weights have the same addresses at every step."""
    return torch.tensor(rows, dtype=torch.int64).to(device)


def perturb(
    sources: Sequence[torch.Tensor] | None,
    outs: Sequence[torch.Tensor],
    minus: Sequence[torch.Tensor] | None,
    seeds: torch.Tensor,
    coefficients: torch.Tensor,
    decay: torch.Tensor | None,
    thresholds: torch.Tensor | None,
    rounding_seed: torch.Tensor | None,
    tensor_ids: Sequence[int],
    offsets: Sequence[int],
    rademacher: bool,
    config,
) -> None:
    """One launch for all tensors, contiguous and of one dtype. ``minus``, if given, gets the sum of the terms subtracted; without
    ``sources`` the first term is left out.

    seeds int64 ``[K]``, coefficients float32 ``[K]``, decay float32 ``[1]``, thresholds float32 ``[len(outs)]``, rounding_seed int64
    ``[1]``: on the tensors' device.
    """
    rows, kept, blocks = [], [], 0
    for i, out in enumerate(outs):
        if out.numel():
            pointers = [t[i].data_ptr() if t is not None else 0 for t in (sources, outs, minus)]
            rows.append((*pointers, out.numel(), offsets[i], tensor_ids[i], blocks))
            kept.append(i)
            first, last = offsets[i] // config.block, -(-(offsets[i] + out.numel()) // config.block)
            blocks += last - first
    if not blocks:
        return
    dtype = outs[0].dtype
    if thresholds is not None and len(kept) < len(outs):
        thresholds = torch.cat([thresholds[i : i + 1] for i in kept])
    narrow_out = dtype in (torch.bfloat16, torch.float16)
    aligned = all(value % 16 == 0 for row in rows for value in (*row[:3], row[4]))
    launch(
        _perturb_kernel,
        (blocks,),
        _device_table(tuple(rows), seeds.device),
        seeds,
        coefficients,
        decay,
        thresholds,
        rounding_seed if narrow_out else None,
        len(rows),
        seeds.numel(),
        DTYPE={torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype],
        HAS_SOURCE=sources is not None,
        HAS_MINUS=minus is not None,
        RADEMACHER=rademacher,
        ALIGNED=aligned,
        SEARCH=(len(rows) - 1).bit_length(),
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
