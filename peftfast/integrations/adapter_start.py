"""Adapters that make up for what their base lost in 4 bits (LoftQ, EoRA): which 4 bits these were stands in the header of the weights'
file, which PEFT passes over."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from .. import functional as F
from ..nn import LoRALinear, LoRANF4Linear, NF4Linear
from ..nn.nf4 import is_bitsandbytes_4bit

STARTED_FROM = "peftfast_started_from"


def started_from(weights: Path) -> dict[str, Any] | None:
    """quant_type, block_size and double_quant of the base that an adapter began on, if what that lost is made up for by the adapter
    (LoftQ, EoRA): on any other base the model is not the one that was trained. None: it began on the base as it is."""
    from safetensors import safe_open

    if not weights.is_file():
        return None  # PEFT's older files are pickles
    with safe_open(weights, framework="pt") as file:
        found = (file.metadata() or {}).get(STARTED_FROM)
    return None if found is None else json.loads(found)


def in_its_4_bits(layer: nn.Linear, path: str, settings: dict[str, Any]) -> nn.Linear:
    """The layer that an adapter began on: a dense one in 4 bits, a 4-bit one as it is."""
    if not isinstance(layer, (NF4Linear, LoRANF4Linear)) and not is_bitsandbytes_4bit(layer):
        if isinstance(layer, LoRALinear):
            raise ValueError(f"model: {path}: expected a base in 4 bits, {settings}, for an adapter that began on one")
        nf4 = F.nf4_quantize(layer.weight.detach().float(), **settings)
        return NF4Linear(dataclasses.replace(nf4, dtype=layer.weight.dtype), layer.bias)
    base: Any = layer if isinstance(layer, LoRALinear) else NF4Linear.from_linear(layer)
    found = {"quant_type": base.nf4.quant_type, "block_size": base.nf4.block_size, "double_quant": base.nf4.nested}
    if found != settings:
        warnings.warn(
            f"load_adapter: the adapter began on a base in 4 bits, {settings}, whose losses it makes up for; {path} has {found}: the "
            "model is not quite the one that was trained",
            UserWarning,
            stacklevel=4,
        )
    return layer
