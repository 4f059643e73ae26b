"""A sparse delta in Triton: its gradient by gathered columns and by tiles of dW, its addition to a weight, and the optimiser's step
(the definitions are peftfast.reference.sparse_delta). Indices outside the weight read and write nothing."""

import torch
import triton
import triton.language as tl

from .numerics import convert, multiply_add, narrow, widen
from .philox import words_at

_STREAM_ROUNDING = tl.constexpr(2)
_TABLE_COLUMNS = tl.constexpr(11)  # a layer's row: eight addresses, active weights, weights, tensor id
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_INTEGERS = {torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64}


@triton.jit(do_not_specialize=["count", "total"])
def _gather_kernel(
    dyt_ptr,
    xt_ptr,
    indices_ptr,
    out_ptr,
    count,
    total,
    K,
    padded,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out[s] = sum over m of dyt[index // K, m] * xt[index % K, m]; both operands lie with m contiguous and zeros up to ``padded``."""
    offs_s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = offs_s < count
    index = tl.load(indices_ptr + offs_s, mask=mask, other=0)
    inside = mask & (index >= 0) & (index < total)
    index = tl.where(inside, index, 0)
    row = index // K
    column = (index - row * K).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    dyt_ptrs = dyt_ptr + row.to(tl.int64)[:, None] * padded + offs_m[None, :]
    xt_ptrs = xt_ptr + column[:, None] * padded + offs_m[None, :]
    # One sum a lane, added up at the end: a sum in parts.
    sums = tl.zeros((BLOCK_S, BLOCK_M), tl.float32)
    for _ in range(0, padded, BLOCK_M):
        sums += widen(tl.load(dyt_ptrs)) * widen(tl.load(xt_ptrs))
        dyt_ptrs += BLOCK_M
        xt_ptrs += BLOCK_M
    result = tl.where(inside, tl.sum(sums, 1), 0.0)
    tl.store(out_ptr + offs_s, narrow(result, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _tile_kernel(
    dy_ptr,
    x_ptr,
    indices_ptr,
    order_ptr,
    tiles_ptr,
    starts_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_dym,
    stride_xm,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PICKS: tl.constexpr,
):
    """One tile of dyᵀ x that holds support: its sums on tensor cores, then the support picked from them. dW is never stored."""
    tile = tl.load(tiles_ptr + tl.program_id(0))
    start = tl.load(starts_ptr + tl.program_id(0))
    end = tl.load(starts_ptr + tl.program_id(0) + 1)
    tiles_k = tl.cdiv(K, BLOCK_K)
    first_n = (tile // tiles_k) * BLOCK_N
    first_k = (tile % tiles_k) * BLOCK_K
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = first_k + tl.arange(0, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    dy_ptrs = dy_ptr + offs_m[:, None].to(tl.int64) * stride_dym + offs_n[None, :]
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in range(0, M, BLOCK_M):
        dy = tl.load(dy_ptrs, mask=(offs_m[:, None] < M - m) & (offs_n[None, :] < N), other=0.0)
        x = tl.load(x_ptrs, mask=(offs_m[:, None] < M - m) & (offs_k[None, :] < K), other=0.0)
        sums = multiply_add(tl.trans(dy), x, sums)
        dy_ptrs += BLOCK_M * stride_dym
        x_ptrs += BLOCK_M * stride_xm
    flat = sums.reshape(BLOCK_N * BLOCK_K)
    for first in range(start, end, PICKS):
        offs = first + tl.arange(0, PICKS)
        mask = offs < end
        position = tl.load(order_ptr + offs, mask=mask, other=0)
        index = tl.load(indices_ptr + position, mask=mask, other=0)
        row = index // K
        local_n = (row - first_n).to(tl.int32)
        local_k = (index - row * K - first_k).to(tl.int32)
        inside = mask & (local_n >= 0) & (local_n < BLOCK_N) & (local_k >= 0) & (local_k < BLOCK_K)
        picked = tl.gather(flat, tl.where(inside, local_n * BLOCK_K + local_k, 0), 0)
        tl.store(out_ptr + position, narrow(picked, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "total"])
def _patch_kernel(weight_ptr, indices_ptr, values_ptr, count, total, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    index = tl.load(indices_ptr + offs, mask=mask, other=0)
    inside = mask & (index >= 0) & (index < total)
    weight = tl.load(weight_ptr + index, mask=inside, other=0.0)
    value = tl.load(values_ptr + offs, mask=mask, other=0.0)
    tl.store(weight_ptr + index, narrow(widen(weight) + value, weight_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "total"])
def _write_kernel(weight_ptr, indices_ptr, base_ptr, values_ptr, count, total, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    index = tl.load(indices_ptr + offs, mask=mask, other=0)
    inside = mask & (index >= 0) & (index < total)
    base = tl.load(base_ptr + offs, mask=mask, other=0.0)
    if values_ptr is not None:
        value = tl.load(values_ptr + offs, mask=mask, other=0.0)
        tl.store(weight_ptr + index, narrow(widen(base) + value, weight_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(weight_ptr + index, convert(base, weight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _address(table_ptr, column: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(table_ptr + column).to(tl.pointer_type(dtype), bitcast=True)
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _rounded(total, element, seed_ptr, tensor_id):
    """float32 total in bfloat16, up with the probability of what is cut off; element is the position in the weight."""
    word0, word1, word2, word3 = words_at(
        tl.load(seed_ptr), element // 8, tensor_id, tl.full((), _STREAM_ROUNDING, tl.int32)
    )
    draw = element % 8
    word = tl.where(draw < 4, tl.where(draw < 2, word0, word1), tl.where(draw < 6, word2, word3))
    draw_bits = tl.where(draw % 2 == 0, word & 0xFFFF, word >> 16)
    bits = total.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    up = ((bits + draw_bits) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where(finite, up, narrow(total, tl.bfloat16))


@triton.jit
def _adamw_block(
    row_ptr,
    first,
    count,
    hyper_ptr,
    corrections_ptr,
    seed_ptr,
    ages,
    WEIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    AGE: tl.constexpr,
    OLDEST: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    offs = first + tl.arange(0, BLOCK)
    if FULL:
        mask = tl.full((BLOCK,), True, tl.int1)
    else:
        mask = offs < count
    value_ptrs = _address(row_ptr, 0, tl.float32, True) + offs
    avg_ptrs = _address(row_ptr, 2, tl.float32, True) + offs
    sq_ptrs = _address(row_ptr, 3, tl.float32, True) + offs
    age_ptrs = _address(row_ptr, 4, AGE, True) + offs
    lr = tl.load(hyper_ptr)
    grad = tl.load(_address(row_ptr, 1, tl.float32, True) + offs, mask=mask, other=0.0)
    age = tl.load(age_ptrs, mask=mask, other=0).to(tl.int32)
    age = tl.where(age == OLDEST, age, age + 1)
    at = tl.minimum(tl.maximum(age, 0), ages - 1)
    correction1 = tl.load(corrections_ptr + at, mask=mask, other=1.0)
    correction2 = tl.load(corrections_ptr + ages + at, mask=mask, other=1.0)
    average = tl.load(avg_ptrs, mask=mask, other=0.0) * tl.load(hyper_ptr + 1) + grad * tl.load(hyper_ptr + 2)
    second = tl.load(sq_ptrs, mask=mask, other=0.0) * tl.load(hyper_ptr + 3) + (grad * tl.load(hyper_ptr + 4)) * grad
    step = tl.div_rn((lr * correction1) * average, tl.sqrt_rn(second) * correction2 + tl.load(hyper_ptr + 5))
    value = tl.load(value_ptrs, mask=mask, other=0.0) * tl.load(hyper_ptr + 6) - step
    tl.store(avg_ptrs, narrow(average, tl.float32), mask=mask)
    tl.store(sq_ptrs, narrow(second, tl.float32), mask=mask)
    tl.store(age_ptrs, narrow(age, AGE), mask=mask)
    tl.store(value_ptrs, narrow(value, tl.float32), mask=mask)
    if WEIGHT is not None:
        index = tl.load(_address(row_ptr, 6, INDEX, False) + offs, mask=mask, other=0)
        inside = mask & (index >= 0) & (index < tl.load(row_ptr + 9))
        base = tl.load(_address(row_ptr, 7, WEIGHT, False) + offs, mask=mask, other=0.0)
        total = widen(base) + value
        weight_ptrs = _address(row_ptr, 5, WEIGHT, False) + index
        if seed_ptr is not None and WEIGHT == tl.bfloat16:
            rounded = _rounded(total, index.to(tl.int64), seed_ptr, tl.load(row_ptr + 10))
            tl.store(weight_ptrs, convert(rounded, WEIGHT), mask=inside)
        else:
            tl.store(weight_ptrs, narrow(total, WEIGHT), mask=inside)


@triton.jit(do_not_specialize=["ages"])
def _sparse_adamw_kernel(
    table_ptr,
    layer_ptr,
    first_ptr,
    hyper_ptr,
    corrections_ptr,
    seed_ptr,
    ages,
    WEIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    AGE: tl.constexpr,
    OLDEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one layer. Every operation is rounded alone: the kernel must be compiled with enable_fp_fusion=False."""
    row_ptr = table_ptr + tl.load(layer_ptr + tl.program_id(0)).to(tl.int64) * _TABLE_COLUMNS
    first = tl.multiple_of(tl.load(first_ptr + tl.program_id(0)), 16)
    count = tl.load(row_ptr + 8)
    # A full block needs no mask, and without one every access to a float32 array is of 16 bytes.
    if first + BLOCK <= count:
        _adamw_block(
            row_ptr, first, count, hyper_ptr, corrections_ptr, seed_ptr, ages, WEIGHT, INDEX, AGE, OLDEST, BLOCK, True
        )
    else:
        _adamw_block(
            row_ptr, first, count, hyper_ptr, corrections_ptr, seed_ptr, ages, WEIGHT, INDEX, AGE, OLDEST, BLOCK, False
        )


def sparse_delta_gather(
    dyt: torch.Tensor, xt: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype, config
) -> torch.Tensor:
    """The entries of dyᵀ x at ``indices`` from the operands transposed: dyt ``[N, padded]`` and xt ``[K, padded]``, contiguous, zeros
    behind their rows, ``padded`` a multiple of block_m."""
    out = torch.empty(indices.shape, dtype=dtype, device=dyt.device)
    if out.numel():
        _gather_kernel[(triton.cdiv(out.numel(), config.block_s),)](
            dyt,
            xt,
            indices,
            out,
            out.numel(),
            dyt.shape[0] * xt.shape[0],
            xt.shape[0],
            dyt.shape[1],
            BLOCK_S=config.block_s,
            BLOCK_M=config.block_m,
            num_warps=config.num_warps,
        )
    return out


def sparse_delta_tiled(
    dy: torch.Tensor,
    x: torch.Tensor,
    indices: torch.Tensor,
    order: torch.Tensor,
    tiles: torch.Tensor,
    starts: torch.Tensor,
    dtype: torch.dtype,
    config,
) -> torch.Tensor:
    """The same from the tiles of dyᵀ x listed in ``tiles``; the entries of tile t are ``order[starts[t]:starts[t + 1]]``. dy and x
    have contiguous rows. Entries of no tile are 0."""
    out = torch.zeros(indices.shape, dtype=dtype, device=dy.device)
    if out.numel() and tiles.numel():
        _tile_kernel[(tiles.numel(),)](
            dy,
            x,
            indices,
            order,
            tiles,
            starts,
            out,
            dy.shape[0],
            dy.shape[1],
            x.shape[1],
            dy.stride(0),
            x.stride(0),
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_M=config.block_m,
            PICKS=config.picks,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def sparse_delta_patch_(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, config) -> None:
    """weight[indices] += values, each sum rounded once."""
    if indices.numel():
        _patch_kernel[(triton.cdiv(indices.numel(), config.block),)](
            weight, indices, values, indices.numel(), weight.numel(), BLOCK=config.block, num_warps=config.num_warps
        )


def sparse_delta_write_(
    weight: torch.Tensor, indices: torch.Tensor, base: torch.Tensor, values: torch.Tensor | None, config
) -> None:
    """weight[indices] = base + values, rounded once, or base."""
    if indices.numel():
        _write_kernel[(triton.cdiv(indices.numel(), config.block),)](
            weight,
            indices,
            base,
            values,
            indices.numel(),
            weight.numel(),
            BLOCK=config.block,
            num_warps=config.num_warps,
        )


def sparse_adamw_(
    table: torch.Tensor,
    layer: torch.Tensor,
    first: torch.Tensor,
    hyper: torch.Tensor,
    corrections: torch.Tensor,
    seed: torch.Tensor | None,
    dtype: torch.dtype | None,
    index_dtype: torch.dtype,
    age_dtype: torch.dtype,
    config,
) -> None:
    """One step for all layers of ``table``, int64 ``[layers, 11]``: the addresses of values, grads, exp_avg, exp_avg_sq, age, weight,
    indices and base, the first five multiples of 16; active weights; weights; tensor id. ``layer`` and ``first``: of each program."""
    if layer.numel():
        _sparse_adamw_kernel[(layer.numel(),)](
            table,
            layer,
            first,
            hyper,
            corrections,
            seed,
            corrections.shape[1],
            WEIGHT=None if dtype is None else _DTYPES[dtype],
            INDEX=_INTEGERS[index_dtype],
            AGE=_INTEGERS[age_dtype],
            OLDEST=torch.iinfo(age_dtype).max,
            BLOCK=config.block,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
