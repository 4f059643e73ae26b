"""A product with a 4-bit weight for many rows, decoded on its way into the tensor cores, the adapter inside (the definition
is peftfast.reference.nf4.nf4_product).

    forward      out = x W̃ᵀ + bias + scaling (s bᵀ + lora_bias)          W̃ lies by rows, its columns are summed over
    transposed   out = x W̃ + dropout(s bᵀ)                              its rows are summed over: dX of the layer

The packed bytes are read once for each row of tiles and no dense weight is written. A step's tile is decoded in registers, rounded
to the compute dtype as the dequantiser rounds it, bit for bit, and goes through shared memory into the matrix instruction. Tiles
begin with the adapter's part and programs are persistent, as in kernels/lora_product.py, whose functions these are. Where the tiles are
fewer than the programs that a GPU holds, the sum is cut: partial sums in a workspace, added in a fixed order by one launch more.

The nested scale is undone here, a maximum at a time: that moves 0.016 bytes an element, where maxima unnested beforehand would be
written and read as 0.063 each and take a launch of their own, and a maximum serves 64 elements, so that its three loads are few.

A value comes from a table of 16 float32 in shared memory (tl.gather), each in a bank of its own, so that no two lookups collide. A
lookup and a store of the tile cost what a multiprocessor's shared memory gives, 32 and 64 elements a cycle; its tensor cores take
2048 / BLOCK_M of a tile a cycle (sm_90, bfloat16): from about 100 rows a tile on the product, and not decoding, is what takes time,
where two programs share a multiprocessor and one decodes while the other multiplies. For within a program nothing overlaps: the
compiler (triton 3.7.1) leaves wgmma in flight only on operands that copies have brought to shared memory, and waits for one whose
operand a thread has written there.
"""

import torch
import triton
import triton.language as tl

from .launch import launch
from .lora_product import adapter_part, place_of, write_tile
from .nf4 import has_words, indices_of
from .numerics import convert, multiply_add, narrow
from .partials import divide, partials_of, reduce_partials
from .philox import keep_scale, keep_threshold

_NESTED_BITS = tl.constexpr(8)  # 256 maxima share one of the second level


