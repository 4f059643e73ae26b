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

# Box-Muller, frozen: each coefficient is a float32, each product and each sum is rounded to float32 by itself, Horner from the last
# coefficient on. NEG_TWO_LOG: -2 ln(1 + f) / f on sqrt(1/2) - 1 <= f <= sqrt(2) - 1, relative error 1.7e-7; SIN: sin(pi/4 y) / y in
# y**2, error 2.4e-9, and COS: (cos(pi/4 y) - 1) / y**2 in y**2, error 3.2e-8, on -1 <= y <= 1.
NEG_TWO_LOG = tuple(
    map(
        float.fromhex,
        (
            *("-0x1.fffffep+0", "0x1.000074p+0", "-0x1.555b4cp-1", "0x1.ff6ae4p-2"),
            *("-0x1.973aa8p-2", "0x1.6082b0p-2", "-0x1.4e9af2p-2", "0x1.a91cbcp-3"),
        ),
    )
)
SIN = tuple(map(float.fromhex, ("0x1.921fb6p-1", "-0x1.4abbbap-4", "0x1.465ec6p-9", "-0x1.2d9bb8p-15")))
COS = tuple(map(float.fromhex, ("-0x1.3bd3a2p-2", "0x1.03b162p-6", "-0x1.4ea9e8p-12")))
TWO_LN_2 = float.fromhex("0x1.62e430p+0")
_SQRT_HALF_BITS = 0x3F3504F3

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


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def box_muller(radius_words: Tensor, angle_words: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals from two words each (Box and Muller, 1958): the radius times cosine and sine of the angle.

    The radius is sqrt(-2 ln u), u = (w + 1/2) / 2**32 in float32, so that no word gives ln 0 and the largest normal is 6.76; the angle
    is 2 pi w / 2**32, reduced to a quarter turn by integers.

    Args:
        radius_words, angle_words: int64 with values in [0, 2**32), of one shape.

    Returns:
        float32, float32 of that shape, finite for all words.
    """
    t = radius_words.to(torch.float32) + 0.5
    from_root = t.view(torch.int32) - _SQRT_HALF_BITS  # the exponent's steps now lie at sqrt(1/2) 2**e
    exponent = from_root >> 23
    mantissa = ((from_root & 0x7FFFFF) + _SQRT_HALF_BITS).view(torch.float32)
    f = mantissa - 1.0
    squared_radius = f * _horner(NEG_TWO_LOG, f) + (32 - exponent).to(torch.float32) * TWO_LN_2
    # By way of float64, which gives the correctly rounded root; torch's float32 root on a CPU is MKL's, up to one unit off.
    radius = torch.sqrt(squared_radius.double()).float()

    turned = (angle_words + (1 << 29)) & _MASK  # quarter turns, rounded, in the upper two bits
    rest = (angle_words << 2) & _MASK
    rest = rest - ((rest >> 31) << 32)  # as a signed word: what is left, in 2**-31 eighths of a turn
    y = rest.to(torch.float32) * 2.0**-31
    square = y * y
    sine, cosine = y * _horner(SIN, square), square * _horner(COS, square) + 1.0
    odd = (turned & (1 << 30)) != 0
    sine, cosine = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    sine = torch.where((turned & (1 << 31)) != 0, -sine, sine)
    cosine = torch.where(((turned + (1 << 30)) & (1 << 31)) != 0, -cosine, cosine)
    return radius * cosine, radius * sine


def gaussian(seed: Tensor, start: int, count: int, tensor_id: int) -> Tensor:
    """Normals of the elements start .. start + count - 1 of a logical tensor: float32 ``[count]``.

    Counter q = element // 4 of stream 0; words 0 and 1 give elements 4q and 4q + 1, words 2 and 3 the next two.
    """
    first, last = start // 4, -(-(start + count) // 4)
    words = philox_words(seed, first, last - first, tensor_id, STREAM_GAUSSIAN)
    normals = torch.stack(box_muller(words[:, 0::2], words[:, 1::2]), dim=-1).reshape(-1)
    return normals[start - 4 * first :][:count]


def rademacher(seed: Tensor, start: int, count: int, tensor_id: int) -> Tensor:
    """Signs of the elements start .. start + count - 1: float32 ``[count]`` of 1 and -1.

    Counter q = element // 128 of stream 3; word (element mod 128) // 32, its bit element mod 32, the lowest first: -1 where it is set.
    """
    first, last = start // 128, -(-(start + count) // 128)
    words = philox_words(seed, first, last - first, tensor_id, STREAM_RADEMACHER)
    bits = (words[..., None] >> torch.arange(32, device=words.device)) & 1
    return 1.0 - 2.0 * bits.reshape(-1)[start - 128 * first :][:count].to(torch.float32)


def rounding_draws(seed: Tensor, start: int, count: int, tensor_id: int) -> Tensor:
    """16-bit draws of the elements start .. start + count - 1: int64 ``[count]`` in [0, 65536).

    Counter q = element // 8 of stream 2; draw element mod 8, low half of a word before its high half.
    """
    first, last = start // DRAWS_PER_COUNTER, -(-(start + count) // DRAWS_PER_COUNTER)
    words = philox_words(seed, first, last - first, tensor_id, STREAM_ROUNDING)
    draws = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)
    return draws[start - DRAWS_PER_COUNTER * first :][:count]
