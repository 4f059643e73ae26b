"""The public functions, signed like torch.nn.functional's."""

from .lora import lora_linear
from .nf4 import NF4Weight, nf4_dequantize, nf4_quantize
from .nf4_merging import nf4_merge, nf4_merge_dense
from .nf4_product import merged_dequantization, nf4_linear, shared_dequantization

__all__ = [
    "NF4Weight",
    "lora_linear",
    "merged_dequantization",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_merge",
    "nf4_merge_dense",
    "nf4_quantize",
    "shared_dequantization",
]
