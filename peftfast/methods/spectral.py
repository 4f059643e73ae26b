"""Singular values and vectors of a weight, for the initialisations that use them."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U ``[N, rank]``, s ``[rank]``, Vᵀ ``[rank, K]``) of the largest singular values of ``matrix`` ``[N, K]``, largest first, in its
    dtype; computed in float32 at least.

    Signs: the largest entry of each column of U is positive, so that all libraries give the same factors where the values differ.
    """
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    at = u.abs().argmax(0, keepdim=True)
    signs = torch.where(u.gather(0, at) < 0, -1.0, 1.0).to(u.dtype)
    return tuple(one.to(matrix.dtype).contiguous() for one in (u * signs, s, v * signs.T))  # type: ignore[return-value]
