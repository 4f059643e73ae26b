"""Sums cut among programs: partial sums in a workspace, added in a fixed order, so that every run gives the same
bits."""

import torch
import triton
import triton.language as tl

from .launch import launch
from .numerics import narrow

_BLOCK = 1024


@triton.jit(do_not_specialize=["partials"])
def _reduce_partials_kernel(partial_ptr, out_ptr, count, partials, scaling, BLOCK: tl.constexpr):
    """out = scaling * the sum of ``partials`` contiguous float32 arrays of ``count`` elements, added first to last."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(partials):
        total += tl.load(partial_ptr + offs, mask=mask, other=0.0)
        partial_ptr += count
    tl.store(out_ptr + offs, narrow(total * scaling, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["partials", "other_partials"])
def _reduce_two_kernel(
    partial_ptr,
    out_ptr,
    count,
    partials,
    scaling,
    other_partial_ptr,
    other_out_ptr,
    other_count,
    other_partials,
    other_scaling,
    BLOCK: tl.constexpr,
):
    """Two of :func:`_reduce_partials_kernel`'s results in one launch: the first takes the programs that its count needs."""
    own = (count - 1) // BLOCK + 1  # tl.cdiv adds before it divides, which just below 2**31 wraps around
    pid = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    if pid < own:
        offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < count
        for _ in range(partials):
            total += tl.load(partial_ptr + offs, mask=mask, other=0.0)
            partial_ptr += count
        tl.store(out_ptr + offs, narrow(total * scaling, out_ptr.dtype.element_ty), mask=mask)
    else:
        offs = (pid - own).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < other_count
        for _ in range(other_partials):
            total += tl.load(other_partial_ptr + offs, mask=mask, other=0.0)
            other_partial_ptr += other_count
        tl.store(other_out_ptr + offs, narrow(total * other_scaling, other_out_ptr.dtype.element_ty), mask=mask)


def divide(blocks: int, splits: int) -> tuple[int, int]:
    """Blocks a split and splits, none of them empty."""
    per_split = triton.cdiv(blocks, max(1, min(splits, blocks)))
    return per_split, triton.cdiv(blocks, per_split)


def partials_of(splits: int, out: torch.Tensor) -> torch.Tensor:
    """Where a kernel writes its sums: out itself when there is one, else a float32 workspace ``[splits,
    *out.shape]``."""
    return out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)


def reduce_partials(partials: torch.Tensor, out: torch.Tensor, scaling: float) -> None:
    """out = scaling * the sum of its partials; nothing to do where out holds the one sum already, scaled."""
    if partials is not out:
        grid = (triton.cdiv(out.numel(), _BLOCK),)
        launch(
            _reduce_partials_kernel,
            grid,
            partials,
            out,
            out.numel(),
            partials.shape[0],
            scaling,
            BLOCK=_BLOCK,
            num_warps=4,
        )


def reduce_two(
    partials: torch.Tensor,
    out: torch.Tensor,
    scaling: float,
    other_partials: torch.Tensor,
    other_out: torch.Tensor,
    other_scaling: float,
) -> None:
    """:func:`reduce_partials` for two results, in one launch at most."""
    if partials is out or other_partials is other_out:
        reduce_partials(partials, out, scaling)
        reduce_partials(other_partials, other_out, other_scaling)
        return
    count, other_count = out.numel(), other_out.numel()
    launch(
        _reduce_two_kernel,
        (triton.cdiv(count, _BLOCK) + triton.cdiv(other_count, _BLOCK),),
        partials,
        out,
        count,
        partials.shape[0],
        scaling,
        other_partials,
        other_out,
        other_count,
        other_partials.shape[0],
        other_scaling,
        BLOCK=_BLOCK,
        num_warps=4,
    )
