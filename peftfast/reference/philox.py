"""The random-number definition that dropout and perturbations share: Philox4x32-10 (Salmon et al., SC 2011).

A draw is a pure function of (seed, tensor id, stream, position), so that every implementation, blocking and shard sees the same
bits. Words are held in int64 tensors with values in [0, 2**32), because torch has no arithmetic on uint32.
"""

import torch
from torch import Tensor

ROUNDS = 10
STREAM_GAUSSIAN = 0
STREAM_DROPOUT = 1
STREAM_ROUNDING = 2
STREAM_RADEMACHER = 3
DRAWS_PER_COUNTER = 8  # 16-bit draws in the four 32-bit words of one counter
DRAW_RANGE = 1 << 16

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _mulhilo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b. The product is split at 16 bits: a whole one would overflow int64's sign."""
    low_part = (a & 0xFFFF) * b
    high_part = (a >> 16) * b + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors of 32-bit words; the arguments broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _mulhilo(c0, _MULTIPLIERS[0])
        high1, low1 = _mulhilo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _words_at(seed: Tensor, q: Tensor, tensor_id: int, stream: int) -> Tensor:
    seed = seed.reshape(()).to(torch.int64)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    counter = (q & _MASK, (q >> 32) & _MASK, torch.full_like(q, tensor_id), torch.full_like(q, stream))
    return torch.stack(torch.broadcast_tensors(*philox4x32(counter, key)), dim=-1)


def philox_words(seed: Tensor, start: int, count: int, tensor_id: int, stream: int) -> Tensor:
    """Words of the counters q = start .. start + count - 1.

    Args:
        seed: one int64 element, the 64-bit key.
        start, count: the range of q; start may exceed 2**32.
        tensor_id, stream: the upper two counter words, each in [0, 2**32).

    Returns:
        int64 ``[count, 4]`` with values in [0, 2**32).
    """
    q = torch.arange(start, start + count, dtype=torch.int64, device=seed.device)
    return _words_at(seed, q, tensor_id, stream)


def keep_threshold(p: float) -> int:
    """The 16-bit draw below which an element is kept: round(65536 * (1 - p)), in [0, 65536]."""
    return round(DRAW_RANGE * (1.0 - p))


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by: the inverse of the exact keep rate threshold / 65536; 0 where nothing is kept."""
    threshold = keep_threshold(p)
    return DRAW_RANGE / threshold if threshold else 0.0


def dropout_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The keep mask of a ``[rows, columns]`` matrix.

    Counter q = row * ceil(columns / 8) + column // 8 of stream 1 and tensor id 0 serves eight columns; column c takes the
    (c mod 8)-th 16-bit draw, low half of a word before its high half.

    Returns:
        bool ``[rows, columns]``, True where the element is kept.
    """
    counters_per_row = -(-columns // DRAWS_PER_COUNTER)
    q = torch.arange(rows * counters_per_row, dtype=torch.int64, device=seed.device)
    words = _words_at(seed, q, 0, STREAM_DROPOUT)  # [rows * counters_per_row, 4]
    draws = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # [.., 4, 2]: draw 2i is word i's low half
    draws = draws.reshape(rows, counters_per_row * DRAWS_PER_COUNTER)[:, :columns]
    return draws < keep_threshold(p)


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Inverted dropout of a matrix ``[rows, columns]`` under :func:`dropout_mask`; x itself where p is 0 or there is no seed."""
    if seed is None or p == 0.0:
        return x
    mask = dropout_mask(seed, x.shape[0], x.shape[1], p)
    return torch.where(mask, x * keep_scale(p), torch.zeros((), dtype=x.dtype, device=x.device))
