"""The passes of several adapters at once in Triton (definitions: peftfast.reference.lora).

Ranks of all adapters are cut into blocks that lie on one grid axis or in one loop, and a table in device memory tells a
program which adapter its block belongs to, where the factor lies, and how it is scaled and masked. So one launch serves
any number of adapters, of any mix of ranks, and neither their number nor their addresses compile a new variant. Blocks
of one tile of x are neighbours on the grid: x comes from memory once and from the cache for the others.

With rows each row names its adapter, or none; a program reads the rows of its adapter only, and an expand visits the
blocks between the least and the largest adapter of its rows only.
"""

import torch
import triton
import triton.language as tl

from .device_tables import DeviceTables
from .launch import constant, launch
from .lora import COMPUTE_DTYPES, places_of_x, transposed_x
from .numerics import convert, multiply_add, multiply_add_in, narrow, settled, widen
from .partials import divide, partials_of, reduce_partials
from .philox import keep_scale, keep_threshold, keep_tile, kept_or, tied_to

# int64 words of a block: address of the factor, first rank, ranks, column in S, term, threshold, rank of the term, address of
# the bias (0: none, or not the term's first block).
ENTRY = tl.constexpr(8)
# Two a linear layer, and as many for each other choice of its adapters: some 2 kB of the device's memory each.
_TABLES = DeviceTables(16384)


@triton.jit
def _ranks(entry, place: tl.constexpr, ALIGNED: tl.constexpr):
    """A number of ranks from the block's entry: its first rank, 1, how many, 2, or its first column of S, 3. ALIGNED: 8 divides every
    rank and so all of these, which what is read from memory does not show: without it factors and S move 2 bytes at a time."""
    number = tl.load(entry + place)
    if ALIGNED:
        number = tl.multiple_of(number, 8)
    return number


@triton.jit
def _factor_tile(
    entry, offs_r, offs_c, mask_r, mask_c, C, DTYPE: tl.constexpr, BY_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr
):
    """The block's factor: w[r, c] with r along offs_r's axis. Stored as A, [R, C], or BY_COLUMNS as B, [C, R]."""
    # The host takes only factors whose address is a multiple of 16 bytes.
    w_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE)), 16)
    ranks = _ranks(entry, 1, ALIGNED) + offs_r
    if BY_COLUMNS:
        offsets = offs_c.to(tl.int64) * tl.load(entry + 6) + ranks
    else:
        offsets = ranks * C + offs_c
    return tl.load(w_ptr + offsets, mask=mask_r & mask_c, other=0.0)