@triton.jit
def decode_tile(
    packed_ptr,
    absmax_ptr,
    code,
    nested_absmax_ptr,
    nested_code_ptr,
    offset,
    row,
    column,
    rows,
    columns,
    row_bytes,
    BLOCK_BITS: tl.constexpr,
    SPAN: tl.constexpr,
    DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    WORDS: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The weight's ``[ROWS, COLUMNS]`` from row ``row`` and column ``column`` on, in DTYPE; zeros outside ``[rows, columns]``.

    Each SPAN neighbours from a multiple of SPAN on have one maximum: SPAN divides columns and the block size, 2 ** BLOCK_BITS; so
    columns is even and rows, ``row_bytes`` long, begin with a byte. WHOLE: no tile reaches past the weight. WORDS: SPAN
    is a multiple of 8 and four bytes can be loaded as a word, which a shift and a mask for each element unpack; bytes take thrice as
    many instructions. The nested scale is a product and a sum that are rounded apart: the kernel must be compiled with
    enable_fp_fusion=False.
    """
    UNITS: tl.constexpr = COLUMNS // 8 if WORDS else COLUMNS // 2
    SPANS: tl.constexpr = COLUMNS // SPAN
    offs_row = row + tl.arange(0, ROWS)
    if WORDS:
        row_units, offs_unit = row_bytes // 4, (column >> 3) + tl.arange(0, UNITS)
        units_ptr = packed_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    else:
        row_units, offs_unit = row_bytes, (column >> 1) + tl.arange(0, UNITS)
        units_ptr = packed_ptr
    offs_span = column + SPAN * tl.arange(0, SPANS)
    wide_row = offs_row.to(tl.int64)
    block = (wide_row[:, None] * columns + offs_span[None, :]) >> BLOCK_BITS
    units_ptr += wide_row[:, None] * row_units + offs_unit[None, :]
    if WHOLE:
        units = tl.load(units_ptr)
        absmax = tl.load(absmax_ptr + block)
        if nested_absmax_ptr is not None:
            nested = tl.load(nested_absmax_ptr + (block >> _NESTED_BITS))
    else:
        # Whoever calls clamps nothing: what is not there is a byte 0 under a maximum 0.
        mask_row = (offs_row < rows)[:, None]
        mask_span = mask_row & (offs_span < columns)[None, :]
        units = tl.load(units_ptr, mask=mask_row & (offs_unit < row_units)[None, :], other=0)
        absmax = tl.load(absmax_ptr + block, mask=mask_span, other=0)
        if nested_absmax_ptr is not None:
            nested = tl.load(nested_absmax_ptr + (block >> _NESTED_BITS), mask=mask_span, other=0.0)
    if nested_absmax_ptr is not None:
        absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * nested + offset
        if not WHOLE:
            absmax = tl.where(mask_span, absmax, 0.0)
    index = indices_of(units, STORED)
    values = tl.gather(code, index.reshape(ROWS * COLUMNS), 0)
    if SPANS == 1:
        return narrow(values.reshape(ROWS, COLUMNS) * absmax, DTYPE)
    else:
        return narrow(values.reshape(ROWS, SPANS, SPAN) * absmax[:, :, None], DTYPE).reshape(ROWS, COLUMNS)


@triton.jit
def _x_tile(
    x_ptr, pid_m, step, M, K, stride_xm, stride_xk, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_m < M)[:, None]
    if not WHOLE:
        mask = mask & (offs_k < K)[None, :]
    offs = offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    return tl.load(x_ptr + offs, mask=mask, other=0.0)


# M changes with every batch and is not specialised; N, K, R and the strides belong to the layer.
@triton.jit(do_not_specialize=["M", "threshold", "per_split"])
def _nf4_product_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    out_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    lora_bias_ptr,
    seed_ptr,
    bits_ptr,
    M,
    N,
    K,
    R,
    row_bytes,
    per_split,
    scaling,
    threshold,
    stride_xm,
    stride_xk,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    TRANSPOSED: tl.constexpr,
    WHOLE: tl.constexpr,
    WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    SPAN: tl.constexpr,
    COMPUTE: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Tiles of out ``[M, N]``, or of SPLITS partial sums of it, by as many programs as the GPU holds at once. The weight lies as
    ``[N, K]``, TRANSPOSED as ``[K, N]``. ``per_split``: K steps of one partial sum."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    steps = tl.cdiv(K, BLOCK_K)
    code = tl.load(code_ptr + tl.arange(0, 16))
    offset = 0.0
    if nested_absmax_ptr is not None:
        offset = tl.load(nested_offset_ptr)
    if seed_ptr is not None:
        bits_ptr += program * (BLOCK_M * BLOCK_N // 8)
    for item in range(program, tiles * SPLITS, programs):
        split = item // tiles
        pid_m, pid_n = place_of(item % tiles, tiles_m, tiles_n, GROUP_M)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if split == 0:
            accumulator = adapter_part(
                *(s_ptr, b_ptr, bias_ptr, lora_bias_ptr, seed_ptr, bits_ptr, pid_m, pid_n, M, N, R, scaling),
                *(threshold, stride_sm, stride_sr, stride_bn, stride_br, BLOCK_M, BLOCK_N, BLOCK_R),
            )
        first = split * per_split
        for step in range(first, tl.minimum(first + per_split, steps)):
            x_tile = _x_tile(x_ptr, pid_m, step, M, K, stride_xm, stride_xk, WHOLE, BLOCK_M, BLOCK_K)
            if TRANSPOSED:
                w_tile = decode_tile(
                    *(packed_ptr, absmax_ptr, code, nested_absmax_ptr, nested_code_ptr, offset),
                    *(
                        step * BLOCK_K,
                        pid_n * BLOCK_N,
                        K,
                        N,
                        row_bytes,
                        BLOCK_BITS,
                        SPAN,
                        COMPUTE,
                        WHOLE,
                        WORDS,
                        False,
                        BLOCK_K,
                        BLOCK_N,
                    ),
                )
                accumulator = multiply_add(x_tile, w_tile, accumulator)
            else:
                w_tile = decode_tile(
                    *(packed_ptr, absmax_ptr, code, nested_absmax_ptr, nested_code_ptr, offset),
                    *(
                        pid_n * BLOCK_N,
                        step * BLOCK_K,
                        N,
                        K,
                        row_bytes,
                        BLOCK_BITS,
                        SPAN,
                        COMPUTE,
                        WHOLE,
                        WORDS,
                        False,
                        BLOCK_N,
                        BLOCK_K,
                    ),
                )
                accumulator = multiply_add(x_tile, tl.trans(w_tile), accumulator)
        target = out_ptr + split.to(tl.int64) * M * N
        write_tile(target, accumulator, pid_m, pid_n, M, N, N, False, 1, DTYPE, BLOCK_M, BLOCK_N)


@triton.jit
def _nf4_columns_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    out_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    N,
    K,
    row_bytes,
    first_byte,
    width,
    stride_row,
    BLOCK_BITS: tl.constexpr,
    SPAN: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out ``[N, width]`` = the columns of a weight ``[N, K]`` from ``2 first_byte``, a multiple of SPAN, on."""
    code = tl.load(code_ptr + tl.arange(0, 16))
    offset = 0.0
    if nested_absmax_ptr is not None:
        offset = tl.load(nested_offset_ptr)
    row, column = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    values = decode_tile(
        *(packed_ptr, absmax_ptr, code, nested_absmax_ptr, nested_code_ptr, offset),
        *(
            row,
            2 * first_byte + column,
            N,
            K,
            row_bytes,
            BLOCK_BITS,
            SPAN,
            out_ptr.dtype.element_ty,
            False,
            WORDS,
            True,
            ROWS,
            COLUMNS,
        ),
    )
    offs_row, offs_column = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    mask = (offs_row < N)[:, None] & (offs_column < width)[None, :]
    offs = offs_row[:, None].to(tl.int64) * stride_row + offs_column[None, :]
    tl.store(out_ptr + offs, convert(values, out_ptr.dtype.element_ty), mask=mask)


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def span_of(columns: int, block_size: int, tile: int) -> int:
    """The largest power of two that divides all of them: so many neighbours of a tile's row have one maximum, wherever it lies."""
    joined = columns | block_size | tile
    return joined & -joined


def nf4_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    block_size: int,
    shape: tuple[int, int],
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    transposed: bool,
    bias: torch.Tensor | None,
    s: torch.Tensor | None,
    b: torch.Tensor | None,
    lora_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
    config,
) -> torch.Tensor:
    """x W̃ᵀ, or x W̃ if ``transposed``, + bias + dropout(scaling * (s bᵀ + lora_bias)) of ``dtype``.

    x: ``[M, K]`` (transposed ``[M, N]``), bfloat16 or float16, of any strides. The weight ``shape`` is ``(N, K)``, K even, its tensors
        contiguous; block_size a power of two.
    s ``[M, R]`` of x's dtype, b ``[N, R]`` (transposed ``[K, R]``) of any floating one, both or none; bias and lora_bias contiguous.
    """
    M = x.shape[0]
    N, K = reversed(shape) if transposed else shape
    out = torch.empty((M, N), dtype=dtype, device=x.device)
    if not (M and N):
        return out
    masked = seed is not None and p > 0.0
    per_split, splits = divide(max(1, triton.cdiv(K, config.block_k)), config.splits)
    target = partials_of(splits, out)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    programs = min(config.programs, tiles * splits)
    bits = None
    if masked:
        bits = torch.empty(programs * config.block_m * config.block_n // 8, dtype=torch.uint8, device=x.device)
    rank = 0 if b is None else b.shape[1]
    span = span_of(shape[1], block_size, config.block_n if transposed else config.block_k)
    launch(
        _nf4_product_kernel,
        (programs,),
        x,
        packed,
        absmax,
        code,
        nested_absmax,
        nested_code,
        nested_offset,
        target,
        s,
        b,
        bias,
        lora_bias,
        seed if masked else None,
        bits,
        M,
        N,
        K,
        rank,
        shape[1] // 2,
        per_split,
        scaling * keep_scale(p) if masked else scaling,
        keep_threshold(p) if masked else 0,
        x.stride(0),
        x.stride(1),
        0 if s is None else s.stride(0),
        0 if s is None else s.stride(1),
        0 if b is None else b.stride(0),
        0 if b is None else b.stride(1),
        TRANSPOSED=transposed,
        WHOLE=N % config.block_n == 0 and K % config.block_k == 0,
        WORDS=has_words(packed, span),
        SPLITS=splits,
        BLOCK_BITS=block_size.bit_length() - 1,
        SPAN=span,
        COMPUTE=_DTYPES[x.dtype],
        DTYPE=_DTYPES[target.dtype],
        GROUP_M=config.group_m,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    reduce_partials(target, out, 1.0)
    return out


def nf4_dequantize_columns(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    block_size: int,
    shape: tuple[int, int],
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    out: torch.Tensor,
    first: int,
    config,
) -> torch.Tensor:
    """Columns ``first`` .. ``first + out.shape[1]`` of a weight of ``shape``, K and ``first`` even, into ``out``, float32, bfloat16 or
    float16, its rows consecutive elements; returns it. Bit for bit the definition."""
    if out.numel() == 0:
        return out
    width = out.shape[1]
    span = span_of(shape[1] | first, block_size, config.columns)
    launch(
        _nf4_columns_kernel,
        (triton.cdiv(width, config.columns), triton.cdiv(out.shape[0], config.rows)),
        packed,
        absmax,
        code,
        out,
        nested_absmax,
        nested_code,
        nested_offset,
        out.shape[0],
        shape[1],
        shape[1] // 2,
        first // 2,
        width,
        out.stride(0),
        BLOCK_BITS=block_size.bit_length() - 1,
        SPAN=span,
        WORDS=has_words(packed, span),
        ROWS=config.rows,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return out
