"""Modules that stand where an nn.Linear stood."""

from .lora import LoRALinear, LoRANF4Linear
from .lora_group import LoRALinears
from .nf4 import NF4Linear
from .nf4_checkpoint import load_nf4, nf4_weights
from .rosa import RoSALinear
from .sparse_delta import SparseDeltaLinear

__all__ = [
    "LoRALinear",
    "LoRALinears",
    "LoRANF4Linear",
    "NF4Linear",
    "RoSALinear",
    "SparseDeltaLinear",
    "load_nf4",
    "nf4_weights",
]