@triton.jit(do_not_specialize=["M", "blocks", "blocks_per_split"])
def _lora_terms_shrink_kernel(
    x_ptr,
    table_ptr,
    scaling_ptr,
    rows_ptr,
    seeds_ptr,
    out_ptr,
    M,
    K,
    R,
    blocks,
    blocks_per_split,
    stride_xm,
    stride_xk,
    DTYPE: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[split, m, column + r] = scaling * sum over the split's k of dropout(x)[m, k] w[r, k] in the rows of the term;
    grid (blocks, fastest, times M blocks; splits of K)."""
    block = tl.program_id(0) % blocks
    first_row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    offs_r = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    entry = table_ptr + block * ENTRY
    mask_m = offs_m < M
    mask_r = offs_r < _ranks(entry, 2, ALIGNED)
    term = tl.load(entry + 4)
    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(K, BLOCK_C))
    mine = mask_m
    if rows_ptr is not None:
        mine = mask_m & (tl.load(rows_ptr + offs_m, mask=mask_m, other=-1) == term)
        last_block = tl.where(tl.max(mine.to(tl.int32), axis=0) > 0, last_block, first_block)
    if seeds_ptr is not None:
        seed = tl.load(seeds_ptr + term)
        threshold = tl.load(entry + 5).to(tl.int32)
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    accumulator = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for step in range(first_block, last_block):
        offs_k = step * BLOCK_C + columns
        mask_k = offs_k < K
        x_tile = tl.load(
            x_rows + offs_k[None, :].to(tl.int64) * stride_xk, mask=mine[:, None] & mask_k[None, :], other=0.0
        )
        w_tile = _factor_tile(
            entry, offs_r[None, :], offs_k[:, None], mask_r[None, :], mask_k[:, None], K, DTYPE, BY_COLUMNS, ALIGNED
        )
        x_tile = convert(x_tile, COMPUTE)
        if seeds_ptr is not None:
            x_tile = kept_or(x_tile, None, seed, first_row, step * BLOCK_C, K, threshold, BLOCK_M, BLOCK_C)
        accumulator = multiply_add(x_tile, convert(w_tile, COMPUTE), accumulator)
        accumulator = settled(accumulator, seeds_ptr is not None or x_ptr.dtype.element_ty != COMPUTE)
    accumulator *= tl.load(scaling_ptr + block)
    out_tile = out_ptr + (split.to(tl.int64) * M + offs_m[:, None]) * R + _ranks(entry, 3, ALIGNED) + offs_r[None, :]
    tl.store(out_tile, narrow(accumulator, out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M", "terms", "blocks"])
def _lora_terms_expand_kernel(
    base_ptr,
    s_ptr,
    table_ptr,
    scaling_ptr,
    starts_ptr,
    rows_ptr,
    seeds_ptr,
    out_ptr,
    M,
    N,
    terms,
    blocks,
    stride_basem,
    stride_basen,
    stride_sm,
    stride_sr,
    stride_om,
    stride_on,
    DTYPE: tl.constexpr,
    BIAS: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = base + the sum over terms of dropout(scaling * (s wᵀ + bias)) in their rows; one tile a program, N fastest."""
    blocks_n = tl.cdiv(N, BLOCK_C)
    first_row = (tl.program_id(0) // blocks_n).to(tl.int64) * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(0) % blocks_n * BLOCK_C
    offs_n = first_column + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    base_tile = base_ptr + offs_m[:, None] * stride_basem + offs_n[None, :].to(tl.int64) * stride_basen
    base = tl.load(base_tile, mask=mask, other=0.0)
    first_block = 0
    last_block = blocks
    if rows_ptr is not None:
        ids = tl.load(rows_ptr + offs_m, mask=mask_m, other=-1)
        named = (ids >= 0) & (ids < terms)
        first_block = tl.load(starts_ptr + tl.min(tl.where(named, ids, terms), axis=0))
        last_block = tl.load(starts_ptr + tl.max(tl.where(named, ids, -1), axis=0) + 1)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for block in range(first_block, last_block):
        entry = table_ptr + block * ENTRY
        mask_r = offs_r < _ranks(entry, 2, ALIGNED)
        term = tl.load(entry + 4)
        s_columns = (_ranks(entry, 3, ALIGNED) + offs_r) * stride_sr
        s_tile = tl.load(
            s_ptr + offs_m[:, None] * stride_sm + s_columns[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0
        )
        w_tile = _factor_tile(
            entry, offs_r[:, None], offs_n[None, :], mask_r[:, None], mask_n[None, :], N, DTYPE, BY_COLUMNS, ALIGNED
        )
        delta = multiply_add(s_tile, convert(w_tile, s_ptr.dtype.element_ty), tl.zeros((BLOCK_M, BLOCK_C), tl.float32))
        if BIAS is not None:
            address = tl.load(entry + 7)
            there = offs_n < tl.where(address != 0, N, 0)  # no part of a mask by itself: see sparse_delta.py
            bias = tl.load(address.to(tl.pointer_type(BIAS)) + offs_n, mask=there, other=0.0)
            delta += widen(bias)[None, :]
        delta *= tl.load(scaling_ptr + block)
        if seeds_ptr is not None:
            threshold = tl.load(entry + 5).to(tl.int32)
            keep = keep_tile(tl.load(seeds_ptr + term), first_row, first_column, N, threshold, BLOCK_M, BLOCK_C)
            delta = tl.where(tied_to(base, keep), delta, 0.0)
        if rows_ptr is not None:
            delta = tl.where((ids == term)[:, None], delta, 0.0)
        total += delta
    out_tile = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :].to(tl.int64) * stride_on
    tl.store(out_tile, narrow(widen(base) + total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
def _lora_terms_weight_grad_kernel(
    ds_ptr,
    x_ptr,
    table_ptr,
    scaling_ptr,
    rows_ptr,
    seeds_ptr,
    out_ptr,
    M,
    K,
    blocks_per_split,
    stride_dsm,
    stride_dsr,
    stride_xm,
    stride_xk,
    stride_split,
    COMPUTE: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[split, term][r, k] = scaling * sum over the split's rows of the term of ds[m, column + r] dropout(x)[m, k]; grid
    (K blocks, blocks, splits of M). A term's result is [R, K], or BY_COLUMNS [K, R], one after the other."""
    first_column = tl.program_id(0) * BLOCK_C
    offs_k = first_column + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    block = tl.program_id(1)
    split = tl.program_id(2)
    entry = table_ptr + block * ENTRY
    mask_k = offs_k < K
    mask_r = offs_r < _ranks(entry, 2, ALIGNED)
    column = _ranks(entry, 3, ALIGNED)
    term = tl.load(entry + 4)
    seed, threshold = None, None
    if seeds_ptr is not None:
        seed = tl.load(seeds_ptr + term)
        threshold = tl.load(entry + 5).to(tl.int32)
    # Places in a tile, which stay, apart from the tile's place.
    x_places = places_of_x(rows, offs_k, stride_xm, stride_xk, seeds_ptr is not None)
    ds_places = rows[:, None].to(tl.int64) * stride_dsm + (column + offs_r)[None, :] * stride_dsr
    accumulator = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(M, BLOCK_M))
    for step in range(first_block, last_block):
        first_row = step * tl.full((), BLOCK_M, tl.int64)
        mask_m = rows < M - first_row
        if rows_ptr is not None:
            mask_m &= tl.load(rows_ptr + first_row + rows, mask=mask_m, other=-1) == term
        x_block = x_ptr + first_row * stride_xm
        ds_tile = tl.load(
            ds_ptr + first_row * stride_dsm + ds_places, mask=mask_m[:, None] & mask_r[None, :], other=0.0
        )
        x_tile = transposed_x(
            x_block + x_places, mask_m, mask_k, seed, first_row, first_column, K, threshold, COMPUTE, BLOCK_M, BLOCK_C
        )
        accumulator = multiply_add_in(x_tile, ds_tile, accumulator, COMPUTE)
        accumulator = settled(accumulator, seeds_ptr is not None or x_ptr.dtype.element_ty != COMPUTE)
    accumulator *= tl.load(scaling_ptr + block)
    rank = tl.load(entry + 1) + offs_r
    start = (column - tl.load(entry + 1)) * K
    if BY_COLUMNS:
        offsets = start + offs_k[:, None].to(tl.int64) * tl.load(entry + 6) + rank[None, :]
    else:
        offsets = start + rank[None, :] * K + offs_k[:, None]
    out_tile = out_ptr + split.to(tl.int64) * stride_split + offsets
    tl.store(out_tile, narrow(accumulator, out_ptr.dtype.element_ty), mask=mask_k[:, None] & mask_r[None, :])


def _tables(
    device: torch.device,
    factors: list[torch.Tensor],
    biases: list[torch.Tensor],
    ranks: tuple[int, ...],
    ps: tuple[float, ...] | None,
    scalings: tuple[float, ...],
    block_r: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tables for factors ``[R_t, ..]`` and biases at their addresses; without factors for none."""
    addresses = _addresses(factors) or (0,) * len(ranks)
    key = (addresses, _addresses(biases), ranks, ps, scalings, block_r)
    tables = _TABLES.get((device, *key), device, lambda: _tables_of(*key))
    for table in tables:
        constant(table, *factors, *biases)
    return tables


def _tables_of(
    addresses: tuple[int, ...],
    biases: tuple[int, ...],
    ranks: tuple[int, ...],
    ps: tuple[float, ...] | None,
    scalings: tuple[float, ...],
    block_r: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The blocks' entries, their scalings, and the first block of each term and past the last one."""
    entries, factors, starts, column = [], [], [], 0
    for term, rank in enumerate(ranks):
        p = ps[term] if ps is not None else 0.0
        starts.append(len(entries))
        # With no rank at all there is still a bias.
        for first in range(0, max(rank, 1 if biases else 0), block_r):
            bias = biases[term] if biases and first == 0 else 0
            count = min(block_r, rank - first)
            entries.append((addresses[term], first, count, column + first, term, keep_threshold(p), rank, bias))
            factors.append(scalings[term] * keep_scale(p))
        column += rank
    starts.append(len(entries))
    return (
        torch.tensor(entries, dtype=torch.int64, device="cpu").reshape(-1, ENTRY.value),
        torch.tensor(factors, dtype=torch.float32, device="cpu"),
        torch.tensor(starts, dtype=torch.int32, device="cpu"),
    )


def _uniform(tensors) -> tuple[list[torch.Tensor], torch.dtype]:
    """Contiguous tensors of one dtype, at addresses that are multiples of 16: themselves where they are so already."""
    dtypes = {one.dtype for one in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    ready = [one.to(dtype).contiguous() for one in tensors]
    return [one.clone() if one.data_ptr() % 16 else one for one in ready], dtype


def _masked(seeds: torch.Tensor | None, ps) -> tuple[torch.Tensor | None, tuple[float, ...] | None]:
    if seeds is None or not any(ps):
        return None, None
    return seeds.contiguous(), tuple(ps)


def _aligned(ranks: tuple[int, ...]) -> bool:
    return all(rank % 8 == 0 for rank in ranks)


def _addresses(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    return tuple(one.data_ptr() for one in tensors)


def lora_terms_shrink(
    x: torch.Tensor,
    a: list[torch.Tensor],
    rows: torch.Tensor | None,
    seeds: torch.Tensor | None,
    ps: list[float],
    scalings: list[float],
    dtype: torch.dtype,
    config,
    by_columns: bool = False,
) -> torch.Tensor:
    """scaling_t * dropout_t(x) a_tᵀ side by side: x ``[M, K]`` of any strides and ``a`` of ``[R_t, K]``, or by_columns
    ``[K, R_t]``; int32 rows ``[M]`` -> ``[M, sum of R_t]`` of ``dtype``."""
    M, K = x.shape
    a, factor_dtype = _uniform(a)
    ranks = tuple(one.shape[1 if by_columns else 0] for one in a)
    R = sum(ranks)
    if not (M and K and R):
        return torch.zeros((M, R), dtype=dtype, device=x.device)
    out = torch.empty((M, R), dtype=dtype, device=x.device)
    seeds, ps = _masked(seeds, ps)
    table, factors, _ = _tables(x.device, a, [], ranks, ps, tuple(scalings), config.block_r)
    blocks = table.shape[0]
    blocks_per_split, splits = divide(triton.cdiv(K, config.block_c), config.splits)
    partials = partials_of(splits, out)
    launch(
        _lora_terms_shrink_kernel,
        (triton.cdiv(M, config.block_m) * blocks, splits),
        x,
        table,
        factors,
        rows if rows is None else rows.contiguous(),
        seeds,
        partials,
        M,
        K,
        R,
        blocks,
        blocks_per_split,
        x.stride(0),
        x.stride(1),
        DTYPE=COMPUTE_DTYPES[factor_dtype],
        BY_COLUMNS=by_columns,
        ALIGNED=_aligned(ranks),
        COMPUTE=COMPUTE_DTYPES[dtype],
        **_blocks(config),
    )
    reduce_partials(partials, out, 1.0)
    return out


def lora_terms_expand(
    base: torch.Tensor,
    s: torch.Tensor,
    w: list[torch.Tensor],
    biases: list[torch.Tensor],
    rows: torch.Tensor | None,
    seeds: torch.Tensor | None,
    ps: list[float],
    scalings: list[float],
    out: torch.Tensor,
    config,
) -> torch.Tensor:
    """out = base + the sum over terms of dropout_t(scaling_t * (s_t w_tᵀ + bias_t)): base and out ``[M, N]``, s ``[M, sum of
    R_t]`` and ``w`` of ``[N, R_t]`` of any strides (A handed over as a transposed view costs nothing), ``biases`` none or
    ``[N]`` each. out may be base itself. Returns out."""
    M, N = base.shape
    if not (M and N):
        return out
    transposed = all(one.T.is_contiguous() for one in w)
    ranks = tuple(one.shape[1] for one in w)
    w, factor_dtype = _uniform([one.T for one in w] if transposed else w)
    biases, bias_dtype = _uniform(biases) if biases else ([], None)
    seeds, ps = _masked(seeds, ps)
    table, factors, starts = _tables(base.device, w, biases, ranks, ps, tuple(scalings), config.block_r)
    launch(
        _lora_terms_expand_kernel,
        (triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_c),),
        base,
        s,
        table,
        factors,
        starts,
        rows if rows is None else rows.contiguous(),
        seeds,
        out,
        M,
        N,
        len(w),
        table.shape[0],
        base.stride(0),
        base.stride(1),
        s.stride(0),
        s.stride(1),
        out.stride(0),
        out.stride(1),
        DTYPE=COMPUTE_DTYPES[factor_dtype],
        BIAS=None if bias_dtype is None else COMPUTE_DTYPES[bias_dtype],
        BY_COLUMNS=not transposed,
        ALIGNED=_aligned(ranks),
        **_blocks(config),
    )
    return out


def lora_terms_weight_grad(
    ds: torch.Tensor,
    x: torch.Tensor,
    ranks: list[int],
    rows: torch.Tensor | None,
    seeds: torch.Tensor | None,
    ps: list[float],
    scalings: list[float],
    dtype: torch.dtype,
    config,
    by_columns: bool = False,
) -> torch.Tensor:
    """scaling_t * ds_tᵀ dropout_t(x) one below the other: ds ``[M, sum of R_t]`` and x ``[M, K]`` of any strides ->
    ``[sum of R_t, K]`` of ``dtype``; or by_columns each transposed, flat. Products in ds's dtype."""
    M, K = x.shape
    ranks = tuple(ranks)
    out = torch.empty((sum(ranks), K), dtype=dtype, device=x.device)
    if not (M and out.numel()):
        return out.zero_()
    seeds, ps = _masked(seeds, ps)
    table, factors, _ = _tables(x.device, [], [], ranks, ps, tuple(scalings), config.block_r)
    blocks_per_split, splits = divide(triton.cdiv(M, config.block_m), config.splits)
    partials = partials_of(splits, out)
    launch(
        _lora_terms_weight_grad_kernel,
        (triton.cdiv(K, config.block_c), table.shape[0], splits),
        ds,
        x,
        table,
        factors,
        rows if rows is None else rows.contiguous(),
        seeds,
        partials,
        M,
        K,
        blocks_per_split,
        ds.stride(0),
        ds.stride(1),
        x.stride(0),
        x.stride(1),
        out.numel(),
        COMPUTE=COMPUTE_DTYPES[ds.dtype],
        BY_COLUMNS=by_columns,
        ALIGNED=_aligned(ranks),
        **_blocks(config),
    )
    reduce_partials(partials, out, 1.0)
    return out


def lora_terms_dy_grads(
    dy: torch.Tensor,
    s: torch.Tensor,
    b: list[torch.Tensor],
    rows: torch.Tensor | None,
    scalings: list[float],
    dtype: torch.dtype,
    configs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ds ``[M, sum of R_t]`` in dy's dtype and all db flat, in two readings of dy: partial sums of ds for the ranks of all
    adapters would outweigh dy itself."""
    ds_config, db_config = configs
    nothing = [0.0] * len(b)
    ds = lora_terms_shrink(dy, b, rows, None, nothing, scalings, dy.dtype, ds_config, by_columns=True)
    ranks = [one.shape[1] for one in b]
    db = lora_terms_weight_grad(
        s.to(dy.dtype), dy, ranks, rows, None, nothing, scalings, dtype, db_config, by_columns=True
    )
    return ds, db.reshape(-1)


def _blocks(config) -> dict[str, int]:
    """The compile-time part of a peftfast.configs.lora.LoraConfig."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c,
        "BLOCK_R": config.block_r,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
