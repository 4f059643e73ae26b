"""A few rows times a 4-bit weight in Triton, decoded on the way into the product (the definition is
peftfast.reference.nf4)."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .nf4 import has_words, indices_of
from .numerics import convert, multiply_add, narrow, settled, widen
from .partials import divide, partials_of, reduce_partials

_NESTED_BITS = tl.constexpr(8)  # 256 maxima share one of the second level


@triton.jit(do_not_specialize=["steps"])
def _nf4_linear_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    row_bytes,
    steps,
    stride_xm,
    stride_xk,
    BLOCK_BITS: tl.constexpr,
    WORDS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[M, N] = x Wᵀ + bias for one tile of BLOCK_N weight rows and all of up to BLOCK_M rows of x; of K the blocks of one part,
    ``steps`` of BLOCK_K columns, with the bias in the first.

    BLOCK_K divides K and the block size, 2 ** BLOCK_BITS, so that a step has one maximum a row. WORDS: four bytes can be loaded as a
    word. The weight is rounded to COMPUTE as the dequantiser rounds it.
    """
    UNITS: tl.constexpr = BLOCK_K // 8 if WORDS else BLOCK_K // 2
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    mask_m, mask_n = offs_m < M, offs_n < N
    row = tl.where(mask_n, offs_n, 0).to(tl.int64)
    if WORDS:
        units_row = packed_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + row[:, None] * (row_bytes // 4)
    else:
        units_row = packed_ptr + row[:, None] * row_bytes
    units_row += tl.arange(0, UNITS)[None, :]
    x_row = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    x_row += tl.arange(0, BLOCK_K).to(tl.int64)[None, :] * stride_xk
    code = tl.load(code_ptr + tl.arange(0, 16))
    if nested_absmax_ptr is not None:
        offset = tl.load(nested_offset_ptr)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(part * steps * BLOCK_K, min(K, (part + 1) * steps * BLOCK_K), BLOCK_K):
        units = tl.load(units_row + (k // 8 if WORDS else k // 2))
        block = (row * K + k) >> BLOCK_BITS
        absmax = tl.load(absmax_ptr + block)
        if nested_absmax_ptr is not None:
            nested = tl.load(nested_absmax_ptr + (block >> _NESTED_BITS))
            absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested + offset
        index = indices_of(units, False)
        values = tl.gather(code, index.reshape(BLOCK_N * BLOCK_K), 0).reshape(BLOCK_N, BLOCK_K)
        x = convert(
            tl.load(x_row + (k + tl.full((), 0, tl.int64)) * stride_xk, mask=mask_m[:, None], other=0.0), COMPUTE
        )
        accumulator = multiply_add(narrow(values * absmax[:, None], COMPUTE), tl.trans(x), accumulator)
        accumulator = settled(accumulator, True)
    if bias_ptr is not None:
        mask_first = offs_n < tl.where(part == 0, N, 0)
        accumulator += widen(tl.load(bias_ptr + offs_n, mask=mask_first, other=0.0))[:, None]
    offs = (part.to(tl.int64) * M + offs_m)[None, :] * N + offs_n[:, None]
    tl.store(y_ptr + offs, narrow(accumulator, y_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def nf4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    block_size: int,
    shape: tuple[int, int],
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    compute: torch.dtype,
    y: torch.Tensor,
    config,
) -> torch.Tensor:
    """x Wᵀ + bias into ``y``, contiguous ``[M, N]``; returns it.

    x: ``[M, K]`` of any strides, rounded to ``compute``, bfloat16 or float16, on the way. K is a multiple of the smaller
        of the block size and ``config.block_k``. The weight's tensors are contiguous, bias is ``[N]``. Sums are float32, in
        ``config.splits`` parts.
    """
    N, K = shape
    M = x.shape[0]
    if M == 0 or N == 0:
        return y
    block_m, block_k = max(16, min(64, triton.next_power_of_2(M))), min(config.block_k, block_size)
    steps, splits = divide(triton.cdiv(K, block_k), config.splits)
    partials = partials_of(splits, y)
    launch(
        _nf4_linear_kernel,
        (triton.cdiv(N, config.block_n), triton.cdiv(M, block_m), splits),
        x,
        packed,
        absmax,
        code,
        nested_absmax,
        nested_code,
        nested_offset,
        None if bias is None else bias.contiguous(),
        partials,
        M,
        N,
        K,
        K // 2,
        steps,
        x.stride(0),
        x.stride(1),
        BLOCK_BITS=block_size.bit_length() - 1,
        WORDS=has_words(packed, K),
        COMPUTE=_TRITON_DTYPES[compute],
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    reduce_partials(partials, y, 1.0)
    return y
