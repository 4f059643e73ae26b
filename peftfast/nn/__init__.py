"""Modules that stand where an nn.Linear stood."""

from .lora import LoRALinear, LoRANF4Linear
from .nf4 import NF4Linear
from .nf4_checkpoint import load_nf4, nf4_weights

__all__ = ["LoRALinear", "LoRANF4Linear", "NF4Linear", "load_nf4", "nf4_weights"]
