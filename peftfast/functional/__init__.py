"""The public functions, signed like torch.nn.functional's."""

from .lora import lora_linear
from .lora_multi import Adapter, Projection, lora_linears, multi_lora_linear
from .nf4 import NF4Weight, nf4_dequantize, nf4_linear, nf4_quantize

__all__ = [
    "Adapter",
    "NF4Weight",
    "Projection",
    "lora_linear",
    "lora_linears",
    "multi_lora_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
]
