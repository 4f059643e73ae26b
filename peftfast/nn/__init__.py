"""Modules that stand where an nn.Linear stood."""

from .lora import LoRALinear, LoRANF4Linear
from .nf4 import NF4Linear
from .rosa import RoSALinear
from .sparse_delta import SparseDeltaLinear

__all__ = ["LoRALinear", "LoRANF4Linear", "NF4Linear", "RoSALinear", "SparseDeltaLinear"]
