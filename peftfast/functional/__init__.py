"""The public functions, signed like torch.nn.functional's."""

from .lora import lora_linear
from .nf4 import NF4Weight, nf4_dequantize, nf4_linear, nf4_quantize

__all__ = ["NF4Weight", "lora_linear", "nf4_dequantize", "nf4_linear", "nf4_quantize"]
