"""A sparse delta in Triton: its gradient by gathered columns and by tiles of dW, and its addition to a weight (the definitions are
peftfast.reference.sparse_delta). Indices outside the weight read and write nothing."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .numerics import convert, multiply_add, narrow, widen


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


@triton.jit(do_not_specialize=["M", "count"])
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
    count,
    stride_dym,
    stride_xm,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PICKS: tl.constexpr,
):
    """One tile of dyᵀ x that holds support: its sums on tensor cores, then the support picked from them. dW is never stored. Whatever
    the tables hold, what is read and written lies in the tensors."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile = tl.load(tiles_ptr + tl.program_id(0))
    tile = tl.minimum(tl.maximum(tile, 0), tl.cdiv(N, BLOCK_N) * tiles_k - 1)
    start = tl.maximum(tl.load(starts_ptr + tl.program_id(0)), 0)
    end = tl.minimum(tl.load(starts_ptr + tl.program_id(0) + 1), count)
    first_n = (tile // tiles_k) * BLOCK_N
    first_k = (tile % tiles_k) * BLOCK_K
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = first_k + tl.arange(0, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    dy_ptrs = dy_ptr + offs_m[:, None].to(tl.int64) * stride_dym + offs_n[None, :]
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
    step = tl.full((), BLOCK_M, tl.int64)
    dy_step, x_step = step * stride_dym, step * stride_xm
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in range(0, M, BLOCK_M):
        dy = tl.load(dy_ptrs, mask=(offs_m[:, None] < M - m) & (offs_n[None, :] < N), other=0.0)
        x = tl.load(x_ptrs, mask=(offs_m[:, None] < M - m) & (offs_k[None, :] < K), other=0.0)
        sums = multiply_add(tl.trans(dy), x, sums)
        dy_ptrs += dy_step
        x_ptrs += x_step
    flat = sums.reshape(BLOCK_N * BLOCK_K)
    for first in range(start, end, PICKS):
        offs = first + tl.arange(0, PICKS)
        mask = offs < end
        position = tl.load(order_ptr + offs, mask=mask, other=0)
        mask = mask & (position >= 0) & (position < count)
        index = tl.load(indices_ptr + position, mask=mask, other=0)
        row = index // K
        local_n = (row - first_n).to(tl.int32)
        local_k = (index - row * K - first_k).to(tl.int32)
        inside = mask & (local_n >= 0) & (local_n < BLOCK_N) & (local_k >= 0) & (local_k < BLOCK_K)
        picked = tl.gather(flat, tl.where(inside, local_n * BLOCK_K + local_k, 0), 0)
        tl.store(out_ptr + position, narrow(picked, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "count"])
def _block_kernel(
    dy_ptr,
    x_ptr,
    blocks_ptr,
    out_ptr,
    M,
    N,
    K,
    count,
    stride_dym,
    stride_xm,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of a square blocks of dyᵀ x in ``blocks``: first row, first column, place and row stride of the result."""
    row_ptr = blocks_ptr + tl.program_id(0).to(tl.int64) * 4
    tiles: tl.constexpr = SIDE // BLOCK
    top = tl.program_id(1) // tiles * BLOCK
    left = tl.program_id(1) % tiles * BLOCK
    row = tl.load(row_ptr)
    column = tl.load(row_ptr + 1)
    start = tl.load(row_ptr + 2)
    stride = tl.load(row_ptr + 3)
    inside = (
        (row >= 0) & (row <= N - SIDE) & (column >= 0) & (column <= K - SIDE) & (row % 16 == 0) & (column % 16 == 0)
    )
    # A stride within the result first: the product of a larger one may wrap around.
    inside = inside & (start >= 0) & (stride >= SIDE) & (stride <= count)
    inside = inside & (start <= count - SIDE - (SIDE - 1) * stride)
    # Multiples of 16, so that an aligned operand is read 16 bytes at a time.
    first_n = tl.multiple_of(tl.where(inside, row, 0), 16) + top
    first_k = tl.multiple_of(tl.where(inside, column, 0), 16) + left
    start = tl.where(inside, start, 0)
    stride = tl.where(inside, stride, 0)
    rows = tl.where(inside, M, 0)
    offs = tl.arange(0, BLOCK)
    offs_m = tl.arange(0, BLOCK_M)
    dy_ptrs = dy_ptr + offs_m[:, None].to(tl.int64) * stride_dym + (first_n + offs)[None, :]
    x_ptrs = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + (first_k + offs)[None, :]
    step = tl.full((), BLOCK_M, tl.int64)
    dy_step, x_step = step * stride_dym, step * stride_xm
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for m in range(0, rows, BLOCK_M):
        mask = offs_m[:, None] < rows - m
        sums = multiply_add(
            tl.trans(tl.load(dy_ptrs, mask=mask, other=0.0)), tl.load(x_ptrs, mask=mask, other=0.0), sums
        )
        dy_ptrs += dy_step
        x_ptrs += x_step
    out_ptrs = out_ptr + start + (top + offs)[:, None] * stride + (left + offs)[None, :]
    # A mask of its rows: a number alone is none in the interpreter of Triton 3.9.
    tl.store(out_ptrs, narrow(sums, out_ptr.dtype.element_ty), mask=offs[:, None] < tl.where(inside, BLOCK, 0))


@triton.jit(do_not_specialize=["M", "count", "steps"])
def _product_kernel(
    y_ptr,
    x_ptr,
    indices_ptr,
    values_ptr,
    M,
    N,
    K,
    count,
    steps,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """y[:, n] += x Δᵀ[:, n] for one row n of the weight, whose run of the ascending indices is found by halving."""
    n = tl.program_id(0)
    first = n.to(tl.int64) * K
    start = first * 0
    end = start + count
    for _ in range(steps):
        middle = (start + end) // 2
        before = tl.load(indices_ptr + tl.minimum(middle, count - 1)) < first
        open_ = start < end
        start = tl.where(open_ & before, middle + 1, start)
        end = tl.where(open_ & (before == 0), middle, end)
    last = start * 0 + count
    end = start
    for _ in range(steps):
        middle = (end + last) // 2
        before = tl.load(indices_ptr + tl.minimum(middle, count - 1)) < first + K
        open_ = end < last
        end = tl.where(open_ & before, middle + 1, end)
        last = tl.where(open_ & (before == 0), middle, last)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = offs_m < M
    x_rows = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm
    # One sum a lane, added up at the end: a sum in parts.
    sums = tl.zeros((BLOCK_M, BLOCK_S), tl.float32)
    for at in range(start, end, BLOCK_S):
        offs_s = at + tl.arange(0, BLOCK_S)
        mask = offs_s < end
        column = tl.load(indices_ptr + offs_s, mask=mask, other=0).to(tl.int64) - first
        inside = mask & (column >= 0) & (column < K)
        value = tl.load(values_ptr + offs_s, mask=inside, other=0.0)
        x = tl.load(x_rows + tl.where(inside, column, 0)[None, :], mask=rows[:, None] & inside[None, :], other=0.0)
        sums += widen(x) * value[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64) * N + n
    total = widen(tl.load(y_ptrs, mask=rows, other=0.0)) + tl.sum(sums, 1)
    tl.store(y_ptrs, narrow(total, y_ptr.dtype.element_ty), mask=rows)


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


def sparse_delta_gather(
    dyt: torch.Tensor, xt: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype, config
) -> torch.Tensor:
    """The entries of dyᵀ x at ``indices`` from the operands transposed: dyt ``[N, padded]`` and xt ``[K, padded]``, contiguous, zeros
    behind their rows, ``padded`` a multiple of block_m."""
    out = torch.empty(indices.shape, dtype=dtype, device=dyt.device)
    if out.numel():
        launch(
            _gather_kernel,
            (triton.cdiv(out.numel(), config.block_s),),
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
        launch(
            _tile_kernel,
            (tiles.numel(),),
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
            out.numel(),
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


def sparse_delta_blocks(
    dy: torch.Tensor,
    x: torch.Tensor,
    blocks: torch.Tensor,
    block_size: int,
    count: int,
    dtype: torch.dtype,
    config,
) -> torch.Tensor:
    """The entries of dyᵀ x in square blocks, int64 ``[blocks, 4]`` as the definition has them, all in one launch. dy and x have
    contiguous rows."""
    out = torch.zeros(count, dtype=dtype, device=dy.device)
    if blocks.shape[0] and count:
        launch(
            _block_kernel,
            (blocks.shape[0], (block_size // config.block_n) ** 2),
            dy,
            x,
            blocks,
            out,
            dy.shape[0],
            dy.shape[1],
            x.shape[1],
            count,
            dy.stride(0),
            x.stride(0),
            SIDE=block_size,
            BLOCK=config.block_n,
            BLOCK_M=config.block_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def sparse_delta_product_(
    y: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, config
) -> None:
    """y += x Δᵀ; y float32 or of x's dtype ``[M, N]``, contiguous, x ``[M, K]`` with contiguous rows."""
    if indices.numel() and y.numel() and x.numel():
        launch(
            _product_kernel,
            (y.shape[1], triton.cdiv(x.shape[0], config.block_m)),
            y,
            x,
            indices,
            values,
            x.shape[0],
            y.shape[1],
            x.shape[1],
            indices.numel(),
            indices.numel().bit_length(),
            x.stride(0),
            BLOCK_M=config.block_m,
            BLOCK_S=config.block_s,
            num_warps=config.num_warps,
        )


def sparse_delta_patch_(weight: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, config) -> None:
    """weight[indices] += values, each sum rounded once."""
    if indices.numel():
        launch(
            _patch_kernel,
            (triton.cdiv(indices.numel(), config.block),),
            weight,
            indices,
            values,
            indices.numel(),
            weight.numel(),
            BLOCK=config.block,
            num_warps=config.num_warps,
        )


def sparse_delta_write_(
    weight: torch.Tensor, indices: torch.Tensor, base: torch.Tensor, values: torch.Tensor | None, config
) -> None:
    """weight[indices] = base + values, rounded once, or base."""
    if indices.numel():
        launch(
            _write_kernel,
            (triton.cdiv(indices.numel(), config.block),),
            weight,
            indices,
            base,
            values,
            indices.numel(),
            weight.numel(),
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
