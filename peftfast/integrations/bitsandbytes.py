"""What is asked of a bitsandbytes layer without importing bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import NF4Weight

REPACK_FLAG = "support_avx512bf16_for_cpu"
REPACK_NOTE = (
    f"{REPACK_FLAG} set to False on the base layer: its evaluation forward would repack the weight in place, lossily"
)


def quant_state(layer: nn.Module) -> Any:
    """The quantisation state, from the parameter or, where that lost it (FSDP2), from the module. None: not quantised yet."""
    state = getattr(layer.weight, "quant_state", None)
    return state if state is not None else getattr(layer, "quant_state", None)


def why_not_served(layer: nn.Module) -> str:
    """Why a Linear4bit's weight cannot be read, or an empty string."""
    state = quant_state(layer)
    if state is None:
        return "the 4-bit weight is not quantised yet: move the layer to its device first"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked the weight for CPU inference"
    if state.state2 is not None and state.state2.blocksize != 256:
        return f"nested blocks of {state.state2.blocksize}"
    if len(state.shape) != 2:
        return f"a 4-bit weight of shape {tuple(state.shape)}"
    return ""


def weight_of(layer: nn.Module) -> NF4Weight:
    return NF4Weight.from_bitsandbytes(layer.weight, quant_state(layer))


def compute_dtype_for(layer: Any, x: Tensor) -> torch.dtype:
    """The layer's compute dtype, settled at its first call from x exactly as the layer's own forward settles it."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return x.dtype if layer.compute_dtype is None else layer.compute_dtype
