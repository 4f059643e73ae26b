"""4-bit block quantisation as bitsandbytes stores it (Dettmers et al., QLoRA, arXiv 2305.14314).

A weight is flattened row-major and cut into blocks of ``block_size`` elements (a block may straddle rows); an element is the index
of the nearest of sixteen code values after division by its block's absolute maximum. Two elements share a byte, the even one in
the high nibble. With double quantisation the maxima themselves are stored as bytes: their mean is subtracted, and blocks of 256 of
them are quantised with a 256-entry code.
"""

import functools

import torch
from torch import Tensor

NESTED_BLOCK_SIZE = 256
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
_SMALLEST_MAXIMUM = 1e-38  # an all-zero block divides by this

# Quantiles of the standard normal distribution scaled to [-1, 1]: the published table.
_NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# One sign, two exponent and one mantissa bit; in units of 1/12, indexed by bit pattern.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@functools.cache
def code_table(quant_type: str, device: torch.device) -> Tensor:
    """The sixteen float32 code values of ``"nf4"`` or ``"fp4"``. Shared between callers: never written."""
    if quant_type == "nf4":
        return torch.tensor(_NF4_CODE, dtype=torch.float32, device=device)
    if quant_type == "fp4":
        magnitudes = torch.tensor(_FP4_TWELFTHS, dtype=torch.float32)
        return (torch.cat((magnitudes, -magnitudes)) / 12.0).to(device)
    raise ValueError(f"quant_type: expected one of {QUANT_TYPES}, got {quant_type!r}")


@functools.cache
def nested_code_table(device: torch.device) -> Tensor:
    """The 256 float32 values of the signed 8-bit dynamic type (Dettmers et al., arXiv 2110.02861), sorted.

    Decade i of seven holds 2**i values between 0.1 and 1 times 10**(i - 6), each the middle of equal steps, and their negatives;
    0 and 1 complete the table.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += (10 ** (decade - 6) * middles).tolist() + (-(10 ** (decade - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def unnest_absmax(absmax: Tensor, nested_absmax: Tensor, nested_code: Tensor, nested_offset: Tensor) -> Tensor:
    """float32 block maxima from their bytes: code[q] * maximum of 256 + offset, product and sum rounded separately."""
    block_maximum = nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: absmax.numel()]
    return nested_code[absmax.long()] * block_maximum + nested_offset


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """The weight of ``shape`` in ``dtype``: code value times block maximum in float32, rounded once.

    Args:
        packed: uint8 ``[ceil(numel / 2), 1]``, the even element in the high nibble.
        absmax: float32 ``[blocks]``, or uint8 when nested.
        code: float32 ``[16]``.
        nested_absmax, nested_code, nested_offset: float32 ``[ceil(blocks / 256)]``, ``[256]`` and one element; all or none.
    """
    if nested_absmax is not None and nested_code is not None and nested_offset is not None:
        absmax = unnest_absmax(absmax, nested_absmax, nested_code, nested_offset)
    count = torch.Size(shape).numel()
    nibbles = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), dim=-1).reshape(-1)[:count]
    values = code[nibbles.long()] * absmax.repeat_interleave(block_size)[:count]
    return values.to(dtype).reshape(shape)


def nearest_code(values: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest entry of ``code`` (any order); a value halfway between two takes the lower."""
    order = torch.argsort(code)
    ordered = code[order]
    return order[torch.bucketize(values, (ordered[:-1] + ordered[1:]) / 2)]


def _normalise_blocks(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Values scaled to [-1, 1] by block, and the maxima. A short last block is divided, the others multiplied by the reciprocal:
    the two round differently, and bitsandbytes' bytes are the contract."""
    full = values.numel() // block_size * block_size
    blocks = values[:full].reshape(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = torch.clamp(blocks * (1.0 / absmax.clamp(min=_SMALLEST_MAXIMUM))[:, None], -1, 1).reshape(-1)
    if full != values.numel():
        tail_absmax = values[full:].abs().amax().clamp(min=_SMALLEST_MAXIMUM)
        absmax = torch.cat((absmax, tail_absmax[None]))
        scaled = torch.cat((scaled, torch.clamp(values[full:] / tail_absmax, -1, 1)))
    return scaled, absmax


def nf4_quantize(weight: Tensor, block_size: int, code: Tensor) -> tuple[Tensor, Tensor]:
    """Packed bytes uint8 ``[ceil(numel / 2), 1]`` and float32 block maxima of a floating weight of any shape."""
    scaled, absmax = _normalise_blocks(weight.detach().reshape(-1).float(), block_size)
    if scaled.numel() % 2:
        scaled = torch.cat((scaled, scaled.new_zeros(1)))
    index = nearest_code(scaled, code).to(torch.uint8)
    return ((index[::2] << 4) | index[1::2])[:, None], absmax


def nest_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation of block maxima: uint8 indices, float32 maxima of blocks of 256, and the offset ``[1]``.

    The offset is torch.mean of the maxima, so its last bits are the device's.
    """
    offset = absmax.mean()
    scaled, nested_absmax = _normalise_blocks(absmax - offset, NESTED_BLOCK_SIZE)
    return nearest_code(scaled, nested_code_table(absmax.device)).to(torch.uint8), nested_absmax, offset[None]
