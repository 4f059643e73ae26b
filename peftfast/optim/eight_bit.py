"""Optimiser states in 8 bits: blocks of 256 values share a float32 maximum, and each value is one of 256 parts of it (the idea of
Dettmers et al., arXiv 2110.02861; the codes are logarithmic and peftfast's own)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 256


@functools.lru_cache(maxsize=8)
def code(signed: bool, device: torch.device) -> Tensor:
    """256 ascending float32: 0 and powers of 2^(1/8) from 2^-31.75 to 1, at most 4.4 % from any value between; signed, 0 and both signs
    of powers of 2^(1/6) from 2^-21 to 1, at most 6 %, where one of the 256 is spare."""
    if not signed:
        positive = torch.exp2(-torch.arange(254, -1, -1, dtype=torch.float64) / 8)
        return torch.cat((positive.new_zeros(1), positive)).float().to(device)
    positive = torch.exp2(-torch.arange(126, -1, -1, dtype=torch.float64) / 6)
    values = torch.cat((-positive.flip(0), positive.new_zeros(1), positive))
    return torch.cat((values, values.new_ones(1))).float().to(device)


def compress(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """uint8 ``[S]`` and float32 ``[ceil(S / 256)]``; each value becomes the nearest part of its block's maximum."""
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % BLOCK)).reshape(-1, BLOCK)
    largest = blocks.abs().amax(1)
    table = code(signed, values.device)
    middles = (table[1:] + table[:-1]) / 2
    parts = blocks / torch.where(largest > 0, largest, 1.0)[:, None]
    return torch.bucketize(parts, middles).to(torch.uint8).reshape(-1)[:count].clone(), largest


def decompress(bytes_: Tensor, largest: Tensor, signed: bool) -> Tensor:
    """float32 ``[S]``."""
    return code(signed, bytes_.device)[bytes_.long()] * largest.repeat_interleave(BLOCK)[: bytes_.numel()]
