"""The base product of a LoRA layer with its adapter inside, in Triton (definition: peftfast.reference.lora.lora_product).

    out = x wᵀ + bias + dropout(scaling * (s bᵀ + lora_bias))

is the layer's forward (w = W, s = S, b = B) and its dX (x = dY, w = Wᵀ, s = dS, b = Aᵀ, under the mask of x). The library's product
and a pass over its result read and write that result once more than this kernel does.

Each tile begins with the adapter's part and not with zeros: the sum of s bᵀ is scaled, masked and given the biases while the
accumulator holds nothing else, and the K steps of the base product add to it. So the mask takes no second accumulator, the scaling no
rounding, and the sum is rounded once. Programs are persistent: each walks over tiles in a fixed order, grouped so that those at work
together share rows of x and of w in the L2 cache. No sum is cut among programs.

Where the operands allow it, tiles are read and written by the copy engine through descriptors made on the host (TMA, sm_90 on);
elsewhere by pointers.

What the compiler makes of the forms that this loop could have, for sm_90 (triton 3.7.1, 2026-11-21): as two nested loops, one wgmma
stays in flight while the next is issued, and copies run ahead within a tile. ``flatten=True`` leaves the loop to wait for each wgmma;
so does one loop over the steps of all tiles written by hand, once a mask is drawn in it. ``warp_specialize=True`` changes nothing with
eight warps and fails to compile with four; for sm_100 it spills. Hence none of these: what a tile begins and ends with is hidden where
two programs share a multiprocessor, and one multiplies meanwhile.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import launch
from .numerics import convert, multiply_add, narrow, widen
from .philox import keep_bits, keep_scale, keep_threshold

MASK_ROWS = tl.constexpr(
    32
)  # of a tile whose counters are computed at once: four a thread of eight warps at 256 columns


@triton.jit
def place_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: GROUP_M tiles down, then the next column."""
    in_group = GROUP_M * tiles_n
    first_m = tile // in_group * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + tile % in_group % height, tile % in_group // height


