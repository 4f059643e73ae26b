"""Linear layers in Triton that see both signs of a move of their weight, which exists in registers alone: a dense weight, and a 4-bit
one (the definition is peftfast.reference.zeroth_order)."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .nf4 import has_words, indices_of
from .numerics import multiply_add, narrow, widen
from .partials import divide, partials_of, reduce_two
from .philox import normal_tile, sign_tile

_NESTED_BITS = tl.constexpr(8)  # 256 maxima share one of the second level


@triton.jit
def _signs(seed, start, first, columns, tensor_id, WHOLE_COUNTERS: tl.constexpr, BLOCK_K: tl.constexpr):
    """z of the elements start + first + columns, 1 or -1; ``start`` is where each row begins in the weight, ``first`` a multiple of
    BLOCK_K. WHOLE_COUNTERS: rows begin with a counter of 128 signs, so that the column tells the bit; otherwise the position does, in
    64 bits for each element."""
    if WHOLE_COUNTERS:
        # In the shape in which the compiler sees that a thread's neighbours share a word.
        within = first // BLOCK_K % (128 // BLOCK_K if BLOCK_K < 128 else 1) * BLOCK_K
        return sign_tile(seed, (start + first) // 128, within + columns, tensor_id)
    else:
        at = start + (first + columns)
        return sign_tile(seed, at * 0, at, tensor_id)


# tensor_id: of the second tensor, 1, the compiler would make a constant, which has no type to convert from.
@triton.jit(do_not_specialize=["M", "tensor_id", "steps"])
def _zo_linear_kernel(
    x_plus_ptr,
    x_minus_ptr,
    weight_ptr,
    bias_plus_ptr,
    bias_minus_ptr,
    seed_ptr,
    eps_ptr,
    threshold_ptr,
    out_plus_ptr,
    out_minus_ptr,
    M,
    N,
    K,
    tensor_id,
    steps,
    RADEMACHER: tl.constexpr,
    WHOLE_COUNTERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N columns of both products: each tile of W is loaded once, moved both ways in registers, and met by both inputs. A program
    adds ``steps`` blocks of K, the first the bias too.

    K is a multiple of 4, so that a counter's normals lie in one row of W.
    """
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    columns = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    rows_n = offs_n[:, None].to(tl.int64)
    seed, eps = tl.load(seed_ptr), tl.load(eps_ptr)
    id_ = tensor_id.to(tl.int64)
    plus = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    minus = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(part * steps * BLOCK_K, min(K, (part + 1) * steps * BLOCK_K), BLOCK_K):
        offs_k = first + columns
        mask_k = offs_k < K
        at = rows_n * K + offs_k[None, :]
        w = widen(tl.load(weight_ptr + at, mask=mask_n[:, None] & mask_k[None, :], other=0.0))
        if RADEMACHER:
            z = _signs(seed, rows_n * K, first, columns[None, :], id_, WHOLE_COUNTERS, BLOCK_K)
        else:
            z = normal_tile(seed, (rows_n * K + first) // 4, columns[None, :], id_)
        term = eps * z
        w_plus, w_minus = w + term, w - term
        if threshold_ptr is not None:
            moves = tl.abs(w) <= tl.load(threshold_ptr)
            w_plus, w_minus = tl.where(moves, w_plus, w), tl.where(moves, w_minus, w)
        # What lies past K is not zero any more: x is, there.
        mask_x = mask_m[:, None] & mask_k[None, :]
        at_x = offs_m[:, None].to(tl.int64) * K + offs_k[None, :]
        x_plus = tl.load(x_plus_ptr + at_x, mask=mask_x, other=0.0)
        x_minus = tl.load(x_minus_ptr + at_x, mask=mask_x, other=0.0)
        plus = multiply_add(x_plus, tl.trans(narrow(w_plus, weight_ptr.dtype.element_ty)), plus)
        minus = multiply_add(x_minus, tl.trans(narrow(w_minus, weight_ptr.dtype.element_ty)), minus)
    if bias_plus_ptr is not None:
        mask_first = offs_n < tl.where(part == 0, N, 0)
        plus += widen(tl.load(bias_plus_ptr + offs_n, mask=mask_first, other=0.0))[None, :]
        minus += widen(tl.load(bias_minus_ptr + offs_n, mask=mask_first, other=0.0))[None, :]
    at_y = (part.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    tl.store(out_plus_ptr + at_y, narrow(plus, out_plus_ptr.dtype.element_ty), mask=mask_y)
    tl.store(out_minus_ptr + at_y, narrow(minus, out_minus_ptr.dtype.element_ty), mask=mask_y)


def zo_linear(
    x_plus: torch.Tensor,
    x_minus: torch.Tensor,
    weight: torch.Tensor,
    bias_plus: torch.Tensor | None,
    bias_minus: torch.Tensor | None,
    seed: torch.Tensor,
    eps: torch.Tensor,
    threshold: torch.Tensor | None,
    tensor_id: int,
    rademacher: bool,
    config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_plus (W + eps z)ᵀ + bias_plus, x_minus (W - eps z)ᵀ + bias_minus); x ``[M, K]``, weight ``[N, K]``, K a multiple of 4."""
    M, K = x_plus.shape
    N = weight.shape[0]
    out_plus = torch.empty((M, N), dtype=weight.dtype, device=weight.device)
    out_minus = torch.empty((M, N), dtype=weight.dtype, device=weight.device)
    if M and N:
        steps, splits = divide(max(1, triton.cdiv(K, config.block_k)), config.splits)
        sums_plus, sums_minus = partials_of(splits, out_plus), partials_of(splits, out_minus)
        launch(
            _zo_linear_kernel,
            (triton.cdiv(N, config.block_n), triton.cdiv(M, config.block_m), splits),
            x_plus.contiguous(),
            x_minus.contiguous(),
            weight,
            None if bias_plus is None else bias_plus.contiguous(),
            None if bias_minus is None else bias_minus.contiguous(),
            seed,
            eps,
            threshold,
            sums_plus,
            sums_minus,
            M,
            N,
            K,
            tensor_id,
            steps,
            RADEMACHER=rademacher,
            WHOLE_COUNTERS=K % 128 == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
        reduce_two(sums_plus, out_plus, 1.0, sums_minus, out_minus, 1.0)
    return out_plus, out_minus


@triton.jit(do_not_specialize=["M", "tensor_id", "steps"])
def _zo_nf4_linear_kernel(
    x_plus_ptr,
    x_minus_ptr,
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    bias_plus_ptr,
    bias_minus_ptr,
    seed_ptr,
    eps_ptr,
    threshold_ptr,
    out_plus_ptr,
    out_minus_ptr,
    M,
    N,
    K,
    row_bytes,
    tensor_id,
    steps,
    BLOCK_BITS: tl.constexpr,
    WORDS: tl.constexpr,
    RADEMACHER: tl.constexpr,
    WHOLE_COUNTERS: tl.constexpr,
    OF_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same on a 4-bit weight: a tile of packed bytes is loaded once and decoded in registers as the dequantiser decodes it.

    BLOCK_K divides K and the block size, 2 ** BLOCK_BITS, so that a step has one maximum a row. WORDS: four bytes can be loaded as a
    word. OF_SCALES: z moves the block maxima, in float32, and the tile is decoded with both; otherwise it moves the decoded weight.
    """
    DTYPE: tl.constexpr = x_plus_ptr.dtype.element_ty
    UNITS: tl.constexpr = BLOCK_K // 8 if WORDS else BLOCK_K // 2
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    columns = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    row = tl.where(mask_n, offs_n, 0).to(tl.int64)
    seed, eps = tl.load(seed_ptr), tl.load(eps_ptr)
    id_ = tensor_id.to(tl.int64)
    if WORDS:
        units_row = packed_ptr.to(tl.pointer_type(tl.uint32), bitcast=True) + row[:, None] * (row_bytes // 4)
    else:
        units_row = packed_ptr + row[:, None] * row_bytes
    units_row += tl.arange(0, UNITS)[None, :]
    code = tl.load(code_ptr + tl.arange(0, 16))
    if nested_absmax_ptr is not None:
        offset = tl.load(nested_offset_ptr)
    plus = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    minus = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(part * steps * BLOCK_K, min(K, (part + 1) * steps * BLOCK_K), BLOCK_K):
        units = tl.load(units_row + (first // 8 if WORDS else first // 2))
        block = (row * K + first) >> BLOCK_BITS
        absmax = tl.load(absmax_ptr + block)
        if nested_absmax_ptr is not None:
            nested = tl.load(nested_absmax_ptr + (block >> _NESTED_BITS))
            absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested + offset
        index = indices_of(units, False)
        value = tl.gather(code, index.reshape(BLOCK_N * BLOCK_K), 0).reshape(BLOCK_N, BLOCK_K)
        if OF_SCALES:
            if RADEMACHER:
                z = sign_tile(seed, block * 0, block, id_)
            else:
                z = normal_tile(seed, block * 0, block, id_)
            up, down = absmax + eps * z, absmax - eps * z
            if threshold_ptr is not None:
                moves = tl.abs(absmax) <= tl.load(threshold_ptr)
                up, down = tl.where(moves, up, absmax), tl.where(moves, down, absmax)
            w_plus, w_minus = value * up[:, None], value * down[:, None]
        else:
            w = widen(narrow(value * absmax[:, None], DTYPE))
            if RADEMACHER:
                z = _signs(seed, row[:, None] * K, first, columns[None, :], id_, WHOLE_COUNTERS, BLOCK_K)
            else:
                z = normal_tile(seed, (row[:, None] * K + first) // 4, columns[None, :], id_)
            term = eps * z
            w_plus, w_minus = w + term, w - term
            if threshold_ptr is not None:
                moves = tl.abs(w) <= tl.load(threshold_ptr)
                w_plus, w_minus = tl.where(moves, w_plus, w), tl.where(moves, w_minus, w)
        at_x = offs_m[:, None].to(tl.int64) * K + (first + columns)[None, :]
        x_plus = tl.load(x_plus_ptr + at_x, mask=mask_m[:, None], other=0.0)
        x_minus = tl.load(x_minus_ptr + at_x, mask=mask_m[:, None], other=0.0)
        plus = multiply_add(x_plus, tl.trans(narrow(w_plus, DTYPE)), plus)
        minus = multiply_add(x_minus, tl.trans(narrow(w_minus, DTYPE)), minus)
    if bias_plus_ptr is not None:
        mask_first = offs_n < tl.where(part == 0, N, 0)
        plus += widen(tl.load(bias_plus_ptr + offs_n, mask=mask_first, other=0.0))[None, :]
        minus += widen(tl.load(bias_minus_ptr + offs_n, mask=mask_first, other=0.0))[None, :]
    at_y = (part.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    tl.store(out_plus_ptr + at_y, narrow(plus, out_plus_ptr.dtype.element_ty), mask=mask_y)
    tl.store(out_minus_ptr + at_y, narrow(minus, out_minus_ptr.dtype.element_ty), mask=mask_y)


def zo_nf4_linear(
    x_plus: torch.Tensor,
    x_minus: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    block_size: int,
    shape: tuple[int, int],
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    bias_plus: torch.Tensor | None,
    bias_minus: torch.Tensor | None,
    seed: torch.Tensor,
    eps: torch.Tensor,
    threshold: torch.Tensor | None,
    tensor_id: int,
    rademacher: bool,
    of_scales: bool,
    config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both products of x ``[M, K]``, bfloat16 or float16, with a 4-bit weight of ``shape`` ``(N, K)``.

    K is a multiple of the smaller of the block size and ``config.block_k``; the weight's tensors are contiguous; ``of_scales`` wants
    absmax in float32.
    """
    N, K = shape
    M = x_plus.shape[0]
    out_plus = torch.empty((M, N), dtype=x_plus.dtype, device=x_plus.device)
    out_minus = torch.empty((M, N), dtype=x_plus.dtype, device=x_plus.device)
    if M and N:
        block_k = min(config.block_k, block_size)
        steps, splits = divide(triton.cdiv(K, block_k), config.splits)
        sums_plus, sums_minus = partials_of(splits, out_plus), partials_of(splits, out_minus)
        launch(
            _zo_nf4_linear_kernel,
            (triton.cdiv(N, config.block_n), triton.cdiv(M, config.block_m), splits),
            x_plus.contiguous(),
            x_minus.contiguous(),
            packed,
            absmax,
            code,
            nested_absmax,
            nested_code,
            nested_offset,
            None if bias_plus is None else bias_plus.contiguous(),
            None if bias_minus is None else bias_minus.contiguous(),
            seed,
            eps,
            threshold,
            sums_plus,
            sums_minus,
            M,
            N,
            K,
            K // 2,
            tensor_id,
            steps,
            BLOCK_BITS=block_size.bit_length() - 1,
            WORDS=has_words(packed, K),
            RADEMACHER=rademacher,
            WHOLE_COUNTERS=K % 128 == 0,
            OF_SCALES=of_scales,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
        reduce_two(sums_plus, out_plus, 1.0, sums_minus, out_minus, 1.0)
    return out_plus, out_minus
