"""Dequantising against the formula, bit for bit, as a function of a case."""

from dataclasses import dataclass

import torch

import peftfast.functional as F
from peftfast.reference import nf4 as definition
from tests.support.lora_checks import BF16, DEVICE, F16, F32


@dataclass(frozen=True)
class NF4Case:
    shape: tuple[int, ...] = (37, 96)
    block_size: int = 64
    dtype: torch.dtype = BF16
    nested: bool = True
    quant_type: str = "nf4"
    data: int = 0


# Odd counts, blocks that straddle rows, more than 256 blocks (two nested blocks), each dtype.
TELLING = (
    NF4Case(),
    NF4Case((261, 65), 64, F32),
    NF4Case((33, 7), 32, F16, nested=False, data=2),
    NF4Case((19, 130), 32, BF16, quant_type="fp4", data=3),
)


def weight_of(case: NF4Case) -> F.NF4Weight:
    """Rows of very different size, so that no two blocks share a maximum."""
    generator = torch.Generator().manual_seed(4000 + case.data)
    dense = torch.randn(case.shape, generator=generator)
    dense *= torch.rand(case.shape[0], *[1] * (len(case.shape) - 1), generator=generator) * 3 + 0.1
    return F.nf4_quantize(
        dense.to(DEVICE), block_size=case.block_size, double_quant=case.nested, quant_type=case.quant_type
    )


def check_dequantize(case: NF4Case) -> None:
    nf4 = weight_of(case)
    *first, nested_absmax, nested_code, nested_offset = nf4.storage()
    expected = definition.nf4_dequantize(*first, case.dtype, nested_absmax, nested_code, nested_offset)
    actual = F.nf4_dequantize(nf4, case.dtype)
    assert actual.dtype == case.dtype and actual.shape == expected.shape, f"{case}: {actual.dtype} {actual.shape}"
    wrong = (actual != expected).sum().item()
    assert wrong == 0, f"{case}: {wrong} of {expected.numel()} values differ from the formula's"