@triton.jit
def _write_mask(bits_ptr, seed_ptr, pid_m, pid_n, N, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile's mask, a bit an element, into the program's own BLOCK_M BLOCK_N / 8 bytes.

    By way of memory (the L2 cache), since in the accumulator's layout four threads share a counter: each would compute all of it, and
    the words of sixty counters a thread do not fit beside the sums. The barriers order the program's threads among themselves.
    """
    seed = tl.load(seed_ptr)
    counters = tl.arange(0, BLOCK_N // 8)
    tl.debug_barrier()
    for part in range(BLOCK_M // MASK_ROWS):
        rows = part * MASK_ROWS + tl.arange(0, MASK_ROWS)
        offs_m = pid_m.to(tl.int64) * BLOCK_M + rows
        bits = keep_bits(seed, offs_m[:, None], pid_n * BLOCK_N, counters[None, :], N, threshold)
        tl.store(bits_ptr + rows[:, None] * (BLOCK_N // 8) + counters[None, :], bits.to(tl.uint8))
    tl.debug_barrier()


@triton.jit
def adapter_part(
    s_ptr,
    b_ptr,
    bias_ptr,
    lora_bias_ptr,
    seed_ptr,
    bits_ptr,
    pid_m,
    pid_n,
    M,
    N,
    R,
    scaling,
    threshold,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dropout(scaling * (s bᵀ + lora_bias)) + bias of a tile: what its sum begins with."""
    if seed_ptr is not None:
        _write_mask(bits_ptr, seed_ptr, pid_m, pid_n, N, threshold, BLOCK_M, BLOCK_N)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if s_ptr is not None:
        # One stage: this short loop would take shared memory from the long one.
        for first_r in tl.range(0, R, BLOCK_R, num_stages=1):
            offs_r = first_r + tl.arange(0, BLOCK_R)
            mask_r = offs_r < R
            s_tile = tl.load(
                s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :].to(tl.int64) * stride_sr,
                mask=mask_m[:, None] & mask_r[None, :],
                other=0.0,
            )
            b_tile = tl.load(
                b_ptr + offs_n[None, :].to(tl.int64) * stride_bn + offs_r[:, None].to(tl.int64) * stride_br,
                mask=mask_r[:, None] & mask_n[None, :],
                other=0.0,
            )
            accumulator = multiply_add(s_tile, convert(b_tile, s_ptr.dtype.element_ty), accumulator)
    if lora_bias_ptr is not None:
        accumulator += widen(tl.load(lora_bias_ptr + offs_n, mask=mask_n, other=0.0))[None, :]
    accumulator *= scaling
    if seed_ptr is not None:
        rows, counters = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N // 8)
        bits = tl.load(bits_ptr + rows[:, None] * (BLOCK_N // 8) + counters[None, :]).to(tl.int32)
        keep = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        accumulator = tl.where(tl.reshape(keep, (BLOCK_M, BLOCK_N)) != 0, accumulator, 0.0)
    if bias_ptr is not None:
        accumulator += widen(tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0))[None, :]
    return accumulator


@triton.jit
def _multiply(
    x,
    w,
    accumulator,
    pid_m,
    pid_n,
    step,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    TMA: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One K step of a tile. The copy engine fills with zeros what lies outside."""
    if TMA:
        x_tile = x.load([pid_m * BLOCK_M, step * BLOCK_K])
        if W_BY_ROWS:
            w_tile = w.load([pid_n * BLOCK_N, step * BLOCK_K]).T
        else:
            w_tile = w.load([step * BLOCK_K, pid_n * BLOCK_N])
    else:
        offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        offs_k = (step * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < K
        x_tile = tl.load(
            x + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk,
            mask=(offs_m < M)[:, None] & mask_k[None, :],
            other=0.0,
        )
        w_tile = tl.load(
            w + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk,
            mask=mask_k[:, None] & (offs_n < N)[None, :],
            other=0.0,
        )
    return multiply_add(x_tile, w_tile, accumulator)


@triton.jit
def write_tile(
    out,
    accumulator,
    pid_m,
    pid_n,
    M,
    N,
    stride_om,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The finished tile, by the copy engine in PARTS halves of its columns: what it reads from must lie in shared memory."""
    if TMA:
        if PARTS == 2:
            halves = tl.permute(tl.reshape(accumulator, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            out.store([pid_m * BLOCK_M, pid_n * BLOCK_N], narrow(left, DTYPE))
            out.store([pid_m * BLOCK_M, pid_n * BLOCK_N + BLOCK_N // 2], narrow(right, DTYPE))
        else:
            out.store([pid_m * BLOCK_M, pid_n * BLOCK_N], narrow(accumulator, DTYPE))
    else:
        offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        tl.store(out + offs_m[:, None] * stride_om + offs_n[None, :], narrow(accumulator, DTYPE), mask=mask)


# As for the other passes: M changes with every batch and is not specialised, N, K, R and the strides belong to the layer.
@triton.jit(do_not_specialize=["M", "threshold"])
def _lora_product_kernel(
    x,
    w,
    out,
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
    scaling,
    threshold,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_om,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    TMA: tl.constexpr,
    W_BY_ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Tiles of out, by as many programs as the GPU holds at once. x, w and out are descriptors with TMA, else pointers; w lies by
    rows, [N, K], or by columns, [K, N]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    steps = tl.cdiv(K, BLOCK_K)
    if seed_ptr is not None:
        bits_ptr += program * (BLOCK_M * BLOCK_N // 8)
    for tile in range(program, tiles, programs):
        pid_m, pid_n = place_of(tile, tiles_m, tiles_n, GROUP_M)
        accumulator = adapter_part(
            *(s_ptr, b_ptr, bias_ptr, lora_bias_ptr, seed_ptr, bits_ptr, pid_m, pid_n, M, N, R, scaling),
            *(threshold, stride_sm, stride_sr, stride_bn, stride_br, BLOCK_M, BLOCK_N, BLOCK_R),
        )
        for step in range(steps):
            accumulator = _multiply(
                *(x, w, accumulator, pid_m, pid_n, step, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk),
                *(TMA, W_BY_ROWS, BLOCK_M, BLOCK_N, BLOCK_K),
            )
        write_tile(out, accumulator, pid_m, pid_n, M, N, stride_om, TMA, PARTS, DTYPE, BLOCK_M, BLOCK_N)


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def lora_product(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    s: torch.Tensor,
    b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
    config,
) -> torch.Tensor:
    """x wᵀ + bias + dropout(scaling * (s bᵀ + lora_bias)) of ``dtype``: x ``[M, K]``, w ``[N, K]`` and s ``[M, R]`` of one 16-bit
    dtype, b ``[N, R]`` of any floating one, all of any strides, bias and lora_bias ``[N]``, contiguous. With ``config.tma`` the
    operands are such as ``peftfast.ops.lora_product.copied_by_descriptors`` accepts."""
    M, K = x.shape
    N, R = b.shape
    out = torch.empty((M, N), dtype=dtype, device=x.device)
    if not (M and N):
        return out
    masked = seed is not None and p > 0.0
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    programs = min(config.programs, tiles)
    bits = None
    if masked:
        bits = torch.empty(programs * config.block_m * config.block_n // 8, dtype=torch.uint8, device=x.device)
    by_rows = w.stride(1) == 1
    operands = (x, w, out)
    if config.tma:
        operands = (
            TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
            TensorDescriptor.from_tensor(w, [config.block_n, config.block_k])
            if by_rows
            else TensorDescriptor.from_tensor(w.T, [config.block_k, config.block_n]),
            TensorDescriptor.from_tensor(out, [config.block_m, config.block_n // config.parts]),
        )
    launch(
        _lora_product_kernel,
        (programs,),
        *operands,
        s,
        b,
        bias,
        lora_bias,
        seed if masked else None,
        bits,
        M,
        N,
        K,
        R,
        scaling * keep_scale(p) if masked else scaling,
        keep_threshold(p) if masked else 0,
        x.stride(0),
        x.stride(1),
        w.stride(0),
        w.stride(1),
        out.stride(0),
        s.stride(0),
        s.stride(1),
        b.stride(0),
        b.stride(1),
        TMA=config.tma,
        W_BY_ROWS=by_rows,
        PARTS=config.parts,
        DTYPE=_DTYPES[dtype],
        GROUP_M=config.group_m,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
