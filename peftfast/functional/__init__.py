"""The public functions, signed like torch.nn.functional's."""

from .lora import lora_linear
from .nf4 import NF4Weight, nf4_dequantize, nf4_linear, nf4_quantize
from .zeroth_order import perturb_, perturbation, zo_linear

__all__ = [
    "NF4Weight",
    "lora_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "perturb_",
    "perturbation",
    "zo_linear",
]
