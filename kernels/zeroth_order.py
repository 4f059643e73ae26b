"""Weights moved along seeded directions in Triton: any number of tensors in one launch (the definition is
peftfast.reference.zeroth_order)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .device_tables import DeviceTables
from .launch import launch
from .numerics import narrow, widen
from .philox import STREAM_RADEMACHER, normal_tile, rounding_tile, words_at

_COLUMNS = tl.constexpr(7)  # of the table: source, out, minus, count, offset, tensor id, first block
_TABLES = DeviceTables(4096)  # a model's layers, each with the few places that its scratch comes to lie in


@triton.jit
def _sign_bits(seed, start, tensor_id, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """uint32 ``[BLOCK]``, 0 or 2 ** 31: the signs of the elements from ``start`` on, a multiple of 128.

    A counter has the signs of 128 elements, more than a thread has: the block's counters are drawn once each and their words looked up,
    one for each WIDTH elements that a thread moves at once.
    """
    word0, word1, word2, word3 = words_at(
        seed, start // 128 + tl.arange(0, BLOCK // 128), tensor_id, tl.full((), STREAM_RADEMACHER, tl.int32)
    )
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3)).reshape(BLOCK // 32)
    first = tl.arange(0, BLOCK // WIDTH) * WIDTH
    word = tl.gather(words.to(tl.int32, bitcast=True), first // 32, 0).to(tl.uint32, bitcast=True)
    word = word >> (first % 32).to(tl.uint32)
    lowest_up = word[:, None] << (31 - tl.arange(0, WIDTH)).to(tl.uint32)[None, :]
    return (lowest_up & 0x80000000).reshape(BLOCK)


@triton.jit
def _term_tile(
    coefficient, seed, start, columns, tensor_id, RADEMACHER: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """coefficient * z of the elements start + columns; start is a multiple of BLOCK."""
    if RADEMACHER:
        # The product with a sign is the coefficient under that sign.
        bits = coefficient.to(tl.uint32, bitcast=True) ^ _sign_bits(seed, start, tensor_id, BLOCK, WIDTH)
        return bits.to(tl.float32, bitcast=True)
    else:
        return coefficient * normal_tile(seed, start // 4, columns, tensor_id)


@triton.jit
def _address(entry, column: tl.constexpr, dtype: tl.constexpr, first, ALIGNED: tl.constexpr):
    """Where the table says that a tensor lies, ``first`` elements on."""
    pointer = tl.load(entry + column).to(tl.pointer_type(dtype), bitcast=True) + first
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _store(pointer, values, columns, low, high, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer + columns, narrow(values, pointer.dtype.element_ty))
    else:
        inside = (columns >= low) & (columns < high)
        tl.store(pointer + columns, narrow(values, pointer.dtype.element_ty), mask=inside)


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


@triton.jit
def _perturb_block(
    entry,
    row,
    seeds_ptr,
    coefficients_ptr,
    decay_ptr,
    thresholds_ptr,
    rounding_ptr,
    terms,
    start,
    first,
    low,
    high,
    DTYPE: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    HAS_MINUS: tl.constexpr,
    RADEMACHER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
):
    """Elements low <= i < high of a block, which begins at ``start`` in the logical tensor and at ``first`` in the one at hand."""
    columns = tl.arange(0, BLOCK)
    tensor_id = tl.load(entry + 5)
    before = tl.zeros((BLOCK,), tl.float32)
    if HAS_SOURCE:
        source_ptrs = _address(entry, 0, DTYPE, first, ALIGNED) + columns
        if FULL:
            before = widen(tl.load(source_ptrs))
        else:
            before = widen(tl.load(source_ptrs, mask=(columns >= low) & (columns < high), other=0.0))
    plus = before
    if decay_ptr is not None:
        plus = before * tl.load(decay_ptr)
    minus = plus
    for k in range(terms):
        coefficient = tl.load(coefficients_ptr + k)
        if coefficient != 0.0:
            seed = tl.load(seeds_ptr + k)
            term = _term_tile(coefficient, seed, start, columns, tensor_id, RADEMACHER, BLOCK, WIDTH)
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
        bits = _bits_by(plus, draw, DTYPE).to(tl.int16)
        _store(_address(entry, 1, tl.int16, first, ALIGNED), bits, columns, low, high, FULL)
    else:
        _store(_address(entry, 1, DTYPE, first, ALIGNED), plus, columns, low, high, FULL)
    if HAS_MINUS:
        _store(_address(entry, 2, DTYPE, first, ALIGNED), minus, columns, low, high, FULL)


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
    WIDTH: tl.constexpr,
):
    """out = decay * source + sum of coefficients[k] z(seeds[k]) for BLOCK elements of one tensor of the table, rounded once.

    ALIGNED: every pointer and offset of the table is a multiple of 16 bytes and elements, so that a whole block is moved by 16-byte
    accesses, of WIDTH elements each.
    """
    block = tl.program_id(0).to(tl.int64)
    row, end = 0, tensors
    for _ in tl.static_range(SEARCH):  # the last tensor whose first block is not after this one
        middle = (row + end) // 2
        begins = tl.load(table_ptr + middle * _COLUMNS + 6)
        row = tl.where(begins <= block, middle, row)
        end = tl.where(begins <= block, end, middle)
    entry = table_ptr + row * _COLUMNS
    offset = tl.load(entry + 4)
    start = (offset // BLOCK + block - tl.load(entry + 6)) * BLOCK  # in the logical tensor
    first = start - offset
    # What lies within the block is counted in 32 bits. Two ways through the code: what the ragged one finds out for each element, the
    # other would pay for too where they shared any of it.
    low = tl.maximum(-first, 0).to(tl.int32)
    high = tl.minimum(tl.load(entry + 3) - first, BLOCK).to(tl.int32)
    if (low == 0) & (high == BLOCK):
        _perturb_block(
            entry, row, seeds_ptr, coefficients_ptr, decay_ptr, thresholds_ptr, rounding_ptr, terms, start, first, low, high,
            DTYPE, HAS_SOURCE, HAS_MINUS, RADEMACHER, ALIGNED, BLOCK, WIDTH, True,
        )  # fmt: skip
    else:
        _perturb_block(
            entry, row, seeds_ptr, coefficients_ptr, decay_ptr, thresholds_ptr, rounding_ptr, terms, start, first, low, high,
            DTYPE, HAS_SOURCE, HAS_MINUS, RADEMACHER, ALIGNED, BLOCK, WIDTH, False,
        )  # fmt: skip


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
    # Left alone, ptxas spills two words of the rounded form to make room for one program more.
    room = {"maxnreg": 168} if narrow_out and rounding_seed is not None else {}
    aligned = all(value % 16 == 0 for row in rows for value in (*row[:3], row[4]))
    host = lambda: (torch.tensor(rows, dtype=torch.int64, device="cpu"),)  # noqa: E731
    (table,) = _TABLES.get((seeds.device, tuple(rows)), seeds.device, host)
    launch(
        _perturb_kernel,
        (blocks,),
        table,
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
        WIDTH=16 // dtype.itemsize,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        **room,
    )
