"""The LoRA side passes in Triton (definitions: peftfast.reference.lora).

All four are bound by one pass over a wide matrix (x, base or dy) and multiply it with a narrow one of rank R, so each
program holds all of R up to BLOCK_R = 128 and meets the wide matrix once; larger ranks are cut into blocks on a grid
axis of their own and meet it once a block. Products accumulate in float32 and are rounded once. Sums that are cut
among programs go to a float32 workspace and are added in a fixed order by _reduce_partials_kernel: no atomics, the
same bits every run.

Dropout is regenerated from (seed, row, column) and never read from memory. Kernels only select; the factor
keep_scale(p) is part of ``scaling``, which commutes with every sum here and so costs no rounding.
"""

import torch
import triton
import triton.language as tl

from .launch import launch
from .numerics import convert, factor_of, multiply_add, multiply_add_in, narrow, settled, widen
from .partials import divide, partials_of, reduce_partials, reduce_two
from .philox import keep_scale, keep_threshold, keep_tile, kept_or, tied_to

COMPUTE_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# M changes with every batch: not specialised, so that one variant serves all. K, N, R and the strides belong to the
# layer; Triton specialises them on 1 and on multiples of 16, which is what makes 16-byte loads.
@triton.jit(do_not_specialize=["M", "threshold", "blocks_per_split"])
def _lora_shrink_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    seed_ptr,
    M,
    K,
    R,
    scaling,
    threshold,
    blocks_per_split,
    stride_xm,
    stride_xk,
    stride_wr,
    stride_wk,
    EIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[split, m, r] = scaling * sum over the split's k of dropout(x)[m, k] w[r, k]; grid (M blocks, R blocks,
    splits of K)."""
    if EIGHT:  # see eights
        R = R // 8 * 8
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    columns = tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_r = offs_r < R
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    w_columns = w_ptr + offs_r[None, :].to(tl.int64) * stride_wr
    accumulator = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(K, BLOCK_C))
    for block in range(first_block, last_block):
        offs_k = block * BLOCK_C + columns
        mask_k = offs_k < K
        x_tile = tl.load(
            x_rows + offs_k[None, :].to(tl.int64) * stride_xk, mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )
        w_tile = tl.load(
            w_columns + offs_k[:, None].to(tl.int64) * stride_wk, mask=mask_k[:, None] & mask_r[None, :], other=0.0
        )
        x_tile = factor_of(x_tile, COMPUTE)
        if seed_ptr is not None:
            x_tile = kept_or(x_tile, None, seed, first_row, block * BLOCK_C, K, threshold, BLOCK_M, BLOCK_C)
        accumulator = multiply_add_in(x_tile, w_tile, accumulator, COMPUTE)
        accumulator = settled(accumulator, seed_ptr is not None or x_ptr.dtype.element_ty != COMPUTE)
    out_tile = out_ptr + (split.to(tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :]
    tl.store(out_tile, narrow(accumulator * scaling, out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_expand_kernel(
    base_ptr,
    s_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    seed_ptr,
    M,
    N,
    R,
    scaling,
    threshold,
    stride_basem,
    stride_basen,
    stride_sm,
    stride_sr,
    stride_wn,
    stride_wr,
    stride_om,
    stride_on,
    EIGHT: tl.constexpr,
    EIGHT_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = base + dropout(scaling * (s wᵀ + bias)); one tile a program, N fastest. A tile reads its base before it
    writes, so out may be base."""
    if EIGHT:  # see eights
        R, stride_sm = R // 8 * 8, stride_sm // 8 * 8
    if EIGHT_W:
        stride_wn = stride_wn // 8 * 8
    blocks_n = tl.cdiv(N, BLOCK_C)
    pid_m = tl.program_id(0) // blocks_n
    pid_n = tl.program_id(0) % blocks_n
    first_row = pid_m.to(tl.int64) * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    first_column = pid_n * BLOCK_C
    offs_n = first_column + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    base_tile = base_ptr + offs_m[:, None] * stride_basem + offs_n[None, :].to(tl.int64) * stride_basen
    base = tl.load(base_tile, mask=mask, other=0.0)
    accumulator = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first_r in range(0, R, BLOCK_R):
        offs_r = first_r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        s_tile = tl.load(
            s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :].to(tl.int64) * stride_sr,
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )
        w_tile = tl.load(
            w_ptr + offs_n[None, :].to(tl.int64) * stride_wn + offs_r[:, None].to(tl.int64) * stride_wr,
            mask=mask_r[:, None] & mask_n[None, :],
            other=0.0,
        )
        accumulator = multiply_add(s_tile, convert(w_tile, s_ptr.dtype.element_ty), accumulator)
    if bias_ptr is not None:
        accumulator += widen(tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0))[None, :]
    delta = accumulator * scaling
    out_tile = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :].to(tl.int64) * stride_on
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        if base.dtype.primitive_bitwidth == 16 and base.dtype == out_ptr.dtype.element_ty:
            # Where an element is dropped base stays as it is.
            result = narrow(widen(base) + delta, base.dtype)
            result = kept_or(result, base, seed, first_row, first_column, N, threshold, BLOCK_M, BLOCK_C)
            tl.store(out_tile, convert(result, out_ptr.dtype.element_ty), mask=mask)
        else:
            keep = keep_tile(seed, first_row, first_column, N, threshold, BLOCK_M, BLOCK_C)
            delta = tl.where(tied_to(base, keep), delta, 0.0)
            tl.store(out_tile, narrow(widen(base) + delta, out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_tile, narrow(widen(base) + delta, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def places_of_x(rows, offs_k, stride_xm, stride_xk, MASKED: tl.constexpr):
    """Where a tile of x lies that transposed_x reads: by rows where it is MASKED, since a mask is drawn by rows; else as the product
    takes it, transposed: turned behind the load, float32 would be read 4 bytes at a time."""
    if MASKED:
        return rows[:, None].to(tl.int64) * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    else:
        return offs_k[:, None].to(tl.int64) * stride_xk + rows[None, :].to(tl.int64) * stride_xm


@triton.jit
def transposed_x(
    x_ptrs,
    mask_m,
    mask_k,
    seed,
    first_row,
    first_column,
    K,
    threshold,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dropout(x)ᵀ of a tile, ``[BLOCK_C, BLOCK_M]`` as multiply_add_in takes it; seed is None where nothing is dropped."""
    if seed is not None:
        x_tile = factor_of(tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0), COMPUTE)
        return tl.trans(kept_or(x_tile, None, seed, first_row, first_column, K, threshold, BLOCK_M, BLOCK_C))
    else:
        return factor_of(tl.load(x_ptrs, mask=mask_k[:, None] & mask_m[None, :], other=0.0), COMPUTE)


@triton.jit(do_not_specialize=["M", "threshold", "blocks_per_split"])
def _lora_weight_grad_kernel(
    ds_ptr,
    x_ptr,
    out_ptr,
    seed_ptr,
    M,
    K,
    R,
    scaling,
    threshold,
    blocks_per_split,
    stride_dsm,
    stride_dsr,
    stride_xm,
    stride_xk,
    stride_split,
    stride_or,
    stride_ok,
    EIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[split, r, k] = scaling * sum over the split's m of ds[m, r] dropout(x)[m, k]; grid (K blocks, R blocks,
    splits of M).

    The product is formed transposed, [BLOCK_C, BLOCK_R]: K fills the 64 rows of a tensor core instruction, R = 16
    would not.
    """
    if EIGHT:  # see eights
        R, stride_dsm = R // 8 * 8, stride_dsm // 8 * 8
    first_column = tl.program_id(0) * BLOCK_C
    offs_k = first_column + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    mask_k = offs_k < K
    mask_r = offs_r < R
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    # Places in a tile, which stay, apart from the tile's place.
    x_places = places_of_x(rows, offs_k, stride_xm, stride_xk, seed_ptr is not None)
    ds_places = rows[:, None].to(tl.int64) * stride_dsm + offs_r[None, :].to(tl.int64) * stride_dsr
    accumulator = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(M, BLOCK_M))
    for block in range(first_block, last_block):
        first_row = block * tl.full((), BLOCK_M, tl.int64)
        mask_m = rows < M - first_row
        x_block = x_ptr + first_row * stride_xm
        ds_tile = tl.load(
            ds_ptr + first_row * stride_dsm + ds_places, mask=mask_m[:, None] & mask_r[None, :], other=0.0
        )
        x_tile = transposed_x(
            x_block + x_places, mask_m, mask_k, seed, first_row, first_column, K, threshold, COMPUTE, BLOCK_M, BLOCK_C
        )
        accumulator = multiply_add_in(x_tile, ds_tile, accumulator, COMPUTE)
        accumulator = settled(accumulator, seed_ptr is not None or x_ptr.dtype.element_ty != COMPUTE)
    out_tile = (
        out_ptr
        + split.to(tl.int64) * stride_split
        + offs_r[None, :].to(tl.int64) * stride_or
        + offs_k[:, None].to(tl.int64) * stride_ok
    )
    tl.store(out_tile, narrow(accumulator * scaling, out_ptr.dtype.element_ty), mask=mask_k[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
def _lora_dy_grads_kernel(
    dy_ptr,
    s_ptr,
    b_ptr,
    ds_ptr,
    db_ptr,
    M,
    N,
    R,
    ds_scaling,
    db_scaling,
    blocks_per_split,
    stride_dym,
    stride_dyn,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    EIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Both products of dy from one reading of it; grid (N blocks, R blocks, splits of M).

    A program owns a strip of BLOCK_C columns and walks down its rows: ds[n block, m, r] = ds_scaling * dy b over the
    strip leaves as a partial sum at every step, db[split, n, r] = db_scaling * dyᵀ s stays in registers to the end.
    """
    if EIGHT:  # see eights
        R, stride_sm, stride_bn = R // 8 * 8, stride_sm // 8 * 8, stride_bn // 8 * 8
    pid_n = tl.program_id(0)
    offs_n = pid_n * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    mask_n = offs_n < N
    mask_r = offs_r < R
    mask_nr = mask_n[:, None] & mask_r[None, :]
    b_tile = tl.load(
        b_ptr + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br,
        mask=mask_nr,
        other=0.0,
    )
    b_tile = convert(b_tile, dy_ptr.dtype.element_ty)
    dy_columns = dy_ptr + offs_n[None, :].to(tl.int64) * stride_dyn
    s_columns = s_ptr + offs_r[None, :].to(tl.int64) * stride_sr
    db = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(M, BLOCK_M))
    for block in range(first_block, last_block):
        offs_m = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mask_mr = mask_m[:, None] & mask_r[None, :]
        dy_tile = tl.load(dy_columns + offs_m[:, None] * stride_dym, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        s_tile = tl.load(s_columns + offs_m[:, None] * stride_sm, mask=mask_mr, other=0.0)
        db = multiply_add(tl.trans(dy_tile), convert(s_tile, dy_ptr.dtype.element_ty), db)
        ds = multiply_add(dy_tile, b_tile, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
        ds_tile = ds_ptr + (pid_n.to(tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :]
        tl.store(ds_tile, narrow(ds * ds_scaling, ds_ptr.dtype.element_ty), mask=mask_mr)
    db_tile = db_ptr + (split.to(tl.int64) * N + offs_n[:, None]) * R + offs_r[None, :]
    tl.store(db_tile, narrow(db * db_scaling, db_ptr.dtype.element_ty), mask=mask_nr)


def eights(R: int, *matrices: torch.Tensor) -> bool:
    """Whether the rank is an odd multiple of eight, as PEFT's default is, and so are the rows of matrices ``[.., R]``. The compiler
    itself looks for multiples of sixteen alone, and would move these matrices element by element: a kernel then writes the numbers as
    multiples of eight, since tl.multiple_of does nothing for arguments."""
    return R % 16 == 8 and all(one.stride(1) == 1 and one.stride(0) % 8 == 0 for one in matrices)


def _dropout_arguments(seed: torch.Tensor | None, p: float) -> tuple[torch.Tensor | None, int, float]:
    """What a kernel needs of (seed, p): the seed or None, the threshold, and the factor that joins scaling."""
    if seed is None or p == 0.0:
        return None, 0, 1.0
    return seed, keep_threshold(p), keep_scale(p)


def lora_shrink(
    x: torch.Tensor,
    w: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
    config,
) -> torch.Tensor:
    """scaling * dropout(x) wᵀ: x ``[M, K]`` and w ``[R, K]`` of any strides and any of the three dtypes -> ``[M, R]``
    of ``dtype``, in which the products are formed."""
    M, K = x.shape
    R = w.shape[0]
    if not (M and K and R):
        return torch.zeros((M, R), dtype=dtype, device=x.device)
    out = torch.empty((M, R), dtype=dtype, device=x.device)
    seed, threshold, keep = _dropout_arguments(seed, p)
    blocks_per_split, splits = divide(triton.cdiv(K, config.block_c), config.splits)
    partials = partials_of(splits, out)
    launch(
        _lora_shrink_kernel,
        (triton.cdiv(M, config.block_m), triton.cdiv(R, config.block_r), splits),
        x,
        w,
        partials,
        seed,
        M,
        K,
        R,
        scaling * keep if splits == 1 else 1.0,
        threshold,
        blocks_per_split,
        x.stride(0),
        x.stride(1),
        w.stride(0),
        w.stride(1),
        EIGHT=eights(R),
        COMPUTE=COMPUTE_DTYPES[dtype],
        **_blocks(config),
    )
    reduce_partials(partials, out, scaling * keep)
    return out


def lora_expand(
    base: torch.Tensor,
    s: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    scaling: float,
    out: torch.Tensor,
    config,
) -> torch.Tensor:
    """out = base + dropout(scaling * (s wᵀ + bias)), rounded once, for base and out ``[M, N]``, s ``[M, R]`` and w
    ``[N, R]`` of any strides and bias ``[N]``, contiguous. out may be base itself, but not another view of its memory.
    Returns out."""
    M, N = base.shape
    if not (M and N):
        return out
    seed, threshold, keep = _dropout_arguments(seed, p)
    launch(
        _lora_expand_kernel,
        (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_c),),
        base,
        s,
        w,
        bias,
        out,
        seed,
        M,
        N,
        s.shape[1],
        scaling * keep,
        threshold,
        base.stride(0),
        base.stride(1),
        s.stride(0),
        s.stride(1),
        w.stride(0),
        w.stride(1),
        out.stride(0),
        out.stride(1),
        EIGHT=eights(s.shape[1], s),
        EIGHT_W=eights(s.shape[1], w),
        **_blocks(config),
    )
    return out


def lora_weight_grad(
    ds: torch.Tensor,
    x: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
    config,
) -> torch.Tensor:
    """scaling * dsᵀ dropout(x): ds ``[M, R]`` and x ``[M, K]`` of any strides -> ``[R, K]`` of ``dtype``; products in
    ds's dtype."""
    R, K = ds.shape[1], x.shape[1]
    return _weight_grad(ds, x, seed, p, scaling, torch.empty((R, K), dtype=dtype, device=x.device), False, config)


def _weight_grad(
    ds: torch.Tensor,
    x: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    scaling: float,
    out: torch.Tensor,
    transposed: bool,
    config,
) -> torch.Tensor:
    """scaling * dsᵀ dropout(x) into a contiguous out ``[R, K]``, or its transpose into ``[K, R]``."""
    M, K = x.shape
    R = ds.shape[1]
    if not (M and K and R):
        return out.zero_()
    seed, threshold, keep = _dropout_arguments(seed, p)
    blocks_per_split, splits = divide(triton.cdiv(M, config.block_m), config.splits)
    partials = partials_of(splits, out)
    launch(
        _lora_weight_grad_kernel,
        (triton.cdiv(K, config.block_c), triton.cdiv(R, config.block_r), splits),
        ds,
        x,
        partials,
        seed,
        M,
        K,
        R,
        scaling * keep if splits == 1 else 1.0,
        threshold,
        blocks_per_split,
        ds.stride(0),
        ds.stride(1),
        x.stride(0),
        x.stride(1),
        R * K,
        1 if transposed else K,
        R if transposed else 1,
        EIGHT=eights(R, ds),
        COMPUTE=COMPUTE_DTYPES[ds.dtype],
        **_blocks(config),
    )
    reduce_partials(partials, out, scaling * keep)
    return out


def lora_dy_grads(
    dy: torch.Tensor, s: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype, config
) -> tuple[torch.Tensor, torch.Tensor]:
    """ds = scaling * dy b ``[M, R]`` in dy's dtype and db = scaling * dyᵀ s ``[N, R]`` of ``dtype``, for dy ``[M,
    N]``, s ``[M, R]`` and b ``[N, R]`` of any strides.

    One reading of dy with ``config.one_pass``; without it two, by the kernels of shrink and weight_grad, which have no
    partial sums of ds to write.
    """
    M, N = dy.shape
    R = b.shape[1]
    if config.one_pass is None:
        ds = lora_shrink(dy, b.T, None, 0.0, scaling, dy.dtype, config.ds_pass)
        db = torch.empty((N, R), dtype=dtype, device=dy.device)
        return ds, _weight_grad(s, dy, None, 0.0, scaling, db, True, config.db_pass)
    config = config.one_pass
    ds = torch.empty((M, R), dtype=dy.dtype, device=dy.device)
    db = torch.empty((N, R), dtype=dtype, device=dy.device)
    if not (M and N and R):
        return ds.zero_(), db.zero_()
    blocks_n = triton.cdiv(N, config.block_c)
    blocks_per_split, splits = divide(triton.cdiv(M, config.block_m), config.splits)
    ds_partials, db_partials = partials_of(blocks_n, ds), partials_of(splits, db)
    launch(
        _lora_dy_grads_kernel,
        (blocks_n, triton.cdiv(R, config.block_r), splits),
        dy,
        s,
        b,
        ds_partials,
        db_partials,
        M,
        N,
        R,
        scaling if blocks_n == 1 else 1.0,
        scaling if splits == 1 else 1.0,
        blocks_per_split,
        dy.stride(0),
        dy.stride(1),
        s.stride(0),
        s.stride(1),
        b.stride(0),
        b.stride(1),
        EIGHT=eights(R, s, b),
        **_blocks(config),
    )
    reduce_two(ds_partials, ds, scaling, db_partials, db, scaling)
    return ds, db


def _blocks(config) -> dict[str, int]:
    """The compile-time part of a peftfast.configs.lora.LoraConfig."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c,
        "BLOCK_R": config.block_r,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
