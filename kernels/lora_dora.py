"""What DoRA needs beside the passes of LoRA, in Triton (definitions: peftfast.reference.lora)."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .numerics import convert, multiply_add, narrow, widen
from .partials import divide, partials_of, reduce_partials
from .philox import keep_scale, keep_threshold, kept_or


@triton.jit(do_not_specialize=["M"])
def _lora_dora_expand_kernel(
    base_ptr,
    plain_ptr,
    s_ptr,
    w_ptr,
    lora_bias_ptr,
    gain_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    M,
    N,
    R,
    scaling,
    stride_basem,
    stride_basen,
    stride_plainm,
    stride_plainn,
    stride_sm,
    stride_sr,
    stride_wn,
    stride_wr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """delta = scaling * (s wᵀ + lora_bias), inner = base - bias, z = inner + delta, y = (plain or base) + (gain - 1) * inner + gain *
    delta, which is base's own bits where the gain is 1 and delta 0; y and z contiguous; one tile a program, N fastest."""
    blocks_n = tl.cdiv(N, BLOCK_C)
    offs_m = (tl.program_id(0) // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % blocks_n * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    base_tile = base_ptr + offs_m[:, None] * stride_basem + offs_n[None, :].to(tl.int64) * stride_basen
    base = widen(tl.load(base_tile, mask=mask, other=0.0))
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
    if lora_bias_ptr is not None:
        accumulator += widen(tl.load(lora_bias_ptr + offs_n, mask=mask_n, other=0.0))[None, :]
    delta = accumulator * scaling
    inner = base
    if bias_ptr is not None:
        inner = base - widen(tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0))[None, :]
    out = offs_m[:, None] * N + offs_n[None, :]
    tl.store(z_ptr + out, narrow(inner + delta, z_ptr.dtype.element_ty), mask=mask)
    y = base
    if plain_ptr is not None:
        plain_tile = plain_ptr + offs_m[:, None] * stride_plainm + offs_n[None, :].to(tl.int64) * stride_plainn
        y = widen(tl.load(plain_tile, mask=mask, other=0.0))
    gain = widen(tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0))[None, :]
    y += (gain - 1.0) * inner
    y += gain * delta
    tl.store(y_ptr + out, narrow(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
def _lora_gain_grads_kernel(
    dy_ptr,
    z_ptr,
    factor_ptr,
    out_ptr,
    sums_ptr,
    M,
    N,
    blocks_per_split,
    stride_dym,
    stride_dyn,
    stride_zm,
    stride_zn,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = factor * dy and sums[split] = the sum of dy * z over the split's rows; grid (N blocks, splits of M)."""
    offs_n = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    mask_n = offs_n < N
    factor = widen(tl.load(factor_ptr + offs_n, mask=mask_n, other=0.0))
    total = tl.zeros((BLOCK_C,), tl.float32)
    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(M, BLOCK_M))
    for block in range(first_block, last_block):
        offs_m = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        dy_tile = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :].to(tl.int64) * stride_dyn
        z_tile = z_ptr + offs_m[:, None] * stride_zm + offs_n[None, :].to(tl.int64) * stride_zn
        dy = widen(tl.load(dy_tile, mask=mask, other=0.0))
        total += tl.sum(dy * widen(tl.load(z_tile, mask=mask, other=0.0)), axis=0)
        out_tile = out_ptr + offs_m[:, None] * N + offs_n[None, :]
        tl.store(out_tile, narrow(dy * factor[None, :], out_ptr.dtype.element_ty), mask=mask)
    sums = sums_ptr + split.to(tl.int64) * N + offs_n
    tl.store(sums, narrow(total, sums_ptr.dtype.element_ty), mask=mask_n)


@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_dropout_add_kernel(
    base_ptr,
    x_ptr,
    seed_ptr,
    out_ptr,
    M,
    N,
    scale,
    threshold,
    stride_basem,
    stride_basen,
    stride_xm,
    stride_xn,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = base + dropout(x), contiguous; one tile a program, N fastest."""
    blocks_n = tl.cdiv(N, BLOCK_C)
    first_row = (tl.program_id(0) // blocks_n).to(tl.int64) * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(0) % blocks_n * BLOCK_C
    offs_n = first_column + tl.arange(0, BLOCK_C)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x_tile = x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :].to(tl.int64) * stride_xn
    x = tl.load(x_tile, mask=mask, other=0.0)
    if seed_ptr is not None:
        x = kept_or(x, None, tl.load(seed_ptr), first_row, first_column, N, threshold, BLOCK_M, BLOCK_C)
    value = widen(x) * scale
    if base_ptr is not None:
        base_tile = base_ptr + offs_m[:, None] * stride_basem + offs_n[None, :].to(tl.int64) * stride_basen
        value += widen(tl.load(base_tile, mask=mask, other=0.0))
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], narrow(value, out_ptr.dtype.element_ty), mask=mask)


def lora_dora_expand(
    base: torch.Tensor,
    plain: torch.Tensor | None,
    s: torch.Tensor,
    w: torch.Tensor,
    lora_bias: torch.Tensor | None,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z = base - bias + delta in base's dtype and y = (plain or base) + (gain - 1) * (base - bias) + gain * delta of
    ``dtype``, with delta = scaling * (s wᵀ + lora_bias): base and plain
    ``[M, N]``, s ``[M, R]``, w ``[N, R]`` of any strides, vectors ``[N]`` contiguous."""
    M, N = base.shape
    y = torch.empty((M, N), dtype=dtype, device=base.device)
    z = torch.empty((M, N), dtype=base.dtype, device=base.device)
    if not (M and N):
        return y, z
    launch(
        _lora_dora_expand_kernel,
        (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_c),),
        base,
        plain,
        s,
        w,
        lora_bias,
        gain,
        bias,
        y,
        z,
        M,
        N,
        s.shape[1],
        scaling,
        base.stride(0),
        base.stride(1),
        0 if plain is None else plain.stride(0),
        0 if plain is None else plain.stride(1),
        s.stride(0),
        s.stride(1),
        w.stride(0),
        w.stride(1),
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y, z


def lora_gain_grads(
    dy: torch.Tensor, z: torch.Tensor, factor: torch.Tensor, config
) -> tuple[torch.Tensor, torch.Tensor]:
    """factor * dy in dy's dtype and the sum over rows of dy * z in factor's: dy and z ``[M, N]`` of any strides, factor
    ``[N]`` contiguous."""
    M, N = dy.shape
    out = torch.empty((M, N), dtype=dy.dtype, device=dy.device)
    sums = torch.empty((N,), dtype=factor.dtype, device=dy.device)
    if not (M and N):
        return out, sums.zero_()
    blocks_per_split, splits = divide(triton.cdiv(M, config.block_m), config.splits)
    partials = partials_of(splits, sums)
    launch(
        _lora_gain_grads_kernel,
        (triton.cdiv(N, config.block_c), splits),
        dy,
        z,
        factor,
        out,
        partials,
        M,
        N,
        blocks_per_split,
        dy.stride(0),
        dy.stride(1),
        z.stride(0),
        z.stride(1),
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )
    reduce_partials(partials, sums, 1.0)
    return out, sums


def lora_dropout_add(
    base: torch.Tensor | None, x: torch.Tensor, seed: torch.Tensor, p: float, dtype: torch.dtype, config
) -> torch.Tensor:
    """base + dropout(x) of ``dtype``, contiguous: base, which may be None, and x ``[M, N]`` of any strides."""
    M, N = x.shape
    out = torch.empty((M, N), dtype=dtype, device=x.device)
    if not (M and N):
        return out
    launch(
        _lora_dropout_add_kernel,
        (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_c),),
        base,
        x,
        seed if p > 0.0 else None,
        out,
        M,
        N,
        keep_scale(p),
        keep_threshold(p),
        0 if base is None else base.stride(0),
        0 if base is None else base.stride(1),
        x.stride(0),
        x.stride(1),
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )
    return out
