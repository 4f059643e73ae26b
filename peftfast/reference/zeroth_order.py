"""Zeroth order (MeZO, arXiv 2305.17333): weights moved along directions z that are a function of a seed and never stored.

z of a tensor is ``peftfast.reference.philox``'s: a pure function of (seed, tensor id, position in the logical tensor). All arithmetic
on a weight is float32 (float64 for a float64 weight), each product and sum rounded by itself, and the result is rounded to the
weight's dtype once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from . import philox
from .nf4 import nf4_dequantize

_BF16_SATURATING = 0x7F7F0000  # the largest finite bfloat16 as float32 bits
_F16_SATURATING = 0x477FE000  # 65504
_F16_SMALLEST_NORMAL = 0x38800000  # 2**-14


def direction(seed: Tensor, start: int, count: int, tensor_id: int, rademacher: bool) -> Tensor:
    """z of the elements start .. start + count - 1 of a logical tensor: float32 ``[count]``."""
    return (philox.rademacher if rademacher else philox.gaussian)(seed, start, count, tensor_id)


def perturbation(
    seed: Tensor, shape: tuple[int, ...], tensor_id: int, offset: int, rademacher: bool, dtype: torch.dtype
) -> Tensor:
    """z of a tensor of ``shape`` whose first element is element ``offset`` of its logical tensor."""
    count = 1
    for size in shape:
        count *= size
    return direction(seed, offset, count, tensor_id, rademacher).to(dtype).reshape(shape)


def round_stochastically(value: Tensor, draws: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``value`` in bfloat16 or float16, rounded away from zero when the draw, in 65536ths, carries the bits that go.

    Unbiased: a value a part p of the way from one neighbour to the next becomes the next with probability p. What dtype holds exactly
    stays. From the largest finite value on, and where value is not finite, the nearest is taken: chance makes no infinity.

    Args:
        draws: int64 in [0, 65536), of value's shape.
    """
    bits = value.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    sign, magnitude = bits >> 31, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded, saturating = (magnitude + draws) >> 16, magnitude >= _BF16_SATURATING
    else:
        normal = (magnitude + (draws >> 3) - 0x38000000) >> 13
        # Below the smallest normal number the neighbours are 2**-24 apart; in units of 2**-40 the draw has the last 16 bits.
        small = (value.abs().clamp(max=2.0**-14) * 2.0**40).to(torch.int64) + draws >> 16
        rounded = torch.where(magnitude < _F16_SMALLEST_NORMAL, small, normal)
        saturating = magnitude >= _F16_SATURATING
    rounded = torch.where(saturating, 0, rounded) | sign << 15
    rounded = (rounded - ((rounded >> 15) << 16)).to(torch.int16).view(dtype)
    return torch.where(saturating, value.to(dtype), rounded)


def perturbed(
    weight: Tensor,
    seeds: Tensor,
    coefficients: Tensor,
    decay: Tensor | None,
    threshold: Tensor | None,
    rounding_seed: Tensor | None,
    tensor_id: int,
    offset: int,
    rademacher: bool,
) -> Tensor:
    """decay * weight + sum over k of coefficients[k] * z(seeds[k]), rounded to weight's dtype once.

    Args:
        weight: floating, of any shape.
        seeds: int64 ``[K]``. coefficients: float32 ``[K]``; the terms are added in order, one whose coefficient is 0 is left out.
        decay: one float32; none is 1.
        threshold: one float32; elements of a magnitude above it stay as they are (Sparse MeZO, arXiv 2402.15751).
        rounding_seed: one int64: the result is rounded stochastically (bfloat16 and float16). None: to nearest even.
        tensor_id, offset: which logical tensor, and the position of weight's first element in it.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    before = weight.reshape(-1).to(wide)
    value = before if decay is None else before * decay.to(wide)
    for k in range(seeds.numel()):
        z = direction(seeds[k : k + 1], offset, weight.numel(), tensor_id, rademacher).to(wide)
        coefficient = coefficients[k].to(wide)
        value = torch.where(coefficient != 0, value + coefficient * z, value)
    if threshold is not None:
        value = torch.where(before.abs() <= threshold.to(wide), value, before)
    if rounding_seed is not None and weight.dtype in (torch.bfloat16, torch.float16):
        draws = philox.rounding_draws(rounding_seed, offset, weight.numel(), tensor_id)
        return round_stochastically(value, draws, weight.dtype).reshape(weight.shape)
    return value.to(weight.dtype).reshape(weight.shape)


def zo_linear(
    x_plus: Tensor,
    x_minus: Tensor,
    weight: Tensor,
    bias_plus: Tensor | None,
    bias_minus: Tensor | None,
    seed: Tensor,
    eps: Tensor,
    threshold: Tensor | None,
    tensor_id: int,
    rademacher: bool,
) -> tuple[Tensor, Tensor]:
    """(x_plus (W + eps z)ᵀ + bias_plus, x_minus (W - eps z)ᵀ + bias_minus), both weights rounded to weight's dtype once."""
    plus = perturbed(weight, seed, eps, None, threshold, None, tensor_id, 0, rademacher)
    minus = perturbed(weight, seed, -eps, None, threshold, None, tensor_id, 0, rademacher)
    return functional.linear(x_plus, plus, bias_plus), functional.linear(x_minus, minus, bias_minus)


def zo_nf4_linear(
    x_plus: Tensor,
    x_minus: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    block_size: int,
    shape: Sequence[int],
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    bias_plus: Tensor | None,
    bias_minus: Tensor | None,
    seed: Tensor,
    eps: Tensor,
    threshold: Tensor | None,
    tensor_id: int,
    rademacher: bool,
    of_scales: bool,
) -> tuple[Tensor, Tensor]:
    """The same on a 4-bit weight: W is the dequantised weight in x's dtype. Or, ``of_scales``, z moves the float32 block maxima (QZO,
    arXiv 2505.13430), and each side decodes with its own; ``threshold`` is of the maxima then."""
    sides = []
    for x, bias, scale in ((x_plus, bias_plus, eps), (x_minus, bias_minus, -eps)):
        maxima = absmax
        if of_scales:
            maxima = perturbed(absmax, seed, scale, None, threshold, None, tensor_id, 0, rademacher)
        nested = (nested_absmax, nested_code, nested_offset)
        weight = nf4_dequantize(packed, maxima, code, block_size, tuple(shape), x.dtype, *nested)
        if not of_scales:
            weight = perturbed(weight, seed, scale, None, threshold, None, tensor_id, 0, rademacher)
        sides.append(functional.linear(x, weight, bias))
    return sides[0], sides[1]
