"""4-bit block quantisation as bitsandbytes stores it (Dettmers et al., QLoRA, arXiv 2305.14314).

A weight is flattened row-major and cut into blocks of ``block_size`` elements (a block may straddle rows); an element is the index
of the nearest of sixteen code values after division by its block's absolute maximum. Two elements share a byte, the even one in
the high nibble. With double quantisation the maxima themselves are stored as bytes: their mean is subtracted, and blocks of 256 of
them are quantised with a 256-entry code.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .lora import lora_product

NESTED_BLOCK_SIZE = 256
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4", "int4")
BITSANDBYTES_TYPES = ("nf4", "fp4")  # those that bitsandbytes decodes
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


def _shared(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes a table once, for all callers: a plain tensor, whoever asks first. Made in inference mode it could not be
    saved for any backward pass of the process; what a dispatch mode or a compiler sees, which may be a fake, is not kept."""

    @functools.cache
    def kept(*key: Any) -> Tensor:
        with torch.inference_mode(False):
            return make(*key)

    @functools.wraps(make)
    def table(*key: Any) -> Tensor:
        watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        return make(*key) if watched else kept(*key)

    table.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return table


@_shared
def code_table(quant_type: str, device: torch.device) -> Tensor:
    """The sixteen float32 code values of ``"nf4"``, ``"fp4"`` or ``"int4"``. Shared between callers: never written. Computed on the
    CPU: a GPU divides by a number as by its reciprocal, and four of int4's would be an ulp off."""
    if quant_type == "nf4":
        return torch.tensor(_NF4_CODE, dtype=torch.float32, device=device)
    if quant_type == "fp4":
        magnitudes = torch.tensor(_FP4_TWELFTHS, dtype=torch.float32, device="cpu")
        # Plus 0: the zero of both signs is the positive one, as in bitsandbytes' table.
        return (torch.cat((magnitudes, -magnitudes)) / 12.0 + 0.0).to(device)
    if quant_type == "int4":
        # Integers -8 to 7 in units of a block's maximum over 7: nothing of a block is nearest to -8.
        return ((torch.arange(16, dtype=torch.float32, device="cpu") - 8) / 7).to(device)
    raise ValueError(f"quant_type: expected one of {QUANT_TYPES}, got {quant_type!r}")


@_shared
def nested_code_table(device: torch.device) -> Tensor:
    """The 256 float32 values of the signed 8-bit dynamic type (Dettmers et al., arXiv 2110.02861), sorted.

    Decade i of seven holds 2**i values between 0.1 and 1 times 10**(i - 6), each the middle of equal steps, and their negatives;
    0 and 1 complete the table.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
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


def code_bounds(code: Tensor) -> tuple[Tensor, Tensor]:
    """The middles between neighbours of a code of any order, ascending, and the indices of its entries in that order."""
    order = torch.argsort(code)
    ordered = code[order]
    return (ordered[:-1] + ordered[1:]) / 2, order


def nearest_code(values: Tensor, code: Tensor) -> Tensor:
    """Index of the nearest entry of ``code`` (any order); a value halfway between two takes the lower, a NaN the highest."""
    bounds, order = code_bounds(code)
    return order[torch.bucketize(values, bounds)]


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


def nf4_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_bias: Tensor | None = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """x Wᵀ + bias + scaling (S Bᵀ + lora_bias) and S = x Aᵀ (None without an adapter), for a few rows and no dropout.

    Args:
        x: ``[M, K]``. weight: ``[N, K]``, dequantised, of x's dtype. bias, lora_bias: ``[N]``. lora_a: ``[R, K]``. lora_b: ``[N,
        R]``.
    """
    dtype = x.dtype
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(dtype))
    if lora_a is None or lora_b is None:
        return y, None
    s = x @ lora_a.to(dtype).T
    added = s @ lora_b.to(dtype).T
    return y + scaling * (added if lora_bias is None else added + lora_bias.to(dtype)), s


def nf4_product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: tuple[int, ...],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    transposed: bool,
    bias: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    lora_bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """A layer's product of many rows: :func:`peftfast.reference.lora.lora_product` on the weight decoded to x's dtype, W̃ of ``shape``
    ``(N, K)`` in the forward and ``transposed`` W̃ᵀ, for dX. Without s and b there is no adapter."""
    weight = nf4_dequantize(packed, absmax, code, block_size, shape, x.dtype, nested_absmax, nested_code, nested_offset)
    weight = weight.T if transposed else weight
    if s is None or b is None:
        s, b = x.new_zeros(x.shape[0], 0), x.new_zeros(weight.shape[0], 0)
    return lora_product(x, weight, bias, s, b, lora_bias, seed, p, scaling, dtype)


def nf4_quantize(weight: Tensor, block_size: int, code: Tensor) -> tuple[Tensor, Tensor]:
    """Packed bytes uint8 ``[ceil(numel / 2), 1]`` and float32 block maxima of a floating weight of any shape."""
    scaled, absmax = _normalise_blocks(weight.detach().reshape(-1).float(), block_size)
    if scaled.numel() % 2:
        scaled = torch.cat((scaled, scaled.new_zeros(1)))
    index = nearest_code(scaled, code).to(torch.uint8)
    return ((index[::2] << 4) | index[1::2])[:, None], absmax


_GRID = 65535  # steps of the grid that bitsandbytes' CPU kernel snaps to


def _snapped(scaled: Tensor) -> Tensor:
    """Values in [-1, 1] moved to the nearest of 65,536 equally spaced ones, in float32, as bitsandbytes' CPU kernel does."""
    index = ((scaled + 1) * 0.5 * _GRID + 0.5).to(torch.int64)
    return -1 + 2 * index.float() / _GRID


def quantize_nested(centred: Tensor, code: Tensor, snapped: bool) -> tuple[Tensor, Tensor]:
    """uint8 indices into the sorted ``code`` of 256 and float32 maxima of blocks of 256 of float32 values.

    ``snapped`` is how bitsandbytes' kernel for CPU tensors does it: every block, a short last one too, is multiplied by the
    reciprocal of its maximum and moved to a grid of 65,536 values before the nearest code is taken; a block of zeros gives index 0
    and the maximum 0. Otherwise it is the formula of its CUDA kernel and of all its other backends.
    """
    if not snapped:
        scaled, absmax = _normalise_blocks(centred, NESTED_BLOCK_SIZE)
        return nearest_code(scaled, code).to(torch.uint8), absmax
    count = centred.numel()
    padded = torch.nn.functional.pad(centred, (0, -count % NESTED_BLOCK_SIZE)).reshape(-1, NESTED_BLOCK_SIZE)
    absmax = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / absmax)[:, None]).reshape(-1)[:count]  # 0 / 0 where a block is all zeros
    index = nearest_code(_snapped(torch.nan_to_num(scaled, nan=0.0).clamp(-1, 1)), code)
    return torch.where(scaled.isnan(), 0, index).to(torch.uint8), absmax


def nest_absmax(absmax: Tensor, snapped: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation of block maxima: uint8 indices, float32 maxima of blocks of 256, and the offset ``[1]``.

    The offset is torch.mean of the maxima, so its last bits are the device's.
    """
    offset = absmax.mean()
    index, nested_absmax = quantize_nested(absmax - offset, nested_code_table(absmax.device), snapped)
    return index, nested_absmax, offset[None]
